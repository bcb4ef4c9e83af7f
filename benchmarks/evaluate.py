"""Seconds of the distances at 50,000 x 2048, beside the least they could take; ends with JSON.

    python benchmarks/evaluate.py [...]

The same as `arra bench evaluate`; `--help` lists the options.
"""

import sys

from arra.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "evaluate", *sys.argv[1:]]))
