"""`arra generate`: prompts to a folder of pictures that can be stopped and gone on with."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from arra.data.images import grid
from arra.data.progress import Meter
from arra.device import pick_device
from arra.files import atomic_write, read_json, write_json
from arra.generate.captions import EncodedPrompts
from arra.generate.pipeline import Pipeline
from arra.generate.settings import GenerateConfig, Sampling, Speculation
from arra.models import Backbone, native
from arra.models.quantized import plain_tensors
from arra.teachers import painter_of, told_by

SETTINGS, LISTING, SHEET = "settings.json", "images.jsonl", "grid.png"
SHEET_LIMIT = 64
"""Pictures on the contact sheet: the first ones."""
SHEET_COLUMNS = 8
NOT_COMPARED = ("model", "painter", "ran_on")
"""Settings that may differ when a folder is gone on with: a model may move (its weights are
compared) and so may the work."""


@dataclass(frozen=True)
class _Picture:
    """One picture of the folder."""

    file: str
    prompt: str
    seed: int


def generate(config: GenerateConfig) -> Path:
    """Paints every prompt `num` times into `out`; returns `out`.

    Pictures are `<prompt number>-<image number>.png`, both from 0. images.jsonl (one line per
    picture: file, prompt, seed, sampling) and grid.png appear when all are finished. The same
    command again paints only what is missing.

    Raises:
        ValueError: no or bad prompts, a model that cannot be opened, or an `out` that was painted
            with other settings.
    """
    prompts = read_prompts(config)
    pipe, sampling = open_painter(config)
    out = Path(config.out)
    _claim(out, settings_of(config, pipe, sampling, prompts))
    digits = max(len(str(config.num - 1)), 1)
    pictures = [
        _Picture(f"{i:05d}-{j:0{digits}d}.png", prompt, config.seed + j)
        for i, prompt in enumerate(prompts)
        for j in range(config.num)
    ]
    missing = [picture for picture in pictures if not (out / picture.file).exists()]
    if missing:
        note = None if config.speculate == "off" else lambda: str(pipe.tally)
        with Meter("paint", len(pictures), len(pictures) - len(missing), note) as meter:
            _paint(pipe, missing, sampling, config.slots, out, meter)
    _finish(out, pictures, sampling, config.num)
    return out


def open_painter(config: GenerateConfig) -> tuple[Pipeline, Sampling]:
    """The pipeline that a config asks for, and how it is to draw.

    Raises:
        ValueError: a model that cannot be opened.
    """
    device = torch.device(pick_device(config.device))
    if config.threads:
        torch.set_num_threads(config.threads)
    pipe = Pipeline.from_pretrained(
        config.model,
        device,
        config.image_tokenizer,
        text_encoder=config.text_encoder,
        grid=config.grid,
        published_format=config.format,
        dtype=config.dtype,
        quantization=config.quantization,
    )
    sampling = pipe.sampling.with_changes(
        config.cfg, config.temperature, config.top_k, config.top_p, config.cfg_interval
    )
    pipe.compiled = config.compile
    pipe.speculation = Speculation(config.speculate, config.window, config.adaptive_window)
    return pipe, sampling


def _paint(
    pipe: Pipeline,
    pictures: list[_Picture],
    sampling: Sampling,
    slots: int,
    out: Path,
    meter: Meter,
) -> None:
    prompts, seeds = [p.prompt for p in pictures], [p.seed for p in pictures]
    requests = pipe.requests(prompts, seeds, sampling)
    pipe.release_text_encoder()
    for index, image in pipe.pictures(requests, slots):
        with atomic_write(out / pictures[index].file) as temporary:
            image.save(temporary, format="PNG")
        meter.add(1)


def _finish(out: Path, pictures: list[_Picture], sampling: Sampling, num: int) -> None:
    """Writes the list and the contact sheet."""
    lines = [json.dumps(asdict(p) | sampling.to_json(), ensure_ascii=False) for p in pictures]
    with atomic_write(out / LISTING) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    shown = pictures[:SHEET_LIMIT]
    images = []
    for picture in shown:
        with Image.open(out / picture.file) as opened:
            images.append(opened.convert("RGB"))
    columns = min(num, SHEET_LIMIT) if num > 1 else SHEET_COLUMNS
    sheet = grid(images, columns, [picture.prompt for picture in shown])
    with atomic_write(out / SHEET) as temporary:
        sheet.save(temporary, format="PNG")


# ---- settings ------------------------------------------------------------------------------------


def settings_of(
    config: GenerateConfig, pipe: Pipeline, sampling: Sampling, prompts: Sequence[str]
) -> dict[str, Any]:
    """Everything that decides the pictures, and where they were painted."""
    return {
        "model": config.model,
        "weights": weights_sha256(pipe.backbone),
        "painter": told_by(painter_of(config.model)),
        "image_tokenizer": pipe.image_tokenizer.fingerprint,
        "grid": list(pipe.grid),
        "wording": pipe.backbone.layout.wording,
        "text_encoder": _text_encoder(pipe),
        "num": config.num,
        "seed": config.seed,
        **sampling.to_json(),
        "slots": config.slots,
        "compile": config.compile,
        "quantization": config.quantization,
        "speculate": config.speculate,
        "window": pipe.speculation.width,
        "adaptive_window": config.adaptive_window,
        "prompts": list(prompts),
        "ran_on": {
            "device": str(pipe.backbone.device),
            "dtype": str(pipe.backbone.model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "native": native.serves(pipe.backbone.output_table.weight),  # type: ignore[arg-type]
        },
    }


def _text_encoder(pipe: Pipeline) -> str | None:
    features = pipe.prompt_features
    return features.identity if isinstance(features, EncodedPrompts) else None


def weights_sha256(backbone: Backbone) -> str:
    """SHA-256 of a model's weights, names and shapes included."""
    total = hashlib.sha256()
    for name, tensor in sorted(plain_tensors(backbone.model)):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Makes `out` the folder of these settings, or refuses it."""
    file = out / SETTINGS
    if not any(
        out.glob("*.png")
    ):  # settings that painted nothing, for a mistake in them, bind none
        write_json(file, settings)
        return
    if not file.exists():
        raise ValueError(
            f"{out} holds pictures but no {SETTINGS}: choose another --out or remove them"
        )
    before = read_json(file)
    changed = [
        name for name in settings if name not in NOT_COMPARED and before.get(name) != settings[name]
    ]
    if changed:
        said = ", ".join(_change(name, before.get(name), settings[name]) for name in changed)
        raise ValueError(
            f"{out} was painted with other settings ({said}): choose another --out or remove it"
        )


def _change(name: str, before: Any, now: Any) -> str:
    if name in ("weights", "image_tokenizer", "text_encoder"):
        said = {"weights": "the model's weights", "image_tokenizer": "--image-tokenizer"}
        return said.get(name, "--text-encoder")
    if name in ("prompts", "wording"):
        return {"prompts": "the prompts", "wording": "how prompts are worded"}[name]
    return f"--{name.replace('_', '-')}: {before} -> {now}"


# ---- prompts -------------------------------------------------------------------------------------


def read_prompts(config: GenerateConfig) -> list[str]:
    """The prompts of the command line, then those of the file.

    Raises:
        ValueError: there are none, one is empty, or the file cannot be read as text or JSON.
    """
    prompts = list(config.prompts)
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise ValueError(f"prompt {number} is empty: say what to paint")
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompt {number} is not UTF-8: set a UTF-8 locale") from None
    if config.prompts_file is not None:
        prompts += _from_file(Path(config.prompts_file))
    if not prompts:
        raise ValueError('nothing to paint: give a prompt in quotes ("a red circle") or --prompts')
    return prompts


def prompt_files(folder: Path) -> dict[str, str]:
    """{name: prompt} of a folder of NAME.txt, one prompt in each (DPG-Bench's form), by name.

    Raises:
        ValueError: there is none, or one is empty or not UTF-8.
    """
    prompts = {}
    for file in sorted(folder.glob("*.txt")):
        try:
            prompts[file.stem] = " ".join(file.read_bytes().decode("utf-8-sig").split())
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 (byte {error.start}): convert it") from None
        if not prompts[file.stem]:
            raise ValueError(f"{file} is empty: write its prompt into it")
    if not prompts:
        raise ValueError(f"{folder} is a folder without prompts: it needs files NAME.txt")
    return prompts


def _from_file(file: Path) -> list[str]:
    if file.is_dir():
        return list(prompt_files(file).values())
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"--prompts {file}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompts {file} is not UTF-8 (byte {error.start}): convert it first"
        ) from None
    # Not splitlines: it would also cut at separators that JSON strings may hold.
    lines = [line.rstrip("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"--prompts {file} is empty: write one prompt per line")
    read = _from_json if file.suffix == ".jsonl" else str
    prompts = []
    for number, line in enumerate(lines, start=1):
        prompt = read(line)
        if not isinstance(prompt, str) or not prompt.strip():
            wanted = 'a JSON object with "prompt"' if read is _from_json else "a prompt"
            raise ValueError(f"--prompts {file} line {number} is not {wanted}: correct it")
        prompts.append(prompt)
    return prompts


def _from_json(line: str) -> Any:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return value.get("prompt", value.get("text")) if isinstance(value, dict) else None
