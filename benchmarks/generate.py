"""Painting: ours in its ways, the original LlamaGen's, transformers'; ends with a JSON line.

    python benchmarks/generate.py [--quick] [--llamagen CHECKOUT] [...]

The same as `arra bench generate`; `--help` lists the options.
"""

import sys

from arra.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "generate", *sys.argv[1:]]))
