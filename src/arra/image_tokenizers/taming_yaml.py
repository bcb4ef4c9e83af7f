"""The settings file that goes with a checkpoint of taming-transformers' VQGAN (vqgan.yaml)."""

from pathlib import Path
from typing import Any

import yaml

from arra.image_tokenizers.layers import VQConfig

ONLY = {
    **{"in_channels": 3, "out_ch": 3, "resamp_with_conv": True, "double_z": False},
    **{"give_pre_end": False, "tanh_out": False, "use_linear_attn": False},
}
"""Settings of taming's `ddconfig` that change what is computed, and the values we compute."""


def read_settings(path: Path) -> VQConfig:
    """The sizes in a vqgan.yaml: `model.params` holds n_embed, embed_dim and ddconfig.

    Raises:
        ValueError: it is missing, says something else, or asks for what `VQModel` does not compute.
    """
    if not path.is_file():
        raise ValueError(
            f"{path.parent}: expected {path.name} beside the checkpoint of that name, which says "
            f"how it is built, found none: it lies in the same folder of the download"
        )
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        params = read["model"]["params"]
        sizes = params["ddconfig"]
        multipliers = [int(multiplier) for multiplier in sizes["ch_mult"]]
        vanilla = sizes.get("attn_type", "vanilla") == "vanilla"
        attended = [int(side) for side in sizes["attn_resolutions"]] if vanilla else []
        config = VQConfig(
            image_size=int(sizes["resolution"]),
            base_channels=int(sizes["ch"]),
            channel_multipliers=multipliers,
            res_blocks=int(sizes["num_res_blocks"]),
            attention_levels=[
                level
                for level in range(len(multipliers))
                if int(sizes["resolution"]) // 2**level in attended
            ],
            middle_attention=vanilla,
            z_channels=int(sizes["z_channels"]),
            codebook_size=int(params["n_embed"]),
            codebook_dim=int(params["embed_dim"]),
            dropout=float(sizes.get("dropout", 0.0)),
        )
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path}: expected a VQGAN's settings under model.params (n_embed, embed_dim, "
            f"ddconfig), found otherwise: {reason}"
        ) from None
    other = {key: sizes[key] for key, value in ONLY.items() if sizes.get(key, value) != value}
    if sizes.get("attn_type", "vanilla") not in ("vanilla", "none"):
        other["attn_type"] = sizes["attn_type"]
    if params.get("remap") is not None:
        other["remap"] = params["remap"]
    if other:
        raise ValueError(f"{path} asks for {other}, which is not supported")
    return config


def settings_text(config: VQConfig) -> str:
    """The vqgan.yaml that goes with a vqgan.ckpt."""
    sizes: dict[str, Any] = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": config.image_size,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.base_channels,
        "ch_mult": list(config.channel_multipliers),
        "num_res_blocks": config.res_blocks,
        "attn_resolutions": [config.image_size // 2**level for level in config.attention_levels],
        "dropout": config.dropout,
    }
    if not config.middle_attention:
        sizes["attn_type"] = "none"
    params = {"embed_dim": config.codebook_dim, "n_embed": config.codebook_size, "ddconfig": sizes}
    return yaml.safe_dump({"model": {"params": params}}, sort_keys=False)
