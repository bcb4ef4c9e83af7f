"""Which figures a report shows, drawn from results.json (see results.py for its schema)."""

from collections.abc import Iterator, Mapping
from typing import Any

from arra.pages import plots
from arra.pages.plots import ALIGNED, THIRD, Series
from arra.study.plots import ARM_COLOURS, ARM_MARKERS, ARM_NAMES, Row, dumbbell
from arra.study.results import ARMS, metric

CUT = 0.1  # of the run, after which a training loss sets the axis
SMOOTHED = 5  # log lines in the running mean of a training loss


def panels(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(SVG, caption) of every figure that the results can fill."""
    pairs = results["pairs"]
    shares = _share_rows(results)
    if shares:
        yield (
            dumbbell(shares, x_label="pictures that are right"),
            "Share of pictures that show what the prompt asks for; bars are 95 % intervals.",
        )
    yield from _loss_panels(pairs)
    yield from _alignment_panels(pairs[0]["arms"]["aligned"])
    names = list(pairs[0]["arms"]["plain"]["points"][0]["metrics"]) if _points(pairs) else []
    for name in names:
        measure = metric(name)
        label = measure.label
        start = label if "@" in label else label[0].upper() + label[1:]
        caption = f"{start}: {measure.meaning} ({measure.better} is better)"
        series = [s for number, pair in enumerate(pairs) for s in _points_of(pair, name, number)]
        if series:
            percent = measure.kind == "share"
            svg = plots.curve(series, y_label=label, percent=percent, from_zero=True)
            yield svg, f"{caption}, over {_count(pairs[0], name)} prompts at each point."


def _points(pairs: list[Mapping[str, Any]]) -> bool:
    return bool(pairs[0]["arms"]["plain"]["points"])


def _count(pair: Mapping[str, Any], name: str) -> int:
    return int(pair["arms"]["plain"]["points"][-1]["metrics"][name]["n"])


def _share_rows(results: Mapping[str, Any]) -> list[Row]:
    pair = results["pairs"][0]
    group = next(iter(pair["differences"]))
    ceiling = (results.get("ceiling") or {}).get(group, {})
    rows = []
    for name in pair["differences"][group]:
        if metric(name).kind == "share":
            plain, aligned = (pair["arms"][arm]["metrics"][group][name] for arm in ARMS)
            rows.append(
                Row(
                    metric(name).label,
                    (plain["mean"], plain["low"], plain["high"]),
                    (aligned["mean"], aligned["low"], aligned["high"]),
                    ceiling.get(name),
                )
            )
    return rows


def _loss_panels(pairs: list[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for name, label, caption in (
        (
            "loss_ar",
            "training loss",
            "Next-token cross entropy on the training images, nats; the first tenth of the run may "
            "leave the top.",
        ),
        ("val_loss_ar", "validation loss", "The same on images that no arm was trained on, nats."),
    ):
        series, training = [], name == "loss_ar"
        for number, pair in enumerate(pairs):
            for arm in ARMS:
                x, y = plots.column(pair["arms"][arm]["log"], name)
                if len(x) > 1:
                    series.append(
                        Series(
                            ARM_NAMES[arm] if number == 0 else "",
                            x,
                            plots.smooth(y, SMOOTHED) if training else y,
                            ARM_COLOURS[arm],
                            marker="" if training else ARM_MARKERS[arm],
                            faint=number > 0,
                        )
                    )
        if series:
            yield plots.curve(series, y_label=label, cut=CUT if training else 0.0), caption


def _alignment_panels(arm: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    log = arm["log"]
    x, loss = plots.column(log, "loss_gva")
    if len(x) > 1:
        constant_x, constant = plots.column(log, "gva_constant")
        series = [
            Series("alignment loss", x, plots.smooth(loss, SMOOTHED), ALIGNED),
            Series("a constant vector", constant_x, constant, THIRD, dashed=True),
        ]
        yield (
            plots.curve(series, y_label="1 − cosine", from_zero=True),
            "Alignment loss against what one constant vector would score; above the dashed line "
            "nothing about the single image has been learned.",
        )
    x, retrieval = plots.column(log, "retrieval")
    if len(x) > 1:
        chance = 1 / arm["batch_size"]
        series = [
            Series("own image found", x, plots.smooth(retrieval, SMOOTHED), ALIGNED),
            Series("chance", [0, x[-1]], [chance, chance], THIRD, dashed=True),
        ]
        yield (
            plots.curve(series, y_label="retrieval", percent=True, from_zero=True),
            f"How often a projected state is closest to its own image among {arm['batch_size']}.",
        )


def _points_of(pair: Mapping[str, Any], name: str, number: int) -> Iterator[Series]:
    for arm in ARMS:
        found = [
            (p["images_seen"], p["metrics"][name])
            for p in pair["arms"][arm]["points"]
            if p["metrics"].get(name) and p["metrics"][name]["mean"] is not None
        ]
        if not found:
            continue
        whole = all(value.get("low") is not None for _, value in found)
        yield Series(
            ARM_NAMES[arm] if number == 0 else "",
            [x for x, _ in found],
            [value["mean"] for _, value in found],
            ARM_COLOURS[arm],
            low=[value["low"] for _, value in found] if whole else (),
            high=[value["high"] for _, value in found] if whole else (),
            marker=ARM_MARKERS[arm],
            faint=number > 0,
        )
