"""The VQ tokenizers that others published: how their files name what `VQModel` is made of.

All of them descend from taming-transformers' VQGAN (arXiv 2012.09841): the same blocks under other
names, so a file is taken over by renaming, and no number changes. Layouts were read from

* FoundationVision/LlamaGen ce98ec4, tokenizer/tokenizer_image/vq_model.py (vq_ds16_c2i,
  vq_ds16_t2i, vq_ds8_c2i): codebook of unit vectors, attention at the coarsest level;
* facebookresearch/chameleon dbbe47f, chameleon/inference/vqgan.py (vqgan.ckpt with vqgan.yaml),
  which is taming-transformers' own;
* huggingface/transformers 5.23, models/janus/modeling_janus.py (JanusVQVAE): LlamaGen's tokenizer
  under taming's names, the decoder's levels in the opposite order.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arra.foreign import Foreign
from arra.image_tokenizers.taming_yaml import read_settings
from arra.image_tokenizers.vq import VQConfig, VQModel


@dataclass(frozen=True)
class Published:
    """One layout of tensor names.

    Attributes:
        name: what `arra convert --to` calls it.
        title: what messages call it.
        down: the part of a name between `encoder.` and a level's number; `up` the decoder's.
        finest_first: the decoder's levels are numbered from the finest, not from the coarsest.
        block: what a residual block's list is called.
        middle: names of the three blocks at the bottom.
        l2_normalize: codes are unit vectors (no tensor says so).
        unused: regular expression of tensors that belong to the layout, though no picture depends
            on them: they are kept beside the weights, for the original's strict loader.
        training: of tensors that only training reads and the original loader ignores: left out.
    """

    name: str
    title: str
    down: str
    up: str
    finest_first: bool
    block: str
    middle: tuple[str, str, str]
    l2_normalize: bool
    unused: str = r"(?!)"
    training: str = r"(?!)"

    def renamed(self, name: str, levels: int) -> str:
        """The name that this layout gives to a parameter of `VQModel`."""
        if name == "codes.weight":
            return "quantize.embedding.weight"
        side, _, rest = name.partition(".")
        level = re.fullmatch(r"levels\.(\d+)\.(.+)", rest)
        if level:
            index, coarsest_first = int(level[1]), side == "decoder"
            if coarsest_first and self.finest_first:
                index = levels - 1 - index
            resize = "upsample" if coarsest_first else "downsample"
            rest = level[2].replace("blocks.", f"{self.block}.", 1)
            rest = rest.replace("attention.", "attn.", 1).replace("resize.", f"{resize}.", 1)
            rest = f"{self.up if coarsest_first else self.down}.{index}.{rest}"
        elif rest.startswith("middle."):
            _, index_, rest = rest.split(".", 2)
            rest = f"{self.middle[int(index_)]}.{rest}"
        rest = rest.replace(".out.", ".proj_out.").replace(".shortcut.", ".nin_shortcut.")
        return f"{side}.{rest}"


LLAMAGEN = Published(
    name="llamagen",
    title="LlamaGen's VQ tokenizer",
    down="conv_blocks",
    up="conv_blocks",
    finest_first=False,
    block="res",
    middle=("mid.0", "mid.1", "mid.2"),
    l2_normalize=True,
    unused=r"quantize\.codebook_used",
)
CHAMELEON = Published(
    name="chameleon",
    title="Chameleon's VQGAN",
    down="down",
    up="up",
    finest_first=True,
    block="block",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    l2_normalize=False,
    training=r"loss\..*",
)
JANUS = Published(
    name="janus",
    title="Janus's VQ tokenizer",
    down="down",
    up="up",
    finest_first=False,
    block="block",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    l2_normalize=True,
)
LAYOUTS = (LLAMAGEN, CHAMELEON, JANUS)

USAGE_SLOTS = 65536
"""Length of LlamaGen's `quantize.codebook_used`, a record of the last codes seen in training."""


@dataclass(frozen=True)
class Parts:
    """A tokenizer taken apart: tensors under `VQModel`'s names, in the types they were stored in.

    `layout` is the published one that they came in, None for our own. `unused` belongs to that
    layout (see `Published.unused`); `dropped` counts what was left out.
    """

    layout: Published | None
    config: VQConfig
    tensors: dict[str, Tensor]
    unused: dict[str, Tensor]
    dropped: int = 0

    def model(self, device: str = "cpu") -> VQModel:
        """The tokenizer, frozen, computing in float32."""
        with torch.device("meta"):  # no time for random weights that would be overwritten
            model = VQModel(self.config)
        copies = {n: t.to(torch.float32, copy=True) for n, t in self.tensors.items()}
        model.load_state_dict(copies, assign=True)
        return model.eval().requires_grad_(False).to(torch.device(device))


def layout_of(names: Collection[str]) -> Published | None:
    """The published layout that tensor names are in, None if in none."""
    if "encoder.conv_blocks.0.res.0.conv1.weight" in names:
        return LLAMAGEN
    if "encoder.down.0.block.0.conv1.weight" in names:
        # The finest level is the one that is not enlarged any more.
        return JANUS if "decoder.up.0.upsample.conv.weight" in names else CHAMELEON
    return None


def from_original(foreign: Foreign) -> Parts:
    """A published file, taken over.

    Raises:
        ValueError: another family's file, missing or misshapen tensors, an unreadable or
            unsupported vqgan.yaml.
    """
    names, path = foreign.tensors, foreign.path
    layout = layout_of(names)
    if layout is None:
        if any(INSIDE.match(name) for name in names):
            raise ValueError(
                f"{path}: expected an image tokenizer, found a whole model in transformers' "
                f"format: name its folder"
            )
        raise ValueError(
            f"{path}: expected an image tokenizer ({LLAMAGEN.title} with tensors such as "
            f"encoder.conv_blocks.0.res.0.conv1.weight, or {CHAMELEON.title} with "
            f"encoder.down.0.block.0.conv1.weight), found {len(names)} tensors such as "
            f"{', '.join(sorted(names)[:2])}"
        )
    if layout is CHAMELEON:
        return _taken(layout, names, read_settings(path.with_suffix(".yaml")), path)
    options = foreign.beside.get("args")
    options = options if isinstance(options, dict) else {}
    if options.get("codebook_l2_norm", True) is not True:
        raise ValueError(f"{path} was trained without --codebook-l2-norm, which is not supported")
    config = _measured(layout, names, path)
    config.image_size = int(options.get("image_size", config.image_size))
    return _taken(layout, names, config, path)


INSIDE = re.compile(r"(model\.)?vqmodel\.")
"""Where transformers' multimodal models keep their image tokenizer."""


def from_transformers(
    tensors: Mapping[str, Tensor], vq_config: Mapping[str, Any], path: Path
) -> Parts:
    """The image tokenizer inside a multimodal checkpoint of transformers.

    Janus has all of it. Its codes are looked up between unit vectors here, as in deepseek-ai/Janus
    (janus/models/vq_model.py); transformers' own `JanusVQVAE.encode` compares vectors of any length
    and may choose other codes. Decoding is the same in both.

    Args:
        tensors: those under `model.vqmodel.`, by the names inside it.
        vq_config: `vq_config` of its config.json.
        path: named in errors.

    Raises:
        ValueError: there is no decoder (Chameleon), or tensors are missing.
    """
    if not any(name.startswith("decoder.") for name in tensors):
        raise ValueError(
            f"{path}: expected an image tokenizer with a decoder, found the encoder alone, which "
            f"is all that Chameleon has in transformers' format: the decoder comes from vqgan.ckpt "
            f"with vqgan.yaml in the tokenizer folder of Meta's own download; name that folder"
        )
    layout = layout_of(tensors) or JANUS
    config = _measured(layout, tensors, path)
    config.image_size = int(
        vq_config.get("resolution", vq_config.get("num_patches", 16) * config.factor())
    )
    return _taken(layout, tensors, config, path)


def to_original(
    layout: Published,
    config: VQConfig,
    tensors: Mapping[str, Tensor],
    unused: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Tensors under the names of a published layout: the reverse of `from_original`.

    Raises:
        ValueError: the tokenizer has a shape that the original code cannot build.
    """
    levels = len(config.channel_multipliers)
    blocks = config.decoder_res_blocks
    wrong = {
        "patch_size": config.patch_size != 1,
        "norm": config.norm != "group",
        "norm_groups": config.norm_groups != 32,
        "encoder_kernel": config.encoder_kernel != 3,
        "decoder_res_blocks": blocks not in (None, config.res_blocks + 1),
        "l2_normalize": config.l2_normalize != layout.l2_normalize,
        "attention_levels": layout is not CHAMELEON
        and list(config.attention_levels) != [levels - 1],
        "middle_attention": not config.middle_attention
        and (layout is not CHAMELEON or bool(config.attention_levels)),
    }
    named = [f"{name} {getattr(config, name)}" for name, is_wrong in wrong.items() if is_wrong]
    if named:
        raise ValueError(f"{layout.title} cannot have {', '.join(named)}: it stays in our layout")
    original = {layout.renamed(name, levels): tensor for name, tensor in tensors.items()}
    if layout is LLAMAGEN and "quantize.codebook_used" not in unused:
        # The original's strict loader wants it; a new model there starts with zeros.
        original["quantize.codebook_used"] = torch.zeros(USAGE_SLOTS)
    return {**original, **unused}


# ---- sizes ---------------------------------------------------------------------------------------


def _taken(layout: Published, given: Mapping[str, Tensor], config: VQConfig, path: Path) -> Parts:
    """Renames, and compares every name and shape with what the model needs."""
    with torch.device("meta"):
        needed = VQModel(config).state_dict()
    levels = len(config.channel_multipliers)
    names = {layout.renamed(name, levels): name for name in needed}
    unused = {n: t for n, t in given.items() if re.fullmatch(layout.unused, n)}
    dropped = [n for n in given if re.fullmatch(layout.training, n)]
    found = given.keys() - unused.keys() - set(dropped)
    missing, unknown = sorted(names.keys() - found), sorted(found - names.keys())
    if missing:
        raise ValueError(
            f"{path}: expected the {len(names)} tensors of {layout.title}, found {len(missing)} of "
            f"them missing, such as {missing[0]}"
        )
    if unknown:
        raise ValueError(
            f"{path}: expected the tensors of {layout.title} and no others, found {len(unknown)} "
            f"more, such as {unknown[0]}"
        )
    for name, ours in names.items():
        if given[name].shape != needed[ours].shape:
            raise ValueError(
                f"{path}: expected {name} of shape {tuple(needed[ours].shape)}, found "
                f"{tuple(given[name].shape)}"
            )
    tensors = {ours: given[name] for name, ours in names.items()}
    return Parts(layout, config, tensors, unused, len(dropped))


def _measured(layout: Published, tensors: Mapping[str, Tensor], path: Path) -> VQConfig:
    """The sizes, from the tensors' own shapes."""

    def width(name: str) -> int:
        if name not in tensors:
            raise ValueError(f"{path}: expected {layout.title}, found no tensor {name}")
        return tensors[name].shape[0]

    def count(pattern: str) -> int:
        return next(i for i in range(len(tensors) + 1) if pattern.format(i) not in tensors)

    inner = f"{layout.block}.0.conv2.weight"
    level = f"encoder.{layout.down}"
    base = width("encoder.conv_in.weight")
    levels = count(level + ".{}." + inner)
    widths = [width(f"{level}.{index}.{inner}") for index in range(levels)]
    if not levels or any(channels % base for channels in widths):
        raise ValueError(f"{path}: expected widths that are multiples of {base}, found {widths}")
    codebook = tensors.get("quantize.embedding.weight", torch.empty(0))
    if codebook.ndim != 2:
        raise ValueError(f"{path}: expected a codebook, quantize.embedding.weight, found none")
    return VQConfig(
        base_channels=base,
        channel_multipliers=[channels // base for channels in widths],
        res_blocks=count(f"{level}.0.{layout.block}.{{}}.conv2.weight"),
        attention_levels=[
            index for index in range(levels) if f"{level}.{index}.attn.0.q.weight" in tensors
        ],
        middle_attention=f"encoder.{layout.middle[1]}.q.weight" in tensors,
        z_channels=width("encoder.conv_out.weight"),
        codebook_size=codebook.shape[0],
        codebook_dim=codebook.shape[1],
        l2_normalize=layout.l2_normalize,
    )
