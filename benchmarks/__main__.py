"""Run every benchmark, or those named: ``python -m benchmarks [--quick] [step_time ...]``."""

import argparse

from benchmarks import loss_memory, moe, step_time
from benchmarks.paired import fixed_allocator

BENCHMARKS = {"loss_memory": loss_memory.run, "moe": moe.run, "step_time": step_time.run}

parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all?")
args = parser.parse_args()
if unknown := set(args.names) - BENCHMARKS.keys():
    parser.error(f"no benchmark named {sorted(unknown)}; there are {sorted(BENCHMARKS)}")
fixed_allocator()
for name in args.names or BENCHMARKS:
    BENCHMARKS[name](quick=args.quick)
