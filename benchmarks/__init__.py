"""Measurements of rankwise against other tools: ``python -m benchmarks``, see ``--help``."""
