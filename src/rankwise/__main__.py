"""``python -m rankwise``: the command line, where no script of its name is on the path."""

from rankwise.cli import main

main()
