"""`--dtype auto` is decided once, by the processor, and kept when the run is resumed elsewhere."""

from pathlib import Path

import pytest

from arra.files import read_json
from arra.recipes import RECIPES
from arra.train import claim


@pytest.mark.parametrize(("native", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_auto_is_decided_once(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str
) -> None:
    config = RECIPES["scenes"](str(tiny_dataset), str(tmp_path / "run"))
    assert config.dtype == "auto"
    monkeypatch.setattr(claim, "pick_device", lambda device: "cpu")
    monkeypatch.setattr(claim, "cpu_has_bfloat16", lambda: native)
    assert claim.claim(config, tmp_path / "run")[0].dtype == dtype
    assert read_json(tmp_path / "run" / "config.json")["dtype"] == dtype
    monkeypatch.setattr(claim, "cpu_has_bfloat16", lambda: not native)
    assert claim.claim(config, tmp_path / "run")[0].dtype == dtype
