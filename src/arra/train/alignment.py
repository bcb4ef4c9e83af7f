"""What a run is aligned to: the chosen targets, where their values come from, and the objective."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from arra.config import TrainConfig
from arra.cross_entropy import kernel_for
from arra.data.shards import Dataset
from arra.data.targets import TargetValues
from arra.models.base import Backbone
from arra.objective import Objective, Target

ONLINE = "online.json"
"""In the run: what is known of the encoders of --align.online, fingerprints and means."""


def target_names(config: TrainConfig, stored: list[str]) -> tuple[list[str], dict[str, str]]:
    """What is aligned to: names of the dataset's features, and name -> encoder of those that are
    computed while training.

    Args:
        stored: names of all the features and grids that the dataset holds.

    Raises:
        ValueError: a name that is neither, or both; or nothing to align to.
    """
    if config.align.weight == 0:  # the baseline may be probed for what it is not aligned to
        probed = [n for n in stored if not config.align.targets or n in config.align.targets]
        return probed if config.log.probe_every else [], {}
    online = config.align.online_encoders
    for name in set(online) & set(stored):
        raise ValueError(
            f"--align.online {name}: the dataset holds a feature of that name; choose another"
        )
    available = [*stored, *online]
    wanted = list(config.align.targets) or available
    missing = [name for name in wanted if name not in available]
    if missing or not wanted:
        have = ", ".join(available) or "none"
        raise ValueError(
            f"the dataset has no feature {missing[0] if missing else 'to align to'!r} (it has: "
            f"{have}): prepare it with --encoder, or compute it with --align.online, or train the "
            f"baseline with --align.weight 0"
        )
    chosen = {name: online[name] for name in wanted if name in online}
    return [name for name in wanted if name not in online], chosen


def online_targets(
    specs: Mapping[str, str],
    dataset: Dataset,
    held_out: Dataset | None,
    device: torch.device,
    run: Path,
) -> Sequence[Mapping[str, TargetValues]]:
    """Those of train and of val that are computed while training; the one case in which training
    needs encoders.

    Raises:
        ValueError: the pictures are gone, or an encoder is another than the run was begun with.
    """
    if not specs:
        return {}, {}
    from arra.data.online import open_online

    return open_online(specs, dataset, held_out, device, run / ONLINE)


def objective_of(
    config: TrainConfig,
    backbone: Backbone,
    found: Mapping[str, TargetValues],
    device: torch.device,
) -> Objective:
    """The objective for the targets found, on the CPU; `device` is where it will compute.

    Raises:
        ValueError: positions, text or vocabulary that this model does not have.
    """
    align = config.align
    if align.positions == "rep" and backbone.layout.rep is None:
        raise ValueError("--align.positions rep needs --model.rep: the sequence has no such token")
    targets = [
        Target(
            name,
            dim=values.info.dim,
            layers=align.layer,
            weight=align.weight,
            positions=align.positions,
            centred=align.centred,
            kind=values.kind,
        )
        for name, values in found.items()
    ]
    if config.loss.text and backbone.text_tokenizer is None:
        raise ValueError("--loss.text: this model's prompts are no text that it could predict")
    vocabulary = backbone.layout.image_vocabulary() if config.loss.vocab == "image" else None
    writes = config.loss.text or config.data.text
    if writes and any(token >= backbone.vocab_size for token in backbone.opening()):
        raise ValueError(
            f"{type(backbone.model).__name__} paints with a head that knows image codes only: its "
            f"text cannot be trained; leave out --loss.text and --data.text"
        )
    if vocabulary and writes:
        raise ValueError("--loss.vocab image leaves text out of the softmax: it cannot be trained")
    return Objective(
        backbone.hidden_size,
        targets,
        z_loss=config.loss.z,
        vocabulary=vocabulary,
        chunk=config.loss.chunk,
        kernel=kernel_for(
            config.engine.cross_entropy,
            backbone.head,
            device,
            restricted=vocabulary is not None,
            with_z=config.loss.z > 0,
        ),
        seed=config.seed,
    )
