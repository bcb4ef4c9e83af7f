"""Images a second of the loader, beside what training takes; ends with a JSON line.

    python benchmarks/loader.py [...]

The same as `arra bench loader`; `--help` lists the options.
"""

import sys

from arra.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "loader", *sys.argv[1:]]))
