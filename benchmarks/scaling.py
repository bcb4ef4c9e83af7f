"""Works out the tables of docs/scaling.md from formulas; prints them, and a JSON line last.

    python benchmarks/scaling.py                          # the tables
    python benchmarks/scaling.py --write docs/scaling.md  # puts them into the page

The formulas, what was measured and what is assumed: scaling_formulas.py. A test holds the page to
what this prints.
"""

import argparse
import json
import math
import re
from dataclasses import replace
from pathlib import Path

from scaling_formulas import (
    ASSUMED,
    ENGINES,
    GB,
    GPUS_PER_NODE,
    KB,
    LLAMAGEN,
    MB,
    MEASURED,
    NETWORKS,
    PAINTERS,
    TB,
    WORLDS,
    best_interval,
    checkpoint_bytes,
    ddp,
    fsdp,
    gloo_sum,
    hybrid,
    largest,
    repeated,
    ring_steps,
    staging_seconds,
    steps_by_machine,
    write_seconds,
)


def amount(value: float) -> str:
    """Bytes with a decimal prefix."""
    for unit, name in ((TB, "TB"), (GB, "GB"), (MB, "MB"), (KB, "kB")):
        number = value / unit
        if number >= 99.95:
            return f"{number:,.0f} {name}"
        if number >= 1:
            return f"{number:.3g} {name}"
    return f"{value:.0f} B"


def duration(seconds: float) -> str:
    """Two digits and a unit."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= unit:
            value = seconds / unit
            return f"{value:.0f} {name}" if value >= 9.95 else f"{value:.1f} {name}"
    return f"{seconds * 1e6:.0f} µs"


def ratio(value: float) -> str:
    """Two digits."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:.2g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def models() -> str:
    head = [
        "model",
        "P",
        "of it in blocks",
        "trained",
        "T",
        "GFLOP an image",
        "images/s of an H100",
    ]
    rows = [
        [
            *(p.name, f"{p.parameters / MB:,.0f}M", f"{p.in_blocks / p.parameters:.0%}"),
            *(f"{p.trained / MB:,.0f}M", f"{p.tokens:,}", f"{p.flops / 1e9:,.0f}"),
            f"{ASSUMED['flops'] * p.mfu / p.flops:,.0f} at {p.mfu:.0%}",
        ]
        for p in PAINTERS
    ]
    return table(head, rows)


def bytes_moved() -> str:
    head = ["model", "ddp", "fsdp", "fsdp, A = 4", "hybrid, NVLink", "hybrid, network, of a node"]
    rows = []
    for p in PAINTERS:
        both = hybrid(p, 1024)
        sent = [ddp(p, 1024).inside, fsdp(p, 1024).inside, fsdp(p, 1024, 4).inside]
        rows.append([p.name, *map(amount, [*sent, both.inside, both.network])])
    return table(head, rows)


def against_compute() -> str:
    head = ["model, B", "N", "compute"]
    head += [f"{engine}, {name}" for name in NETWORKS for engine in ENGINES]
    rows = []
    for p in PAINTERS:
        for gpus in (8, 64, 1024):
            times = [e(p, gpus).seconds(n) for n in NETWORKS.values() for e in ENGINES.values()]
            compute = p.compute(gpus)
            shares = [f"{duration(t)} ({ratio(t / compute)})" for t in times]
            rows.append([f"{p.name}, {p.batch:,}", f"{gpus:,}", duration(compute), *shares])
    return table(head, rows)


def world_limits() -> str:
    head = ["model", "B"] + [f"{engine}, {name}" for name in NETWORKS for engine in ENGINES]
    rows = []
    for p in PAINTERS:
        for batch in (256, p.batch) if p in LLAMAGEN else (p.batch,):
            each = replace(p, batch=batch)
            found = [largest(each, e, n) for n in NETWORKS.values() for e in ENGINES]
            rows.append([p.name, f"{batch:,}", *(f"{n:,}" if n else "none" for n in found)])
    return table(head, rows)


def sums() -> str:
    head = ["processes", "one ring", "by machine", "one sum", "sockets of a process", "found"]
    rows = [
        [str(n), str(ring_steps(n)), "", duration(MEASURED[f"sum of {n}"]), str(n - 1), "measured"]
        for n in (2, 4)
    ]
    for n in WORLDS:
        steps = [f"{ring_steps(n):,}", f"{steps_by_machine(n):,}"]
        rows.append([f"{n:,}", *steps, duration(gloo_sum(n)), f"{n - 1:,}", "on paper"])
    return table(head, rows)


def shards() -> str:
    head = [
        "images",
        "shard rows",
        "shards",
        "a shard",
        "all",
        "manifest",
        "read it",
        "codes in RAM",
    ]
    rows = []
    for images, each in ((1.28e6, 1024), (1e8, 8192), (1e9, 1024), (1e9, 65_536)):
        number = math.ceil(images / each)
        stored = MEASURED["image bytes"]
        rows.append(
            [
                *(f"{images / 1e6:,.4g}M", f"{each:,}", f"{number:,}"),
                *(amount(each * stored), amount(images * stored)),
                amount(number * MEASURED["manifest bytes"]),
                duration(number * MEASURED["manifest seconds"]),
                amount(images * (256 * 4 + 768 * 2)),
            ]
        )
    return table(head, rows)


def features() -> str:
    head = ["stored for each image", "formula", "bytes", "of a billion"]
    kinds = {
        "all of a row, 256 codes, feature of 768": ("measured", MEASURED["image bytes"]),
        "all of a row, 1,024 codes, feature of 768": ("measured", MEASURED["large image bytes"]),
        "class token of CLIP-L": ("2 x 768", 2 * 768),
        "patches, float16": ("2 x 256 x 1,024", 2 * 256 * 1024),
        "patches, int8": ("256 x 1,024", 256 * 1024),
        "caption as T5-XL features": ("2 x 120 x 2,048, at most", 2 * 120 * 2048),
    }
    rows = [[k, how, f"{size:,.0f}", amount(size * 1e9)] for k, (how, size) in kinds.items()]
    return table(head, rows)


def egress() -> str:
    head = ["model", "N", "images/s", "a node reads", "an epoch of a billion"]
    head += ["read in an epoch, L = N", "L = 8", "no stream: at each start"]
    rows = []
    for p in PAINTERS:
        size = 1e9 * MEASURED["large image bytes" if p.tokens > 1000 else "image bytes"]
        for gpus in (64, 1024):
            nodes, rate = gpus // GPUS_PER_NODE, gpus * ASSUMED["flops"] * p.mfu / p.flops
            rows.append(
                [
                    *(p.name, f"{gpus:,}", f"{rate:,.0f}"),
                    *(f"{amount(rate * size / 1e9 / nodes)}/s", duration(1e9 / rate)),
                    *(amount(size * repeated(nodes, lanes)) for lanes in (gpus, 8)),
                    amount(gpus * size),
                ]
            )
    return table(head, rows)


def checkpoints() -> str:
    head = ["model", "weights", "moments", "average", "projector", "all", "write: 1 node"]
    head += ["write: 128 nodes", "blocked by it, async", "share of a GPU, N = 1,024"]
    rows = []
    for p in PAINTERS:
        parts = checkpoint_bytes(p)
        size = sum(parts.values())
        rows.append(
            [
                *(p.name, *map(amount, parts.values()), amount(size)),
                *(duration(write_seconds(size, 1)), duration(write_seconds(size, 128))),
                *(duration(staging_seconds(size, 1024)), amount(size / 1024)),
            ]
        )
    return table(head, rows)


def intervals() -> str:
    head = ["model", "N", "between failures", "a save blocks", "save every", "lost to both"]
    head += ["async: blocks", "save every", "lost"]
    rows = []
    for p in PAINTERS:
        size = sum(checkpoint_bytes(p).values())
        for gpus in (64, 1024):
            between = ASSUMED["hours between failures of a GPU"] * 3600 / gpus
            row = [p.name, f"{gpus:,}", duration(between)]
            written = write_seconds(size, gpus // GPUS_PER_NODE)
            for blocked in (written, staging_seconds(size, gpus)):
                every, lost = best_interval(blocked, gpus)
                # A save that runs beside training must end before the next begins.
                every = max(every, written)
                row += [duration(blocked), duration(every), f"{lost:.2%}"]
            rows.append(row)
    return table(head, rows)


def protocol() -> str:
    head = ["model", "images", "PFLOP", "GPU-hours", "8 GPUs", "64 GPUs", "images/h, 8 GPUs"]
    images = 300 * (1_281_167 // 256) * 256
    rows = []
    for p in LLAMAGEN:
        rate = ASSUMED["flops"] * p.mfu / p.flops
        hours = images / rate / 3600
        rows.append(
            [
                *(p.name, f"{images / 1e6:,.1f}M", f"{images * p.flops / 1e15:,.0f}"),
                *(f"{hours:,.0f}", duration(hours * 3600 / 8), duration(hours * 3600 / 64)),
                f"{8 * rate * 3600 / 1e6:,.1f}M",
            ]
        )
    return table(head, rows)


TABLES = {
    f.__name__.replace("_", "-"): f
    for f in (
        *(models, bytes_moved, against_compute, world_limits, sums, shards, features, egress),
        *(checkpoints, intervals, protocol),
    )
}


def with_tables(page: str) -> str:
    """The page with every table renewed: what stands between `<!-- table: NAME -->` and `<!-- end
    -->`.

    Raises:
        ValueError: a name that no table has, or a table that the page lacks.
    """
    named = re.findall(r"<!-- table: ([\w-]+) -->", page)
    if sorted(named) != sorted(TABLES):
        raise ValueError(f"the page has the tables {named}, not each of {list(TABLES)} once")
    return re.sub(
        r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        page,
        flags=re.S,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, help="a page whose tables are renewed")
    options = parser.parse_args()
    if options.write:
        options.write.write_text(with_tables(options.write.read_text()))
    for name, make in TABLES.items():
        print(f"{name}\n\n{make()}\n")
    largest_worlds = {
        p.name: {f"{e}, {n}": largest(p, e, v) for n, v in NETWORKS.items() for e in ENGINES}
        for p in PAINTERS
    }
    measured = {"measured": MEASURED, "assumed": ASSUMED, "largest_world": largest_worlds}
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
