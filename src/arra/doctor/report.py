"""A plan as a page of text."""

from arra.doctor.devices import GIB, GPUS
from arra.doctor.plan import Plan

WIDTH = 30


def told(plan: Plan) -> str:
    """The plan for people: what it is, what it needs, whether that fits, how long it takes."""
    return "\n\n".join(
        "\n".join(part)
        for part in (_run(plan), _memory(plan), _fit(plan), _time(plan), _notes(plan))
        if part
    )


def size(count: int) -> str:
    """Bytes as KiB, MiB or GiB with three digits."""
    if count == 0:
        return "0"
    for unit, name in ((GIB, "GiB"), (2**20, "MiB")):
        if count >= unit:
            return (
                f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count // unit} {name}"
            )
    return f"{count / 1024:.3g} KiB"


def duration(seconds: float) -> str:
    """Seconds as something to plan with."""
    if seconds < 90:
        return f"{seconds:.2g} s"
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 60:.3g} minutes"


def _line(name: str, value: str, more: str = "") -> str:
    return f"  {name:{WIDTH}}{value:>10}   {more}".rstrip()


def _run(plan: Plan) -> list[str]:
    config, parts, step = plan.config, plan.step.parts, plan.step
    model = config.model_path or "a fresh model"
    frozen = parts.total - parts.trained
    lines = [
        f"{config.recipe}: {model}, {parts.total:,} parameters"
        + (f", {parts.trained:,} of them train" if frozen else ""),
        _line("token tables", f"{parts.tables:,}"),
        _line("blocks", f"{parts.blocks:,}"),
        _line("head", f"{parts.head:,}", "" if parts.head else "the token table serves as head"),
        _line("projectors", f"{parts.projectors:,}", "training only"),
        _line("other", f"{parts.rest:,}"),
        "",
        f"a step: {config.batch_size} images = {plan.gpus} x {plan.accumulate} x {plan.micro} "
        f"(devices x passes x images a pass), {step.row_tokens} tokens a row",
    ]
    return lines


def _memory(plan: Plan) -> list[str]:
    memory = plan.step.memory
    rows = [
        ("weights", memory.weights, ""),
        ("gradients", memory.gradients, f"{size(memory.all_gradients)} when all are there"),
        ("optimizer states", memory.optimizer, f"AdamW, {plan.config.optim.bits} bits"),
        ("averaged weights", memory.average, "--optim.ema"),
        ("batch", memory.batch, "codes, positions, features"),
        ("activations and scratch", memory.activations, f"highest in: {memory.peak_phase}"),
    ]
    lines = ["memory of each device, at the highest moment of a step"]
    lines += [
        _line(name, size(count), more) for name, count, more in rows if count or name == "gradients"
    ]
    lines.append(_line("peak of tensors", size(memory.peak)))
    lines.append(_line("needed", size(plan.needed), "with the process itself and fragmentation"))
    chunk = plan.config.loss.chunk
    lines += [
        "",
        _line("kept by the blocks", size(memory.kept_by_blocks), "a forward pass leaves this"),
        _line(
            "added by the loss",
            size(memory.loss_scratch),
            f"logits of {chunk} positions, gradients of the head",
        ),
    ]
    painting = plan.step.painting
    if painting is not None:
        lines.append(
            _line(
                f"painting {painting.images} images",
                size(painting.peak),
                f"{size(painting.cache)} of it the cache, {painting.rows} rows of "
                f"{painting.columns}; without the image tokenizer",
            )
        )
    return lines


def _fit(plan: Plan) -> list[str]:
    device = plan.device
    answer = "fits" if plan.fits else "does NOT fit"
    lines = [f"{answer} {device.name} ({size(device.memory)})"]
    enough = [f"{name} ({GPUS[name].memory} GiB)" for name, fits in plan.fitting.items() if fits]
    lines.append(f"  GPUs with enough memory: {', '.join(enough) or 'none of the table'}")
    if plan.fits:
        return lines
    lines.append("  what to change:")
    for other in plan.alternatives:
        answer = "fits" if other.fits else "does not"
        lines.append(f"    {size(other.needed):>10}  {answer:9} {other.flags}")
    if not any(other.fits for other in plan.alternatives):
        lines.append("    else: a smaller model, shorter sequences, or a larger device")
    return lines


def _time(plan: Plan) -> list[str]:
    return [
        "time (an estimate)",
        _line("a step", duration(plan.seconds_per_step), f"{plan.step.flops:.3g} operations"),
        _line("1,000 images", duration(plan.seconds_per_1000_images)),
        _line(f"{plan.config.steps:,} steps", duration(plan.seconds)),
    ]


def _notes(plan: Plan) -> list[str]:
    return ["assumed", *(f"  {line}" for line in plan.assumptions)]
