"""A run's examination as one self-contained HTML page: findings, curves, the last pictures."""

import math
from pathlib import Path

from PIL import Image

from arra.doctor.audit_page import LOOK, checks_table, head
from arra.doctor.findings import Audit
from arra.doctor.run import Evidence
from arra.files import write_json
from arra.pages.frame import escape, facts, figure, image, row, section, table, write_page
from arra.pages.plots import ALIGNED, PLAIN, THIRD, Series, curve, smooth

WIDTH = 900
"""Pixels of the widest picture on the page."""
CUT = 0.05
"""The first part of a run may leave the top of an axis: a loss falls most there."""


def write_report(out: Path, audit: Audit, seen: Evidence) -> Path:
    """Writes report.html and run.json, and returns the page."""
    write_json(out / "run.json", audit.to_json())
    body = [LOOK, head(audit), _about(audit, seen), checks_table(audit.checks, "wrong")]
    body += [
        _curves(seen),
        _pictures(seen, "samples", "Sample grid"),
        _pictures(seen, "probes", "What each layer holds of the target"),
        _sessions(seen),
    ]
    return write_page(out / "report.html", f"Run {audit.folder.name}", body)


def _about(audit: Audit, seen: Evidence) -> str:
    ending, card = audit.checks[0], seen.card
    progress = card.get("progress", {})
    hours = progress.get("hours")
    rows = [
        ("ended", ending.summary),
        ("error", ending.facts["error"]),
        ("to go on", ending.facts["resume"]),
        ("hours", None if hours is None else f"{hours:.3g}"),
        ("images seen", f"{progress['samples_seen']:,}" if "samples_seen" in progress else None),
        ("commit", card.get("commit")),
        ("versions", ", ".join(f"{n} {v}" for n, v in card.get("versions", {}).items() if v)),
    ]
    return section("The run", facts(rows))


# ---- curves --------------------------------------------------------------------------------------


def _curves(seen: Evidence) -> str:
    drawn = [
        (_lines(seen, {"loss_ar": "training", "val_loss_ar": "validation"}, "loss_ar", CUT), "AR"),
        *_alignment(seen),
        (_lines(seen, {"lr": ""}, "learning rate"), "Learning rate"),
        (_lines(seen, {"grad_norm": ""}, "gradient norm", CUT), "Gradient norm, before the clip"),
        (_lines(seen, {"images_per_s": ""}, "images/s", zero=True), "Speed"),
        (_lines(seen, {"memory_gb": ""}, "GB", zero=True), "Memory"),
        (
            _lines(
                seen,
                {"data_wait": "for data", "overhead": "validation, painting, saving"},
                "share of the time",
                zero=True,
            ),
            "Time in which nothing is trained",
        ),
    ]
    captions = {"AR": "Next-token loss"}
    figures = "\n".join(figure(svg, captions.get(text, text)) for svg, text in drawn if svg)
    return section("Curves", f'<div class="plots">{figures}</div>' * bool(figures))


def _alignment(seen: Evidence) -> list[tuple[str, str]]:
    """For each target its loss beside that of the best constant answer, and the retrieval."""
    names = sorted({n for line in seen.lines for n in line if n.split("/")[0] == "loss_gva"})
    drawn = []
    for name in names:
        end = name.removeprefix("loss_gva")
        of = f" with {end[1:]}" if end else ""
        shown = {name: "alignment", f"gva_constant{end}": "constant answer"}
        shown |= {f"val_{name}": "validation"}
        drawn.append((_lines(seen, shown, "1 - cosine"), f"Alignment loss{of}"))
        share = _lines(seen, {f"retrieval{end}": ""}, "images found", zero=True)
        drawn.append((share, f"How often an image's own feature is the nearest{of}"))
    return drawn


def _lines(
    seen: Evidence, names: dict[str, str], label: str, cut: float = 0.0, zero: bool = False
) -> str:
    """Fields of the log against images seen; noisy ones with their running mean."""
    series: list[Series] = []
    for colour, (name, said) in zip((ALIGNED, PLAIN, THIRD), names.items(), strict=False):
        x, y = _column(seen, name)
        if len(x) < 2:
            continue
        if len(x) >= 40:
            series.append(Series("", x, y, colour, faint=True))
            y = smooth(y, max(5, len(y) // 40))
        series.append(Series(said, x, y, colour, dashed="constant" in said))
    varies = any(
        max(each.y[len(each.y) // 2 :]) > min(each.y[len(each.y) // 2 :]) for each in series
    )
    return curve(series, y_label=label, cut=cut * varies, from_zero=zero) if series else ""


def _column(seen: Evidence, name: str) -> tuple[list[float], list[float]]:
    pairs = [(line.get("images_seen"), line.get(name)) for line in seen.lines]
    good = [
        (float(x), float(y))
        for x, y in pairs
        if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y)
    ]
    return [x for x, _ in good], [y for _, y in good]


# ---- pictures and sessions -----------------------------------------------------------------------


def _pictures(seen: Evidence, folder: str, title: str) -> str:
    """The last picture of a folder; one that cannot be read is said."""
    last = max((seen.folder / folder).glob("step-*.png"), default=None)
    if last is None:
        return ""
    try:
        picture = Image.open(last).convert("RGB")
    except OSError:
        return section(title, f'<p class="note">{escape(last.name)} cannot be read.</p>')
    if picture.width > WIDTH:
        height = round(picture.height * WIDTH / picture.width)
        picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    shown = figure(image(picture, f"{title}, {last.stem}"), last.stem.replace("-", " "))
    return section(title, f'<div style="max-width:{picture.width}px">{shown}</div>')


def _sessions(seen: Evidence) -> str:
    if not seen.sessions:
        return ""
    heads = ("started", "how it ended", "from step", "to step", "processes", "hours")
    rows = [
        row(
            (
                s.started,
                s.how,
                f"{s.from_step:,}",
                f"{s.to_step:,}",
                s.processes,
                f"{s.seconds / 3600:.3g}",
            )
        )
        for s in seen.sessions
    ]
    return section("Sessions", table(heads, rows))
