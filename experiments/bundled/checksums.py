"""Rewrite src/arra/bundled/SHA256SUMS.json from the folders beside it.

    python experiments/bundled/checksums.py [--check]

With --check nothing is written, and the exit status is 1 where the file is out of date.
"""

from __future__ import annotations

import sys

from arra.files import read_json, sha256_of, write_json
from arra.resolve import BUNDLED

LIMIT_MB = {"encoders and tokenizer": 4.0, "model": 8.0}


def main() -> int:
    files = sorted(path for path in BUNDLED.glob("*/**/*") if path.is_file())
    sums = {path.relative_to(BUNDLED).as_posix(): sha256_of(path) for path in files}
    table = BUNDLED / "SHA256SUMS.json"
    if "--check" in sys.argv[1:]:
        return int(read_json(table) != sums)
    write_json(table, sums)
    model = sum(
        path.stat().st_size for path in files if path.is_relative_to(BUNDLED / "scenes-model")
    )
    rest = sum(path.stat().st_size for path in files) - model
    for (what, limit), size in zip(LIMIT_MB.items(), (rest, model), strict=True):
        print(f"{what}: {size / 1e6:.2f} of {limit} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
