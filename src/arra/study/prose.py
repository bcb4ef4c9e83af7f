"""The plain-language result, made from the numbers, whatever they say."""

from collections.abc import Mapping, Sequence
from typing import Any

from arra.study.results import Metric, metric, show, show_difference, verdict

HEADLINES = ("all_right", "colour", "fragments")
"""What is told in words first, where it was measured; the table has the rest."""


def result_paragraph(results: Mapping[str, Any]) -> str:
    """One paragraph for people who read nothing else. No sentence assumes that ARRA won."""
    pair = results["pairs"][0]
    group = next(iter(pair["differences"]))
    sentences = [_setting(results, pair)]
    sentences += _headlines(pair, group, results["groups"].get(group, group))
    sentences.append(_tally(results, pair["differences"]))
    sentences.append(_caution(results))
    return " ".join(sentence for sentence in sentences if sentence)


def _setting(results: Mapping[str, Any], pair: Mapping[str, Any]) -> str:
    images = last_images_seen(pair["arms"]["plain"])
    return (
        f"Two painters started from the same weights and saw the same {images:,} images of "
        f"{results['data']['label']} in the same order. Both learned to predict the next image "
        f"code; one of them, ARRA, was also pulled towards what a frozen encoder sees in the whole "
        f"image."
    )


def last_images_seen(arm: Mapping[str, Any]) -> int:
    """How many images the arm had been trained on at its last log line."""
    return int(arm["log"][-1]["images_seen"]) if arm["log"] else 0


def _headlines(pair: Mapping[str, Any], group: str, called: str) -> list[str]:
    differences = pair["differences"][group]
    chosen = [name for name in HEADLINES if name in differences]
    if not chosen:
        chosen = list(differences)[:2]
    return [_headline(metric(name), pair, group, called) for name in chosen]


def _headline(measure: Metric, pair: Mapping[str, Any], group: str, called: str) -> str:
    found = {arm: pair["arms"][arm]["metrics"][group][measure.name] for arm in ("plain", "aligned")}
    plain, aligned = (show(measure, found[arm]["mean"]) for arm in ("plain", "aligned"))
    difference = pair["differences"][group][measure.name]
    change = f"a difference of {told_difference(measure, difference, found['plain']['mean'])}"
    if verdict(measure, difference) == "unclear":
        change += ", which may be chance"
    if measure.name == "all_right":
        return (
            f"Asked to paint {called}, ARRA got all of it right in "
            f"{aligned} of its pictures and the plain one in {plain}: {change}."
        )
    if measure.name == "fragments":
        return f"Stray pieces per picture: {aligned} with ARRA, {plain} without, {change}."
    if measure.name == "colour":
        return f"Colours are right in {aligned} with ARRA and {plain} without: {change}."
    return f"The {measure.label} is {aligned} with ARRA and {plain} without: {change}."


def told_difference(measure: Metric, difference: Mapping[str, Any], like: float) -> str:
    """+3.1 points (95 % interval +1.0 to +5.2)."""
    mean, low, high = (difference[name] for name in ("mean", "low", "high"))
    text = show_difference(measure, mean, like)
    text += " points" if measure.kind == "share" else ""
    if low is None:
        return text
    ends = f"{show_difference(measure, low, like)} to {show_difference(measure, high, like)}"
    return f"{text} (95 % interval {ends})"


def _tally(results: Mapping[str, Any], differences: Mapping[str, Mapping[str, Any]]) -> str:
    """Better, worse, unclear: counted, and named where they are few."""
    sentences = []
    for group, found in differences.items():
        told: dict[str, list[str]] = {"better": [], "worse": [], "unclear": []}
        for name, difference in found.items():
            if difference["low"] is not None:
                told[verdict(metric(name), dict(difference))].append(metric(name).label)
        total = sum(map(len, told.values()))
        if total < 2:
            continue
        parts = [
            f"{words} on {_few(told[outcome], total)}"
            for outcome, words in (
                ("better", "better"),
                ("worse", "worse"),
                ("unclear", "not clearly different"),
            )
            if told[outcome]
        ]
        where = results["groups"].get(group, group)
        sentences.append(f"Of {total} measures on {where}, ARRA is {listed(parts)}.")
    return " ".join(sentences)


def _few(labels: Sequence[str], total: int) -> str:
    if len(labels) == total:
        return "all"
    return f"{len(labels)} ({', '.join(labels)})" if len(labels) <= 3 else str(len(labels))


def _caution(results: Mapping[str, Any]) -> str:
    count = len(results["pairs"])
    if count == 1:
        return (
            "The intervals are over prompts: one pair of training runs cannot say how much another "
            "pair would differ."
        )
    return f"The figures above are of the first of {count} pairs of runs; the table has them all."


def alignment_sentence(results: Mapping[str, Any]) -> str | None:
    """Whether the projector learned more than the dataset's mean feature."""
    arm = results["pairs"][0]["arms"]["aligned"]
    line = next((row for row in reversed(arm["log"]) if "loss_gva" in row), None)
    if line is None:
        return None
    loss, constant = line["loss_gva"], line["gva_constant"]
    retrieval, chance = line.get("retrieval"), 1 / arm["batch_size"]
    if loss < constant:
        text = (
            f"The alignment loss ends at {loss:.3f}, below the {constant:.3f} that the best "
            f"constant vector scores: the projected states say something about each image"
        )
    else:
        text = (
            f"The alignment loss ends at {loss:.3f}, no better than the {constant:.3f} that the "
            f"best constant vector scores: the projector learned no more than the mean feature"
        )
    if retrieval is not None:
        text += (
            f". Within a batch they point at their own image {100 * retrieval:.0f} % of the time "
            f"(chance is {100 * chance:.0f} %)"
        )
    return text + "."


def depth_paragraph(depth: Mapping[str, Any]) -> str:
    """What tapping layer 1, as the paper does, gives on this model."""
    rows: Sequence[Mapping[str, Any]] = depth["rows"]
    used = depth["used"]
    text = (
        f"The paper aligns layer 1 of 32. This model has {depth['layers']} blocks, so layer 1 is "
        f"another place in it; the arm above is aligned at layer {used}, chosen on seeds that this "
        f"report does not use."
    )
    paper = next((row for row in rows if row["layer"] == 1), None)
    plain = next((row for row in rows if row["layer"] is None), None)
    if paper is None:
        return text
    name, value = next(iter(paper["metrics"].items()))
    measure = metric(name)
    text += f" With layer 1 the same recipe gives {measure.label} {show(measure, value)}"
    if plain is not None:
        text += f" (plain: {show(measure, plain['metrics'][name])})"
    chosen = next((row for row in rows if row["layer"] == used), None)
    if chosen is not None and used != 1:
        text += f", with layer {used} {show(measure, chosen['metrics'][name])}"
    return text + "."


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
