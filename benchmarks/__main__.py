"""Run the benchmark: ``python -m benchmarks``."""

from benchmarks.step_time import main

main()
