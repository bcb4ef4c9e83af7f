"""Stock servers: what an exported folder holds for them, and the client, against a stand-in server.

The exports that are opened by plain transformers here were painted by a real vLLM too, by hand:
docs/stock-servers.md says which, and how.
"""

import json
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from stand_in_server import StandIn, as_it_is, serving
from tiny_exports import GRID, SERVED, export
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from arra import Pipeline
from arra.integrations.stock_server import ServedPainter
from arra.models.loading import read_skeleton
from arra.models.served import UNUSED_PARTS

PROMPTS = ["a red circle", "two blue squares", ""]

# vLLM 0.32.0, model_executor/models/registry.py: its own layers, and transformers' layers run by
# vLLM. Chameleon is in neither table: as any class of transformers whose attention can be replaced,
# it is run in the second way.
OWN = {
    *("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
}
BY_TRANSFORMERS = {
    *("SmolLM3ForCausalLM", "Emu3ForConditionalGeneration", "ChameleonForConditionalGeneration"),
}

STRANGER = """
import json, sys
import torch, transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers import AutoTokenizer

def causal(folder):
    kind = AutoConfig.from_pretrained(folder).architectures[0]
    if kind.startswith("Chameleon"):  # as vLLM runs it: the layers, then the output table
        body, table = AutoModel.from_pretrained(folder), load_file(folder + "/model.safetensors")
        return lambda ids: body(input_ids=ids).last_hidden_state @ table["lm_head.weight"].T
    auto = AutoModelForImageTextToText if "Conditional" in kind else AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    return lambda ids: model(input_ids=ids).logits

painted = {}
for name, job in json.load(open(sys.argv[1])).items():
    logits, tokenizer = causal(job["folder"]), AutoTokenizer.from_pretrained(job["folder"])
    rows = []
    for prompt in job["prompts"]:
        ids = torch.tensor([prompt], dtype=torch.long)
        for token in job["forced"]:
            if token < 0:
                with torch.no_grad():
                    token = job["codes"][int(logits(ids)[0, -1, job["codes"]].argmax())]
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
        rows.append(ids[0, len(prompt):].tolist())
    names = [tokenizer.convert_ids_to_tokens(row) for row in rows]
    assert [tokenizer.convert_tokens_to_ids(row) for row in names] == rows
    back = [tokenizer("".join(row), add_special_tokens=False)["input_ids"] for row in names]
    painted[name] = {"rows": rows, "names": names, "parsed": back == rows}
assert not any(module.split(".")[0] == "arra" for module in sys.modules)
json.dump(painted, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: export(kind, tmp_path_factory.mktemp(kind)) for kind in SERVED}


def greedy(folder: Path) -> torch.Tensor:
    return Pipeline.from_pretrained(folder).codes(PROMPTS, cfg=1.0, temperature=0.0, slots=4)


def settings(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "model" / f"{name}.json").read_text())


# ---- the exported folder -------------------------------------------------------------------------


def test_a_stranger_paints_the_same_codes(exports: dict[str, Path], tmp_path: Path) -> None:
    """transformers alone, in a process without this package: greedy, restricted to legal codes."""
    jobs, ours = {}, {}
    for kind, folder in exports.items():
        pipe = Pipeline.from_pretrained(folder)
        ours[kind] = pipe.codes(PROMPTS, cfg=1.0, temperature=0.0, slots=4)
        forced = pipe.backbone.layout.plan(*GRID).forced_S.tolist()
        jobs[kind] = {
            "folder": str(folder / "model"),
            "prompts": [pipe.backbone.condition(prompt, GRID) for prompt in PROMPTS],
            "codes": list(pipe.backbone.layout.code_ids),
            "forced": forced,
        }
    (tmp_path / "stranger.py").write_text(STRANGER)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "stranger.py", "jobs.json", "painted.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for kind, painted in json.loads((tmp_path / "painted.json").read_text()).items():
        layout = read_skeleton(exports[kind]).layout
        forced = torch.tensor(jobs[kind]["forced"])
        codes = layout.ids_to_codes(torch.tensor(painted["rows"])[:, forced < 0])
        assert torch.equal(codes.view_as(ours[kind]), ours[kind]), kind
        assert len(codes.unique()) > 1, f"{kind}: the test's painter paints one code all over"
        first_code = painted["names"][0][int((forced < 0).nonzero()[0])]
        assert first_code.startswith(("<|code_", "<|visual token", "IMGIMG")), first_code
        # Meta's codes are entries of its vocabulary that no text is split into.
        assert painted["parsed"] or first_code.startswith("IMGIMG"), "printed tokens parse back"


def test_the_folder_is_what_vllm_opens(exports: dict[str, Path]) -> None:
    for kind, folder in exports.items():
        config, painting = settings(folder, "config"), settings(folder, "generation_config")
        assert set(config["architectures"]) <= OWN | BY_TRANSFORMERS, kind
        assert "auto_map" not in config, "no code from the folder"
        files = {file.name for file in (folder / "model").iterdir()}
        assert files >= {"model.safetensors", "tokenizer.json", "tokenizer_config.json"}
        skeleton = read_skeleton(folder)
        layout, tokenizer = skeleton.layout, skeleton.text_tokenizer
        rows = config.get("text_config", config)["vocab_size"]
        assert tokenizer is not None
        assert len(tokenizer) <= rows, "vLLM refuses ids beyond the model's table"
        assert max(layout.code_ids) < rows
        # vLLM takes its defaults, and Qwen's repetition penalty, from generation_config.json.
        assert painting.get("eos_token_id") == layout.end
        assert painting["max_new_tokens"] == layout.image_length(*GRID)
        assert "repetition_penalty" not in painting
        sampling = json.loads((folder / "pipeline.json").read_text())["sampling"]
        for name in ("temperature", "top_k", "top_p"):
            assert painting[name] == sampling[name], kind


def test_an_image_encoder_that_is_not_there_is_zeros_for_vllm(exports: dict[str, Path]) -> None:
    """vLLM refuses a folder without it; nobody else sees the file."""
    written = {kind for kind in exports if (exports[kind] / "model" / UNUSED_PARTS).exists()}
    assert written == {"lumina"}
    folder = exports["lumina"] / "model"
    stored, zeros = load_file(folder / "model.safetensors"), load_file(folder / UNUSED_PARTS)
    with torch.device("meta"):
        whole = ChameleonForConditionalGeneration(ChameleonConfig.from_pretrained(folder))
    assert {**stored, **zeros}.keys() == whole.state_dict().keys()
    assert not stored.keys() & zeros.keys()
    assert all(name.startswith("model.vqmodel.") for name in zeros)
    assert not any(tensor.any() for tensor in zeros.values())


def test_others_are_refused_in_a_sentence(tmp_path: Path) -> None:
    folder = export("janus", tmp_path)
    assert not (folder / "model" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="no stock server can paint with it"):
        ServedPainter(folder, "http://127.0.0.1:1")


# ---- the client ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(exports: dict[str, Path]) -> StandIn:
    return StandIn(exports["qwen2"] / "model")  # with sizes and row ends


@pytest.fixture
def url(stand_in: StandIn) -> Iterator[str]:
    stand_in.change, stand_in.owner = as_it_is, "vllm"
    stand_in.requests.clear()
    with serving(stand_in) as address:
        yield address


@pytest.fixture(scope="module")
def folder(exports: dict[str, Path]) -> Path:
    return exports["qwen2"]


@pytest.mark.parametrize("owner", ["vllm", "sglang"])
def test_pictures_equal_the_pipelines(
    stand_in: StandIn, url: str, folder: Path, owner: str
) -> None:
    stand_in.owner = owner
    painter = ServedPainter(folder, url + "/v1")
    assert torch.equal(painter.codes(PROMPTS, temperature=0.0), greedy(folder))
    pictures = painter(PROMPTS, temperature=0.0)
    ours = Pipeline.from_pretrained(folder)(PROMPTS, cfg=1.0, temperature=0.0, slots=4)
    for theirs, our in zip(pictures, ours, strict=True):
        assert np.array_equal(np.asarray(theirs), np.asarray(our))
    asked = stand_in.requests[: len(PROMPTS) * GRID[0]]
    seeds = [request["seed"] for request in asked]
    assert sorted(seeds) == [0, 0, 0, 1, 1, 1], "no two rows of a picture are drawn alike"
    assert {request["max_tokens"] for request in asked} == {GRID[1]}, "row by row"
    assert {request["repetition_penalty"] for request in asked} == {1.0}
    codes = painter.layout.code_ids
    for request in asked:
        if owner == "vllm":
            assert (request["allowed_token_ids"], request["top_k"]) == (list(codes), 0)
        else:
            assert (set(map(int, request["logit_bias"])), request["top_k"]) == (set(codes), -1)


def test_a_format_without_row_ends_takes_one_request(exports: dict[str, Path]) -> None:
    whole = StandIn(exports["llama"] / "model")
    with serving(whole) as address:
        painter = ServedPainter(exports["llama"], address)
        assert torch.equal(painter.codes(PROMPTS, temperature=0.0), greedy(exports["llama"]))
    assert [request["max_tokens"] for request in whole.requests] == [GRID[0] * GRID[1]] * 3


def test_the_example(url: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    script = Path(__file__).parents[3] / "examples" / "paint_with_server.py"
    words = [str(folder), "a red circle", "--url", url, "--out", str(tmp_path / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *words, "--num", "2", "--temperature", "0"])
        runpy.run_path(str(script), run_name="__main__")
        assert len(capsys.readouterr().out.split()) == 2
        sizes = [Image.open(file).size for file in sorted((tmp_path / "out").glob("*.png"))]
        assert sizes == [(8, 4)] * 2
        patch.setattr(sys, "argv", [str(script), *words, "--name", "nobody"])
        with pytest.raises(SystemExit, match="has no model 'nobody', it serves painter"):
            runpy.run_path(str(script), run_name="__main__")


def completion(edit: Callable[[dict[str, Any]], object]) -> Callable[[str, dict], tuple]:
    """Spoils the completions, and nothing else."""

    def change(path: str, answer: dict[str, Any]) -> tuple[int, bytes]:
        if path == "/v1/completions":
            edit(answer["choices"][0])
        return as_it_is(path, answer)

    return change


def models(**fields: Any) -> Callable[[str, dict], tuple]:
    def change(path: str, answer: dict[str, Any]) -> tuple[int, bytes]:
        if path == "/v1/models":
            answer["data"][0].update(fields)
        return as_it_is(path, answer)

    return change


def several(path: str, answer: dict[str, Any]) -> tuple[int, bytes]:
    if path == "/v1/models":
        answer["data"].append({"id": "another", "owned_by": "vllm"})
    return as_it_is(path, answer)


def refused(path: str, answer: dict[str, Any]) -> tuple[int, bytes]:
    if path != "/v1/completions":
        return as_it_is(path, answer)
    said = {"message": "token id 31 is\nout of vocabulary", "type": "BadRequestError"}
    return 400, json.dumps({"error": said}).encode()


WRONG = {
    "text": (completion(lambda c: c.update(token_ids=[7] * 4, text="gggg")), "answered 'gggg'"),
    "few": (
        completion(lambda c: c.update(token_ids=c["token_ids"][:1], text=c["text"][:-33])),
        "1 of 4 codes .finished by 'length'",
    ),
    "other names": (completion(lambda c: c.update(text="<|pixel_1|>")), "serves another model"),
    "no ids": (completion(lambda c: c.pop("token_ids")), "does not say the ids of tokens"),
    "refused": (refused, r"refused \(HTTP 400\): token id 31 is out of vocabulary"),
    "no JSON": (lambda path, answer: (200, b"<html>"), "answered no JSON"),
    "no completion": (
        lambda path, answer: (
            as_it_is(path, answer) if path != "/v1/completions" else (200, b'{"choices": []}')
        ),
        "answered without a completion",
    ),
    "several": (several, "serves another, painter: say which"),
    "owner": (models(owned_by="openai"), "a server of 'openai'"),
    "short": (models(max_model_len=12), "takes 12 tokens, .* larger --max-model-len"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_a_sentence(
    stand_in: StandIn, url: str, folder: Path, what: str
) -> None:
    stand_in.change, sentence = WRONG[what]
    with pytest.raises(ValueError, match=sentence) as told:
        ServedPainter(folder, url).codes("a red circle", temperature=0.0)
    assert "\n" not in str(told.value)


def test_no_server_and_no_answer_are_said(url: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no server answers at http://127\.0\.0\.1:1 "):
        ServedPainter(folder, "http://127.0.0.1:1")
    with pytest.raises(ValueError, match="no address of a server"):
        ServedPainter(folder, "127.0.0.1:8000")
    with pytest.raises(ValueError, match="no exported painter"):
        ServedPainter(folder / "model", url)
    painter = ServedPainter(folder, url)
    with pytest.raises(ValueError, match="2 prompts need as many seeds, got 1"):
        painter.codes(["a", "b"], [1])
    painter.server.timeout = 0.0001
    with pytest.raises(ValueError, match="gave no answer within"):
        painter.codes("a red circle", temperature=0.0)


def test_a_vllm_that_masks_codes_is_refused(
    stand_in: StandIn, url: str, exports: dict[str, Path]
) -> None:
    """Its codes would all be equally likely: noise, and no error."""
    versions = {"/version": {"version": "0.28.0"}}
    stand_in.change = lambda path, answer: as_it_is(path, versions.get(path, answer))
    with pytest.raises(ValueError, match=r"masks the image codes of Chameleon.*use vLLM 0\.29"):
        ServedPainter(exports["chameleon"], url)
    ServedPainter(exports["llama"], url)  # any vLLM will do
