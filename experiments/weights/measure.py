"""What smaller weights cost: each arm against the weights as they are stored, on held-out scenes.

    python experiments/weights/measure.py --demo runs/demo --out runs/weights

`--demo`: a folder of `arra demo`, for its aligned painter and its data. Resumable: every arm is one
file in --out. Ends with results.json there.

Legend: N images, P places of image codes in a batch, K codes.
"""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arra.data.loader import Loader
from arra.data.shards import open_dataset
from arra.evaluate.intervals import bootstrap_mean
from arra.evaluate.scenes import scene_verdicts
from arra.files import read_json, write_json
from arra.generate.pipeline import Pipeline
from arra.models import quantized
from arra.models.base import Backbone
from arra.study.prompts import prompts_of
from arra.study.statistics import paired_difference

FULL = "as stored"
ARMS = ("bfloat16", "int8", "int4", "fp8")
UNPAINTED = (
    "int4, groups of 32",
    "int4, groups of 128",
    "int8 + head",
    "int4 + head in int8",
)
IMAGES, CAPTIONS, SLOTS, BATCH = 256, 256, 128, 32


def arm_of(full: Backbone, arm: str) -> Backbone:
    """A copy of the painter with the weights of an arm, in bfloat16."""
    made = copy.deepcopy(full)
    if arm == FULL:
        return made
    made.model.bfloat16()
    kind, _, group = arm.partition(", groups of ")
    kind = kind.partition(" + ")[0]
    if kind != "bfloat16":
        quantized.GROUP = quantized.INPUTS["int4"] = int(group or 64)
        quantized.quantize_weights(made, kind)
    if "head" in arm:
        made.head = quantized.Int8Linear(made.head)
    return made


def fp8_on_a_cpu() -> None:
    """Lets fp8 through here: PyTorch has its products on a CPU too, for tests."""
    from torchao.quantization import quant_api

    quant_api._check_hardware_support = lambda granularity: None
    quantized._check_device = lambda *_: None
    own = quantized._smaller
    quantized._smaller = lambda layer, kind: (
        quantized.rounded(layer, kind) if kind == "fp8" else own(layer, kind)
    )


@torch.inference_mode()
def distributions(backbone: Backbone, data: Path) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Log-probabilities (P, K) of the codes at image places, the codes (P,), the images (P,)."""
    dataset = open_dataset(data, "test", features=())
    loader = Loader(dataset, backbone, batch_size=BATCH, seed=0)
    codes_K = torch.tensor(backbone.layout.code_ids)
    index_of = torch.full((backbone.vocab_size,), -1)
    index_of[codes_K] = torch.arange(len(codes_K))
    for number, micro in enumerate(loader.in_order(IMAGES)):
        batch = micro.batch
        hidden_BTD = backbone.last_hidden(batch.ids_BT, micro.text)
        code_N = index_of[batch.labels_N]
        places_P = batch.trained_N[code_N >= 0]
        logits_PV = backbone.head(hidden_BTD.flatten(0, 1)[places_P]).float()
        image_P = places_P // batch.ids_BT.shape[1] + number * BATCH
        yield logits_PV[:, codes_K].log_softmax(-1), code_N[code_N >= 0], image_P


def by_image(value_P: Tensor, image_P: Tensor) -> list[float]:
    first = int(image_P.min())
    row_P = image_P - first
    total = torch.zeros(int(row_P.max()) + 1, dtype=torch.float64)
    total.index_add_(0, row_P, value_P.double())
    return (total / torch.bincount(row_P)).tolist()


def told(full: Backbone, arm: Backbone, data: Path) -> dict[str, list[float]]:
    """By image: the loss of its codes, and KL(full, arm) of what was foretold at each."""
    losses: list[float] = []
    kl: list[float] = []
    both = zip(distributions(full, data), distributions(arm, data), strict=True)
    for (full_PK, _, _), (arm_PK, code_P, image_P) in both:
        losses += by_image(-arm_PK.gather(1, code_P[:, None])[:, 0], image_P)
        kl += by_image((full_PK.exp() * (full_PK - arm_PK)).sum(-1), image_P)
    return {"loss": losses, "kl": kl}


def paint(pipe: Pipeline, backbone: Backbone, captions: list[str]) -> dict[str, list]:
    pipe.backbone = backbone
    codes_Nhw = pipe.codes(captions, seeds=list(range(len(captions))), slots=SLOTS)
    images = [
        image.permute(1, 2, 0).numpy()
        for part in codes_Nhw.split(64)
        for image in pipe.decode(part)
    ]
    right_N = scene_verdicts(images, captions)["all_right"]
    return {"all_right": right_N.tolist(), "codes": codes_Nhw.flatten(1).tolist()}


def measure(name: str, pipe: Pipeline, data: Path, captions: list[str], out: Path) -> dict:
    full, found = pipe.backbone, {}
    for arm in (FULL, *ARMS, *UNPAINTED):
        file = out / f"{name} {arm}.json"
        if not file.exists():
            try:
                backbone = arm_of(full, arm)
            except ValueError as error:
                print(f"{name} {arm}: {error}", flush=True)
                continue
            told_of = told(full, backbone, data)
            painted = {} if arm in UNPAINTED else paint(pipe, backbone, captions)
            pipe.backbone = full
            write_json(file, told_of | painted)
        found[arm] = read_json(file)
        print(f"{name} {arm}: done", flush=True)
    return {arm: summary(found[FULL], values) for arm, values in found.items()}


def summary(full: dict, arm: dict) -> dict:
    said = {
        "loss": bootstrap_mean(np.array(arm["loss"])).to_json(),
        "loss_difference": paired_difference(
            np.array(full["loss"]), np.array(arm["loss"])
        ).to_json(),
        "kl": bootstrap_mean(np.array(arm["kl"])).to_json(),
    }
    if "codes" in arm:
        right = np.array(arm["all_right"], float)
        said["all_right"] = bootstrap_mean(right, proportion=True).to_json()
        difference = paired_difference(np.array(full["all_right"], float), right)
        said["all_right_difference"] = difference.to_json()
        same = np.array(full["codes"]) == np.array(arm["codes"])
        said["same_pictures"], said["same_codes"] = float(same.all(1).mean()), float(same.mean())
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    fp8_on_a_cpu()
    asked.out.mkdir(parents=True, exist_ok=True)
    data = asked.demo / "data"
    captions = list(prompts_of(data, "test").texts[:CAPTIONS])
    painters = {"demo": asked.demo / "aligned" / "export", "builtin:scenes": "builtin:scenes"}
    made_by = read_json(data / "manifest.json")["tokenizer"]["fingerprint"]
    results = {}
    for name, spec in painters.items():
        pipe = Pipeline.from_pretrained(spec, dtype="float32")
        if pipe.image_tokenizer.fingerprint != made_by:
            raise ValueError(f"{name} paints with other codes than {data} holds: run the demo anew")
        results[name] = measure(name.replace(":", " "), pipe, data, captions, asked.out)
    write_json(asked.out / "results.json", results)


if __name__ == "__main__":
    main()
