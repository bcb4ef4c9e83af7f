"""What a run's curves say: losses, alignment, what steers them, and speed.

A curve is judged by the medians of its tenths: single log lines are noise.
"""

import itertools
import math
import statistics
from collections.abc import Sequence

from arra.config import TrainConfig
from arra.doctor.findings import Check, Finding, Level, counted, first
from arra.doctor.run import Evidence
from arra.train.optim import learning_rate

PARTS = 10
FEWEST = 8
"""Log lines below which a curve is not judged."""
RISE, DIVERGED = 0.1, 0.5
"""Of what a loss had fallen, how much of it is lost again: a warning, and divergence."""
OVERFIT = 0.01
"""By this fraction of its best the validation loss may rise."""
LEARNING = 0.01
"""A loss that has not fallen by this fraction has not learned."""
BARELY = 0.02
"""An alignment loss within this of the constant answer's has learned the mean alone."""
SLOW, SLOW_SHARE = 0.5, 0.1
"""An interval below half of the median speed is slow; a tenth of them is worth a warning."""
WAIT, OVERHEAD, GROWTH = 0.05, 0.25, 0.2
"""Shares of the time that are worth a warning; and growth of the memory after the first tenth."""

Curve = list[tuple[int, float]]


def losses_check(seen: Evidence) -> Check:
    """Did the loss fall, and stay down; was anything skipped; does validation agree?"""
    curve = seen.column("loss_ar")
    findings = _incidents(seen)
    bad = [s for s, value in curve if not math.isfinite(value)]
    if bad:
        steps = first(f"step {s}" for s in bad)
        remedy = "lower --optim.lr, or use --dtype float32"
        findings.append(
            Finding("damage", "loss_ar is not finite", "log.jsonl", len(bad), steps, remedy)
        )
    curve = [(s, value) for s, value in curve if math.isfinite(value)]
    if len(curve) < FEWEST:
        why = f"{counted(len(curve), 'log line')}, too few to judge"
        return Check("losses", _span(curve), [*findings, Finding("not checked", why, "losses")])
    parts = _tenths(curve)
    findings += _direction(parts) + _validation(seen)
    return Check("losses", _span(curve), findings, {"tenths": parts})


def _span(curve: Curve) -> str:
    if not curve:
        return ""
    (_, start), (step, end) = curve[0], curve[-1]
    return f"loss_ar {start:.4g} at first, {end:.4g} after step {step:,}"


def _direction(parts: Sequence[float]) -> list[Finding]:
    start, best, last = parts[0], min(parts), parts[-1]
    fallen, lost = start - best, last - best
    if last > start or (fallen > 0 and lost > DIVERGED * fallen):
        what = f"loss_ar diverged: {start:.4g} at first, {best:.4g} at best, {last:.4g} at the end"
        remedy = "go back to a checkpoint before it rose, with a lower --optim.lr in another --out"
        return [Finding("damage", what, "losses", remedy=remedy)]
    if lost > RISE * fallen:
        what = f"loss_ar rises again: {best:.4g} at best, {last:.4g} at the end"
        return [Finding("warning", what, "losses", remedy="watch it; a lower --optim.lr may help")]
    if fallen < LEARNING * abs(start):
        what = f"loss_ar has hardly fallen ({start:.4g} to {last:.4g})"
        remedy = "a higher --optim.lr, a longer run, or data whose codes can be predicted"
        return [Finding("warning", what, "losses", remedy=remedy)]
    half = parts[len(parts) // 2]
    if half - last < LEARNING * fallen:
        what = f"loss_ar lies on a plateau: {half:.4g} half-way, {last:.4g} at the end"
        return [Finding("note", what, "losses")]
    return []


def _validation(seen: Evidence) -> list[Finding]:
    curve = seen.column("val_loss_ar")
    if len(curve) < 3:
        return []
    best_step, best = min(curve, key=lambda pair: pair[1])
    last_step, last = curve[-1]
    if last > best * (1 + OVERFIT):
        trained = [value for step, value in seen.column("loss_ar") if step <= last_step][-1]
        what = (
            f"it overfits: val_loss_ar was {best:.4g} after step {best_step:,} and is {last:.4g} "
            f"(loss_ar {trained:.4g})"
        )
        remedy = "stop near the best step, or more data, dropout or views (prepare --views)"
        return [Finding("warning", what, "validation", remedy=remedy)]
    return []


def _incidents(seen: Evidence) -> list[Finding]:
    """What incidents.jsonl tells (train/guard.py)."""
    found = []
    stops = [each for each in seen.incidents if each.get("kind") == "stop"]
    if stops and not seen.done:
        last = stops[-1]
        terms = ", ".join(map(str, last.get("terms", []))) or "a term"
        what = (
            f"stopped after step {last.get('step')}: {terms} was not finite, three steps in a row"
        )
        skip = f"{last.get('first')}-{last.get('step')}"
        remedy = f"pass over them with --data.skip-steps {skip}, or lower --optim.lr"
        found.append(Finding("damage", what, "incidents.jsonl", remedy=remedy))
    words = {
        "skipped": ("step was", "steps were", "skipped: not finite"),
        "spike": ("spike", "spikes", "of the loss"),
        "passed over": ("step", "steps", "passed over, as asked"),
    }
    for kind, (one, many, rest) in words.items():
        # A step is told once for each process at fault.
        steps = sorted({e["step"] for e in seen.incidents if e.get("kind") == kind and "step" in e})
        if steps:
            much = kind == "skipped" and len(steps) > 0.01 * max(seen.last_step, 1)
            level: Level = "warning" if much else "note"
            what = f"{counted(len(steps), one, many)} {rest}"
            names = first(f"step {step}" for step in steps)
            found.append(Finding(level, what, "incidents.jsonl", len(steps), names))
    return found


# ---- alignment -----------------------------------------------------------------------------------


def alignment_check(seen: Evidence) -> Check:
    """Did the projector learn more than the mean, and can it tell images apart?"""
    config = seen.config
    if config is not None and config.align.weight == 0:
        return Check("alignment", "none: the plain baseline", _probes(seen))
    names = sorted({n for line in seen.lines for n in line if n.split("/")[0] == "loss_gva"})
    findings: list[Finding] = []
    said, facts = [], {}
    for name in names:
        target = name.partition("/")[2]
        suffix = f"/{target}" if target else ""
        curve = seen.column(name)
        if len(curve) < FEWEST:
            why = f"{name}: {counted(len(curve), 'log line')}, too few to judge"
            findings.append(Finding("not checked", why, "alignment"))
            continue
        loss = _tenths(curve)[-1]
        constant = _tenths(seen.column(f"gva_constant{suffix}") or curve)[-1]
        found = _tenths(seen.column(f"retrieval{suffix}") or [(0, 0.0)])[-1]
        facts[target or "target"] = {"loss": loss, "constant": constant, "retrieval": found}
        said.append(f"{name} {loss:.3g} (the best constant answer: {constant:.3g})")
        findings += _learned(name, loss, constant)
        if config is not None:
            findings += _retrieved(seen, name, found)
    return Check("alignment", ", ".join(said), findings + _probes(seen), facts)


def _learned(name: str, loss: float, constant: float) -> list[Finding]:
    if loss > constant - BARELY * abs(constant):
        what = f"{name} {loss:.3g} is not below the best constant answer, {constant:.3g}"
        remedy = (
            "the projector has learned the mean feature at most: train longer, align a later "
            "layer (--align.layer), or centre the features (--align.centred)"
        )
        return [Finding("warning", what, "alignment", remedy=remedy)]
    if constant < 0.1:
        what = f"a constant answers {name} to {constant:.3g}: the features are nearly alike"
        return [Finding("note", what, "alignment", remedy="--align.centred takes their mean away")]
    return []


def _retrieved(seen: Evidence, name: str, found: float) -> list[Finding]:
    assert seen.config is not None
    ranks = seen.sessions[-1].processes if seen.sessions else 1
    images = seen.config.batch_size / (ranks * seen.config.accumulate(ranks))
    if images < 2 or found > 2 / images:
        return []
    what = f"{name}: the right image of {images:.0f} is found {found:.1%} of the time"
    rest = f"chance is {1 / images:.1%}; what is aligned says little about the image yet"
    return [Finding("note", what, "alignment", remedy=rest)]


def _probes(seen: Evidence) -> list[Finding]:
    """What the last probe found, in a line for each target."""
    lines = [line for line in seen.lines if "probe/chance" in line]
    if not lines:
        return []
    found: dict[str, dict[int, float]] = {}
    for name, value in lines[-1].items():
        if name.startswith("probe/cka/layer_"):
            layer, _, target = name.removeprefix("probe/cka/layer_").partition("/")
            found.setdefault(target, {})[int(layer)] = value
    told = []
    for target, layers in found.items():
        best = max(layers, key=lambda layer: layers[layer])
        of = f" of {target}" if target else ""
        what = f"layer {best} of {len(layers)} holds most{of}: linear CKA {layers[best]:.3g}"
        told.append(Finding("note", f"{what} (step {lines[-1]['step']:,})", "probe"))
    return told


# ---- steering ------------------------------------------------------------------------------------


def steering_check(seen: Evidence) -> Check:
    """Learning rate as scheduled; gradients neither vanished nor always clipped."""
    rates, norms, config = seen.column("lr"), seen.column("grad_norm"), seen.config
    if config is None or not rates:
        why = "there is no config.json, or no log line, to compare"
        return Check("steering", "", [Finding("not checked", why, "lr")])
    findings = []
    off = [s for s, lr in rates if not math.isclose(lr, _scheduled(s, config), rel_tol=1e-6)]
    if off:
        what = f"the learning rate is not the schedule's in {counted(len(off), 'log line')}"
        steps = first(f"step {step}" for step in off)
        findings.append(Finding("warning", what, "lr", len(off), steps, "was the log edited?"))
    dead = [step for step, norm in norms if norm == 0]
    if dead:
        what = f"no gradient at all in {counted(len(dead), 'log line')}"
        findings.append(Finding("damage", what, "grad_norm", len(dead)))
    later = [norm for _, norm in norms[len(norms) // 4 :]]
    clipped = sum(norm > config.optim.clip for norm in later) / max(len(later), 1)
    if len(later) >= FEWEST and clipped > 0.9:
        what = f"gradients are clipped in {clipped:.0%} of the log (--optim.clip)"
        remedy = "the clip, not --optim.lr, sets the size of the steps: compare with a lower rate"
        findings.append(Finding("note", what, "grad_norm", remedy=remedy))
    usual = f", gradient norm {statistics.median(later):.3g}" if later else ""
    peak = max(lr for _, lr in rates)
    said = f"learning rate {peak:.3g} at most, {rates[-1][1]:.3g} at the end{usual}"
    return Check("steering", said, findings)


def _scheduled(step: int, config: TrainConfig) -> float:
    return learning_rate(step - 1, config.steps, config.optim)


# ---- speed ---------------------------------------------------------------------------------------


def speed_check(seen: Evidence) -> Check:
    """Throughput, what else the time went to, and memory."""
    rates = [(s, v) for s, v in seen.column("images_per_s") if v > 0]
    if len(rates) < 2:
        return Check("speed", "", [Finding("not checked", "too few log lines to judge", "speed")])
    usual = statistics.median(v for _, v in rates)
    findings = []
    slow = [step for step, value in rates[1:] if value < SLOW * usual]
    if slow:
        much = len(slow) > SLOW_SHARE * len(rates)
        what = f"{counted(len(slow), 'interval')} below half of the usual {usual:.3g} images/s"
        steps = first(f"step {step}" for step in slow)
        remedy = "something else used the machine" if much else ""
        level: Level = "warning" if much else "note"
        findings.append(Finding(level, what, "speed", len(slow), steps, remedy))
    shares = {"data_wait": WAIT, "overhead": OVERHEAD}
    remedies = {
        "data_wait": "the data comes too slowly: a faster disk, or fewer processes beside it",
        "overhead": "validation, painting and checkpoints take it: make them rarer",
    }
    told = {"data_wait": "waiting for data", "overhead": "not training"}
    said = [f"{usual:.3g} images/s"]
    for name, most in shares.items():
        share = _usual(seen, name)
        if share is None:
            continue
        said.append(f"{share:.1%} {told[name]}")
        if share > most:
            what = f"{share:.0%} of the time is spent {told[name]} ({name})"
            findings.append(Finding("warning", what, "speed", remedy=remedies[name]))
    mfu = _usual(seen, "mfu")
    said += [f"MFU {mfu:.1%}"] if mfu is not None else []
    growth, memory = _growth(seen)
    findings += growth
    return Check("speed", ", ".join([*said, *memory]), findings, {"images_per_s": usual})


def _usual(seen: Evidence, name: str) -> float | None:
    """The mean, in which rare long pauses count."""
    values = [value for _, value in seen.column(name)]
    return statistics.fmean(values) if values else None


def _growth(seen: Evidence) -> tuple[list[Finding], list[str]]:
    curve = seen.column("memory_gb")
    if not curve:
        return [], []
    said = [f"memory {max(v for _, v in curve):.3g} GB"]
    if len(curve) < FEWEST:
        return [], said
    parts = _tenths(curve)
    steady = all(b >= a for a, b in itertools.pairwise(parts[1:]))
    if parts[-1] > parts[1] * (1 + GROWTH) and parts[-1] > parts[-3] and steady:
        what = f"memory keeps growing: {parts[1]:.3g} GB early, {parts[-1]:.3g} GB at the end"
        remedy = "a leak, or ever longer sequences: it will end where the memory does"
        return [Finding("warning", what, "memory", remedy=remedy)], said
    return [], said


def _tenths(curve: Curve) -> list[float]:
    """Medians of ten equal parts (fewer for a short curve), each of at least one line."""
    parts = min(PARTS, len(curve))
    bounds = [round(i * len(curve) / parts) for i in range(parts + 1)]
    return [
        statistics.median(value for _, value in curve[a:b]) for a, b in itertools.pairwise(bounds)
    ]
