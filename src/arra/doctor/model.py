"""`arra doctor MODEL`: whether a model can be opened, painted with, and by what.

MODEL is an export, or a checkpoint as its authors publish it. Its weights are mapped from the
files, not copied; every one of them is looked at once.
"""

from pathlib import Path

from arra.doctor.findings import Audit, Check, Finding, unchecked
from arra.doctor.model_files import files_check, weights_check
from arra.doctor.settings import ModelCheckConfig
from arra.files import place, read_json
from arra.generate.pipeline import INSIDE
from arra.image_tokenizers import load_image_tokenizer
from arra.image_tokenizers.interface import ImageTokenizer
from arra.models.base import Backbone, Grid
from arra.models.causal_lm import CausalLM
from arra.models.families import family_of
from arra.models.loading import PIPELINE, model_place, open_unchecked
from arra.models.probes import check


def is_model(spec: str) -> bool:
    """Whether a model is meant: bundled, a folder that holds one, or the id of one on the hub."""
    folder = place(spec)
    if spec.startswith("builtin:"):
        return True
    if not folder.exists():
        return "://" not in spec and not spec.startswith((".", "/", "~")) and spec.count("/") == 1
    if (folder / PIPELINE).is_file():
        return True
    try:
        return "model_type" in read_json(folder / "config.json")
    except (OSError, ValueError, TypeError):
        return False


def look_at(config: ModelCheckConfig) -> Audit:
    """Looks at a model. Nothing is written.

    Raises:
        ValueError: it is a single file, or a hub id that cannot be had.
    """
    folder = model_place(config.model)
    if folder.is_file():
        raise ValueError(
            f"{config.model} is a file: `arra convert` reads it whole, says what is wrong with it "
            f"and makes a folder"
        )
    ours = (folder / PIPELINE).is_file()
    standard = folder / "model" if ours else folder
    weights = weights_check(standard)
    opened, family = _opened(config, folder, standard)
    checks = [family]
    if opened is None:
        checks += [unchecked(name, "it does not open") for name in ("format", "painting")]
    else:
        grid = _grid(folder, opened)
        checks += [_format(opened, grid), _painting(folder, opened), _probes(opened, weights)]
    checks += [weights, _image_tokenizer(config, folder, opened), files_check(folder, ours)]
    kind = "an export of ours" if ours else "a published checkpoint"
    return Audit(folder, f"{folder}: {kind}", checks, config.strict, kind="model")


def _opened(
    config: ModelCheckConfig, folder: Path, standard: Path
) -> tuple[Backbone | None, Check]:
    """The backbone, if there is one, and whose it is."""
    try:
        family = family_of(standard)
        if family is CausalLM and standard is folder:
            what = "a language model that can only write"
            remedy = f"it learns to paint with `arra train llm --model {config.model}`"
            finding = Finding("warning", what, "config.json", remedy=remedy)
            return None, Check("family", family.__name__, [finding])
        backbone = open_unchecked(config.model, config.format)
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        return None, Check("family", "", [Finding("damage", said, "model")])
    model = backbone.model
    kind, shape = type(model).__name__, (backbone.num_layers, backbone.hidden_size)
    summary = f"{type(backbone).__name__} ({kind}): {shape[0]} blocks of width {shape[1]:,}"
    facts = {"family": type(backbone).__name__, "class": kind, "dtype": str(model.dtype)[6:]}
    return backbone, Check("family", summary, facts=facts)


def _grid(folder: Path, backbone: Backbone) -> Grid | None:
    if (folder / PIPELINE).is_file():
        height, width = read_json(folder / PIPELINE)["grid"]
        return height, width
    return backbone.default_grid


def _format(backbone: Backbone, grid: Grid | None) -> Check:
    """How an image is written, and whether it fits."""
    layout, findings = backbone.layout, []
    ids = f"ids {min(layout.code_ids):,} to {max(layout.code_ids):,}"
    parts = {"begin": layout.begin, "end": layout.end, "row end": layout.row_end}
    named = [f"{name} {token}" for name, token in parts.items() if token is not None]
    if layout.first_size is not None:
        named.append(f"sizes from {layout.first_size}")
    said = [f"{layout.style}, {len(layout.code_ids):,} codes ({ids})", *named]
    if max(layout.image_vocabulary()) >= backbone.vocab_size:
        what = f"an image token is beyond the {backbone.vocab_size:,} that the model has"
        findings.append(
            Finding("damage", what, "format", remedy="the files do not belong together")
        )
    if grid is None:
        what, remedy = "how large its images are is nowhere said", "name it with --grid"
        findings.append(Finding("note", what, "format", remedy=remedy))
    else:
        said.append(f"{grid[0]} x {grid[1]} codes")
        try:
            room = backbone.room(grid)
            said.append(f"{room:,} of {backbone.max_length:,} tokens left for the prompt")
        except ValueError as error:
            findings.append(Finding("damage", str(error), "format"))
    facts = {"style": layout.style, "codes": len(layout.code_ids), "grid": grid}
    facts |= {"vocabulary": backbone.vocab_size, "max_length": backbone.max_length}
    return Check("format", ", ".join(said), findings, facts)


def _painting(folder: Path, backbone: Backbone) -> Check:
    """Whether it was taught to paint, and how it is set up to."""
    reason, findings = backbone.cannot_paint(), []
    if reason is not None:
        remedy = "teach it with `arra train adapt --model.reset-image-head`"
        what = f"it was never taught to paint: {reason}"
        findings.append(Finding("warning", what, "weights", remedy=remedy))
    described = read_json(folder / PIPELINE) if (folder / PIPELINE).is_file() else {}
    sampling = described.get("sampling", dict(backbone.sampling))
    said = [f"{name.replace('_', '-')} {value}" for name, value in sampling.items()]
    if described.get("trained_vocabulary") == "image":
        said.append("trained with a softmax over the tokens of images only")
    if backbone.text_slots:
        encoder = (described.get("text_encoder") or {}).get("spec", backbone.text_encoder)
        said.append(f"prompted by {backbone.text_slots} features of {encoder}")
    return Check("painting", ", ".join(said), findings, {"sampling": sampling})


def _probes(backbone: Backbone, weights: Check) -> Check:
    """What every model must pass before it trains or paints (models/probes.py)."""
    if weights.status == "damage":
        return unchecked("probes", "its weights are damaged")
    try:
        check(backbone)
    except ValueError as error:
        return Check("probes", "", [Finding("damage", str(error), "model")])
    return Check("probes", "head, taps and cache agree with the model's own forward pass")


def _image_tokenizer(config: ModelCheckConfig, folder: Path, backbone: Backbone | None) -> Check:
    """Whether what turns codes into pixels is there, and the one that it was trained with."""
    name, described = "image tokenizer", {}
    if (folder / PIPELINE).is_file():
        described = read_json(folder / PIPELINE)["image_tokenizer"]
    spec: str | Path = config.image_tokenizer or described.get("spec", folder)
    if config.image_tokenizer is None and (folder / INSIDE).is_dir():
        spec = folder / INSIDE
    try:
        tokenizer = load_image_tokenizer(spec)
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())
        return unchecked(name, f"{said}; name it with --image-tokenizer")
    return Check(name, *_compared(tokenizer, described, backbone, str(spec)))


def _compared(
    tokenizer: ImageTokenizer, described: dict[str, str], backbone: Backbone | None, spec: str
) -> tuple[str, list[Finding]]:
    findings = []
    if "fingerprint" in described and tokenizer.fingerprint != described["fingerprint"]:
        what = f"{spec} is not the one that the model was trained with (its fingerprint differs)"
        findings.append(Finding("damage", what, "image tokenizer", remedy="find the right one"))
    codes = tokenizer.codebook_size
    if backbone is not None and codes != len(backbone.layout.code_ids):
        what = f"{codes:,} codes, the model paints with {len(backbone.layout.code_ids):,}"
        findings.append(Finding("damage", what, "image tokenizer"))
    said = "the one that it was trained with" if "fingerprint" in described else "of that size"
    told = f"{codes:,} codes, {tokenizer.factor} pixels each, {said}"
    return told if not findings else "", findings
