"""A training step: plain, aligned, compiled, and the original LlamaGen's; ends with a JSON line.

    python benchmarks/train.py [--quick] [--llamagen CHECKOUT] [...]

The same as `arra bench train`; `--help` lists the options.
"""

import sys

from arra.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "train", *sys.argv[1:]]))
