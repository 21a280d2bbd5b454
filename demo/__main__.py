"""``python -m demo [--out FOLDER] [METHOD ...]``: what ``make demo`` runs."""

import argparse
from pathlib import Path

from demo import METHODS, run

parser = argparse.ArgumentParser(prog="python -m demo", description="Adapt the embedded model to Python.")
parser.add_argument("methods", nargs="*", help=f"by default {', '.join(METHODS)}")
parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for adapters, figures and the picture")
options = parser.parse_args()
run(options.out, options.methods or METHODS)
