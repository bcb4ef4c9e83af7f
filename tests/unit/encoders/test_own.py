"""A user's own encoder: what it may be, and what is refused."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from arra.encoders import load_encoder

GOOD = """
import torch
from PIL import Image


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 5)
        self.linear.weight.data = torch.arange(60.0).view(5, 12) / 60

    def forward(self, pixels):
        return self.linear(pixels.flatten(1))


def pixels(image):
    small = image.resize((2, 2), Image.Resampling.BOX)
    return torch.tensor(list(small.tobytes())).view(2, 2, 3).permute(2, 0, 1) / 255


def encoder():
    torch.manual_seed(0)
    return Tiny(), pixels


value = 3


def number():
    return 3


def flat():
    return torch.nn.Identity(), pixels


def nan():
    model = Tiny()
    model.linear.bias.data.fill_(float("nan"))
    return model, pixels


class Mixing(Tiny):
    def forward(self, pixels):
        return super().forward(pixels - pixels.mean(dim=0))


def mixing():
    return Mixing(), pixels
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    name = "arra_test_own"
    (tmp_path / f"{name}.py").write_text(GOOD)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path / f"{name}.py"
    sys.modules.pop(name, None)


def test_is_an_encoder_as_any_other(module):
    encoder = load_encoder("arra_test_own:encoder")
    assert (encoder.name, encoder.pooling, encoder.dim) == ("arra_test_own-encoder", "own", 5)
    images = [Image.new("RGB", (9, 7), c) for c in ("red", "navy")]
    features = encoder(images)
    assert features.shape == (2, 5)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    assert not encoder.model.training
    pixels = encoder.preprocess(images).requires_grad_()
    encoder.pool(pixels).sum().backward()
    assert pixels.grad is not None
    again = load_encoder(encoder.spec, encoder.pooling)
    assert again.fingerprint == encoder.fingerprint


def test_fingerprint_follows_the_source(module):
    first = load_encoder("arra_test_own:encoder").fingerprint
    module.write_text(GOOD.replace("BOX", "BICUBIC"))
    sys.modules.pop("arra_test_own")
    importlib.invalidate_caches()
    assert load_encoder("arra_test_own:encoder").fingerprint != first


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("arra_test_own:encoder@mean", "pools by itself: leave out 'mean'"),
        ("arra_test_own:absent", "has no function 'absent'"),
        ("arra_test_own:value", "has no function 'value'"),
        ("arra_test_own:number", r"must give \(torch.nn.Module, .*not a int"),
        ("arra_test_own:flat", r"must give features \(2, D\), not a tensor \(2, 3, 2, 2\)"),
        ("arra_test_own:nan", "not all finite"),
        ("arra_test_own:mixing", "change with the images beside it"),
        ("arra_test_missing:encoder", "finds no module 'arra_test_missing'.*PYTHONPATH"),
    ],
)
def test_refusals(module, spec, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(spec)


def test_a_folder_goes_before_a_module(module, tmp_path, monkeypatch):
    (tmp_path / "arra_test_own:encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_encoder("arra_test_own:encoder")


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    text = (Path(__file__).parents[3] / "docs" / "encoders.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) <= 15

    class Retina(torch.nn.Linear):
        def __init__(self, width):
            super().__init__(3, width)

        def forward(self, pixels):
            return super().forward(pixels.mean(dim=(2, 3)))

    nets = ModuleType("my_lab.nets")
    nets.Retina = Retina
    monkeypatch.setitem(sys.modules, "my_lab", ModuleType("my_lab"))
    monkeypatch.setitem(sys.modules, "my_lab.nets", nets)
    save_file(Retina(384).state_dict(), tmp_path / "w.safetensors")
    code = code.replace("/data/retina.safetensors", str(tmp_path / "w.safetensors"))
    (tmp_path / "arra_test_retina.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    encoder = load_encoder("arra_test_retina:encoder")
    assert encoder([Image.new("RGB", (30, 20))]).shape == (1, 384)
