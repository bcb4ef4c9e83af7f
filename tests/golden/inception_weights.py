"""Weights and pictures by formula for the Inception network, and what others make of them.

Recorded with torch-fidelity, clean-fid's resize.py and TensorFlow, in environments of their own:

    python tests/golden/inception_weights.py torch-fidelity
    python tests/golden/inception_weights.py clean-fid PATH/TO/cleanfid/resize.py
    python tests/golden/inception_weights.py tensorflow

Each prints its part of inception.json.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from formula import fill, ints

PERIOD = 16381
"""Values that are drawn for a tensor before they repeat: a prime, so that no filter repeats."""
SIDES = (64, 256, 299, 347)
EVERY, EVERY_PIXEL = 97, 4999
"""Of the values of a stream, or of a resized picture, in order: those that are kept."""
FILE = Path(__file__).with_name("inception.json")


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Float32 values that keep the network's activations at about 1 through all of its layers."""
    count = int(np.prod(shape, dtype=np.int64))
    drawn = fill(name, (min(count, PERIOD),), 1.0)
    values = drawn.repeat(-(-count // PERIOD))[:count].view(shape)
    if name.endswith("conv.weight"):
        return values * (2.0 / np.prod(shape[1:])) ** 0.5
    if name == "fc.weight":
        return values * 0.1
    if name.endswith("bn.weight"):
        return 1 + 0.1 * values
    return 1 + 0.1 * values.abs() if name.endswith("running_var") else 0.1 * values


def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Of all tensors but the counters."""
    return {
        name: weight(name, tuple(shape))
        for name, shape in shapes.items()
        if not name.endswith("num_batches_tracked")
    }


def pixels(side: int, count: int = 2) -> np.ndarray:
    """uint8 (count, side, side, 3): soft shapes with noise, so that filters differ by little."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    waves = [
        np.sin(9 * rows * (c + 1) + 5 * columns + np.arange(count)[:, None, None]) for c in range(3)
    ]
    noise = ints(f"inception.pixels.{side}", (count, side, side, 3), 64).numpy()
    return (96 + 90 * np.stack(waves, -1) * 0.9 + noise).clip(0, 255).astype(np.uint8)


def kept(values, every: int = EVERY) -> list[list[float]]:
    """Every so manyth value of each picture, to eight digits."""
    flat = np.asarray(values, np.float64).reshape(len(values), -1)[:, ::every]
    return [[float(f"{v:.8g}") for v in row] for row in flat]


def of_torch_fidelity() -> dict:
    import importlib.util
    import types

    # The package's own __init__ needs torchvision, which its Inception does not use: pass it by.
    spec = importlib.util.find_spec("torch_fidelity")
    package = types.ModuleType("torch_fidelity")
    package.__path__ = spec.submodule_search_locations
    sys.modules["torch_fidelity"] = package
    import torch_fidelity.feature_extractor_inceptionv3 as original
    from torch_fidelity.interpolate_compat_tensorflow import (
        interpolate_bilinear_2d_like_tensorflow1x as resized,
    )
    from torch_fidelity.version import __version__

    class Blank(original.FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            """Nothing is read when it is made."""

    original.load_state_dict_from_url = lambda *_, **__: {}
    network = Blank("inception", ["2048", "logits_unbiased"])
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    torch.nn.Module.load_state_dict(network, weights(shapes), strict=False)
    spatial = []
    network.Mixed_6d.branch1x1.register_forward_hook(
        lambda _, __, out: spatial.append(out[:, :7].permute(0, 2, 3, 1).flatten(1))
    )
    found = {
        "source": f"torch-fidelity {__version__}, torch {torch.__version__}",
        "shapes": {n: list(s) for n, s in shapes.items()},
    }
    for side in SIDES:
        batch = torch.from_numpy(pixels(side)).permute(0, 3, 1, 2)
        spatial.clear()
        features, logits = network(batch)
        small = resized(batch.float(), (299, 299), align_corners=False)
        found[str(side)] = {
            "resized": kept((small - 128) / 128, EVERY_PIXEL),
            "features": kept(features),
            "spatial": kept(spatial[0]),
            "logits": kept(logits),
        }
    return found


def of_clean_fid(path: str) -> dict:
    import importlib.util

    import PIL

    spec = importlib.util.spec_from_file_location("cleanfid_resize", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {"source": f"clean-fid e88c4d6 cleanfid/resize.py, Pillow {PIL.__version__}"}
    for mode in ("clean", "legacy_pytorch"):
        resize = module.build_resizer(mode)
        found[mode] = {
            str(side): kept(
                np.stack([resize(each).transpose(2, 0, 1) for each in pixels(side)]), EVERY_PIXEL
            )
            for side in SIDES
        }
    return found


def of_tensorflow() -> dict:
    import tensorflow as tf

    found = {"source": f"tf.compat.v1.image.resize_bilinear of TensorFlow {tf.__version__}"}
    for side in SIDES:
        small = tf.compat.v1.image.resize_bilinear(
            pixels(side).astype(np.float32),
            (299, 299),
            align_corners=False,
            half_pixel_centers=False,
        )
        found[str(side)] = kept(small.numpy().transpose(0, 3, 1, 2), EVERY_PIXEL)
    return found


if __name__ == "__main__":
    parts = {
        "torch-fidelity": of_torch_fidelity,
        "clean-fid": of_clean_fid,
        "tensorflow": of_tensorflow,
    }
    print(json.dumps({sys.argv[1]: parts[sys.argv[1]](*sys.argv[2:])}))
