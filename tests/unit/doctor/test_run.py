"""`arra doctor RUN` on made-up runs: finished, killed, failed, damaged, moved, garbled."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import small_config, small_dataset

from arra import cli
from arra.config import CheckpointConfig, LogConfig, TrainConfig
from arra.config_json import to_json
from arra.doctor.run import Evidence, examine, is_run, read_run, resume_command
from arra.doctor.run_page import write_report
from arra.doctor.settings import RunConfig
from arra.files import sha256_of, write_json
from arra.models.run_folder import FORMAT
from arra.train.optim import learning_rate
from arra.train.run_card import Session, _process_name

STEPS, EVERY = 100, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data"))


def config_of(data: Path, run: Path, **changes: Any) -> TrainConfig:
    return small_config(
        data,
        out=str(run),
        steps=STEPS,
        log=LogConfig(every=EVERY, sample_every=50),
        checkpoint=CheckpointConfig(every=20, keep=0),
        **changes,
    )


def line_of(config: TrainConfig, step: int) -> dict[str, float]:
    """A run that goes well."""
    return {
        "step": step,
        "images_seen": step * config.batch_size,
        "loss": 0.0,
        "loss_ar": 1.5 + 1.5 * math.exp(-step / 30),
        "loss_gva": 0.3 + 0.5 * math.exp(-step / 30),
        "gva_constant": 0.7,
        "retrieval": 0.6,
        "lambda": 0.5,
        "lr": learning_rate(step - 1, config.steps, config.optim),
        "images_per_s": 100.0,
        "tokens_per_s": 2000.0,
        "overhead": 0.02,
        "data_wait": 0.001,
        "memory_gb": 1.0,
        "skipped": 0,
        "grad_norm": 0.5,
    }


def make_run(
    folder: Path,
    data: Path,
    *,
    until: int = STEPS,
    saved: int | None = None,
    how: str = "finished",
    error: str = "",
    change: Any = lambda line: {},
    **changes: Any,
) -> Path:
    """A run that was trained `until` a step, with checkpoints to `saved`, that ended so."""
    folder.mkdir()
    config, saved = config_of(data, folder, **changes), until if saved is None else saved
    run = {"dataset": sha256_of(data / "manifest.json"), "threads": 1}
    write_json(folder / "config.json", {**to_json(config), "run": run})
    lines = [line_of(config, step) for step in range(EVERY, until + 1, EVERY)]
    texts = [json.dumps(line | change(line)) for line in lines]
    (folder / "log.jsonl").write_text("".join(f"{text}\n" for text in texts))
    for step in range(20, saved + 1, 20):
        make_checkpoint(folder / "checkpoints" / f"step-{step:08d}", step)
    for step in range(50, until + 1, 50):
        path = folder / "samples" / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 20), (200, 30, 30)).save(path)
    ended = None if how == "running" else "2026-01-02T03:04:05Z"
    session = Session("2026-01-02T01:00:00Z", 0, saved, 1, 1, "cpu", 1)
    session = dataclasses.replace(session, how=how, ended=ended, seconds=60.0, error=error)
    card = {"hardware": {"processor": "a CPU", "processes": 1}, "progress": {"hours": 1.0}}
    write_json(folder / "run_card.json", {**card, "sessions": [dataclasses.asdict(session)]})
    return folder


def make_checkpoint(folder: Path, step: int) -> None:
    (folder / "model").mkdir(parents=True)
    file = folder / "model" / "shard.safetensors"
    file.write_bytes(bytes(range(64)) * step)
    sums = {"model/shard.safetensors": sha256_of(file)}
    write_json(folder / "state.json", {"format": FORMAT, "step": step, "sha256": sums})


def long_ago(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 86_400,) * 2)


def findings(run: Path, **options: Any) -> dict[str, list[tuple[str, str]]]:
    """check -> (level, what and remedy) of each finding."""
    audit, _ = examine(RunConfig(str(run), **options))
    return {c.name: [(f.level, f.line()) for f in c.findings] for c in audit.checks}


def ending(run: Path) -> str:
    return examine(RunConfig(str(run)))[0].checks[0].summary


def wrong(run: Path, **options: Any) -> list[str]:
    return [s for f in findings(run, **options).values() for level, s in f if level == "damage"]


# ---- how it ended --------------------------------------------------------------------------------


def test_a_finished_run_is_fine(tmp_path: Path, data: Path, capsys) -> None:
    run = make_run(tmp_path / "run", data)
    assert cli.main(["doctor", str(run), "--strict"]) == 0
    told = capsys.readouterr().out
    assert "finished: all 100 steps are trained and saved" in told
    assert "5 whole of 5, the last after step 100" in told
    assert told.rstrip().endswith("verdict: fine")


def test_a_killed_run_says_what_is_lost_and_how_to_go_on(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, until=50, saved=40, how="running")
    long_ago(run)
    assert "killed after step 50 of 100" in ending(run)
    ((level, said), lost) = findings(run)["ending"]
    assert level == "damage"
    assert said == (
        f"run: 60 steps of 100 left; to go on: arra train {run}/config.json --out {run}"
    )
    assert lost == ("note", "run: 10 steps since step 40 must be trained again "
                            "(about 0:00 of training)")  # fmt: skip


def test_a_running_run_is_left_alone(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, until=50, how="running")
    assert not wrong(run)  # nothing tells of its process, but it has just written
    long_ago(run)
    card = json.loads((run / "run_card.json").read_text())
    card["sessions"][0]["process"] = _process_name(os.getpid())
    write_json(run / "run_card.json", card)
    assert ending(run).startswith("running: after step 50 of 100")
    gone = subprocess.Popen(["true"])
    gone.wait()
    card["sessions"][0]["process"] = _process_name(os.getpid()).replace(
        f":{os.getpid()}:", f":{gone.pid}:"
    )
    write_json(run / "run_card.json", card)  # just written, yet its process is known to be gone
    assert "killed after step 50" in ending(run)


@pytest.mark.parametrize("how", ["preempted", "interrupted", "stopped"])
def test_a_run_that_was_asked_to_stop_is_a_warning(how: str, tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, until=40, how=how)
    ((level, said),) = findings(run)["ending"]
    assert level == "warning"
    assert "after step 40 of 100" in ending(run)
    assert "to go on: arra train" in said
    assert not wrong(run)


def test_a_run_stopped_by_numbers_says_which_batches(tmp_path: Path, data: Path, capsys) -> None:
    run = make_run(tmp_path / "run", data, until=46, saved=40, how="failed", error="F: NaN")
    skipped = [{"kind": "skipped", "step": s, "rank": 0, "terms": ["ar"]} for s in (47, 48, 49)]
    stop = {"kind": "stop", "step": 49, "first": 47, "terms": ["ar"]}
    (run / "incidents.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in [*skipped, stop]))
    assert cli.main(["doctor", str(run)]) == 1
    told = capsys.readouterr()
    assert "failed after step 46 of 100: F: NaN" in told.out
    assert "3 steps were skipped: not finite (step 47, step 48, step 49)" in told.out
    assert "pass over them with --data.skip-steps 47-49" in told.out
    assert f"--out {run} --data.skip-steps 47-49" in told.out
    assert "NOT fine: 2 things wrong" in told.err


def test_a_long_error_is_cut_in_its_line_alone(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, until=40, how="failed", error="E: " + "why " * 200)
    audit, _ = examine(RunConfig(str(run)))
    assert len(audit.checks[0].summary) < 250
    assert len(audit.checks[0].facts["error"]) == 803


def test_a_run_that_never_trained(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, until=0)
    (run / "run_card.json").unlink()
    (run / "log.jsonl").unlink()
    assert is_run(run)
    assert ending(run).startswith("it never trained a step: loading failed")


def test_the_command_names_processes_and_data(tmp_path: Path) -> None:
    session = Session("", 0, 0, processes=8, machines=2, device="cuda", threads=1)
    command = resume_command(Evidence(tmp_path / "a run", sessions=[session]), "other data")
    run = f"'{tmp_path}/a run'"
    assert command == (
        f"torchrun --nnodes 2 --nproc-per-node 4 -m arra.cli train {run}/config.json --out {run} "
        f"--data 'other data'"
    )


# ---- files ---------------------------------------------------------------------------------------


def test_every_changed_byte_of_a_checkpoint_is_found(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, until=60, how="preempted")
    middle, last = (run / "checkpoints" / f"step-{step:08d}" for step in (40, 60))
    content = bytearray((middle / "model" / "shard.safetensors").read_bytes())
    content[7] ^= 1
    (middle / "model" / "shard.safetensors").write_bytes(content)
    found = findings(run)["checkpoints"]
    assert [level for level, _ in found] == ["warning"]
    assert "step-00000040: damaged: model/shard.safetensors is not as it was written" in found[0][1]
    (last / "model" / "shard.safetensors").unlink()
    (said,) = wrong(run)
    assert "model/shard.safetensors is missing" in said
    assert said.endswith("the same command puts it aside and goes on from step-00000020")


def test_what_is_left_over_is_told(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data)
    (run / "checkpoints" / ".step-00000100.elsewhere-1-00000000.partial").mkdir()
    (run / "checkpoints" / "damaged-step-00000080").mkdir()
    long_ago(run)
    found = findings(run)["checkpoints"]
    assert [level for level, _ in found] == ["note", "note"]
    assert "1 folder never finished" in found[0][1]
    assert "1 folder damaged, put aside" in found[1][1]


def test_a_moved_dataset_and_another_one(tmp_path: Path, data: Path) -> None:
    here = shutil.copytree(data, tmp_path / "here")
    run = make_run(tmp_path / "run", here, until=40, how="preempted")
    moved = here.rename(tmp_path / "moved")
    assert "say where it is now with --data" in wrong(run)[0]
    assert not wrong(run, data=str(moved))
    manifest = moved / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    assert "holds another dataset than the run was begun with" in wrong(run, data=str(moved))[0]


def test_garbled_lines_and_broken_files_are_told(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data)
    log = run / "log.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:3], "\x00garbage", "[1, 2]", *lines[3:], '{"step": 9']))
    (run / "run_card.json").write_text("{")
    found = findings(run)["files"]
    assert ("warning", "log.jsonl: 3 lines cannot be read (line 4, line 5, line 53)") in found
    assert any(level == "warning" and "run_card.json" in said for level, said in found)
    assert len(read_run(run).lines) == 50
    log.write_text("\n".join([*lines, '{"step": 102, "los']))
    (said,) = [s for level, s in findings(run)["files"] if "log.jsonl" in s]
    assert said.endswith("cut off by a kill; resuming drops it")
    (run / "config.json").write_text('{"data_folder": 1, "color": "blue"}')
    assert any("no field 'color'" in said for said in wrong(run))


def test_an_empty_folder_is_wrong_use(tmp_path: Path, capsys) -> None:
    assert cli.main(["doctor", str(tmp_path)]) == 2
    assert "no training run" in capsys.readouterr().err


def test_missing_pictures_are_told(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data)
    (run / "samples" / "step-00000050.png").unlink()
    assert findings(run)["pictures"] == [("warning", "samples: 1 picture missing (step 50)")]


# ---- curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "level", "said", "change"),
    [
        ("losses", "damage", "loss_ar diverged", lambda x: {"loss_ar": 2 + (x["step"] / 50) ** 2}),
        ("losses", "warning", "rises again", lambda x: {"loss_ar": 3 - x["step"] / 50
                                                        if x["step"] < 80 else 1.7}),
        ("losses", "warning", "hardly fallen", lambda x: {"loss_ar": 3 - x["step"] / 1e4}),
        ("losses", "note", "a plateau", lambda x: {"loss_ar": max(2.0, 3 - x["step"] / 30)}),
        ("losses", "damage", "not finite",
         lambda x: {"loss_ar": math.nan} if x["step"] > 95 else {}),
        ("losses", "warning", "it overfits: val_loss_ar was 2 after step 40",
         lambda x: {"val_loss_ar": 2 + abs(x["step"] - 40) / 50}),
        ("alignment", "warning", "not below the best constant", lambda x: {"loss_gva": 0.71}),
        ("alignment", "note", "a constant answers", lambda x: {"gva_constant": 0.05,
                                                               "loss_gva": 0.03}),
        ("alignment", "note", "found 15.0% of the time", lambda x: {"retrieval": 0.15}),
        ("alignment", "note", "layer 2 of 2 holds most", lambda x: {
            "probe/cka/layer_01": 0.1, "probe/cka/layer_02": 0.4, "probe/chance": 0.1}),
        ("steering", "warning", "not the schedule's in 1 log line (step 50)",
         lambda x: {"lr": 1.0} if x["step"] == 50 else {}),
        ("steering", "note", "gradients are clipped", lambda x: {"grad_norm": 5.0}),
        ("steering", "damage", "no gradient at all", lambda x: {"grad_norm": 0.0}),
        ("speed", "note", "1 interval below half of the usual 100 images/s (step 50)",
         lambda x: {"images_per_s": 20.0} if x["step"] == 50 else {}),
        ("speed", "warning", "20% of the time is spent waiting", lambda x: {"data_wait": 0.2}),
        ("speed", "warning", "40% of the time is spent not training", lambda x: {"overhead": 0.4}),
        ("speed", "warning", "memory keeps growing", lambda x: {"memory_gb": 1 + x["step"] / 50}),
    ],
)  # fmt: skip
def test_curves_are_judged(check, level, said, change, tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, change=change)
    assert any(lev == level and said in text for lev, text in findings(run)[check]), findings(run)


def test_incidents_are_counted_by_step(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data)
    lines = [{"kind": "skipped", "step": 8, "rank": rank} for rank in range(2)]
    lines += [{"kind": "spike", "step": s} for s in (30, 60)]
    (run / "incidents.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    said = [text for _, text in findings(run)["losses"]]
    assert said == [
        "incidents.jsonl: 1 step was skipped: not finite (step 8)",
        "incidents.jsonl: 2 spikes of the loss (step 30, step 60)",
    ]


# ---- the page ------------------------------------------------------------------------------------


def test_the_page_stands_alone(tmp_path: Path, data: Path) -> None:
    run = make_run(tmp_path / "run", data, until=50, saved=40, how="failed", error="E: <b> & more")
    page = write_report(tmp_path / "report", *examine(RunConfig(str(run)))).read_text()
    assert "E: &lt;b&gt; &amp; more" in page
    assert page.count("<svg") >= 6
    assert "data:image/png;base64," in page
    assert 'src="http' not in page
    told = json.loads((tmp_path / "report" / "run.json").read_text())
    assert told["run"] == str(run)
    assert told["failed"] is True


def test_a_page_of_almost_nothing(tmp_path: Path, data: Path, capsys) -> None:
    run = make_run(tmp_path / "run", data, until=0, how="failed", error="ValueError: no")
    assert cli.main(["doctor", str(run), "--out", str(tmp_path / "out"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][0]["facts"]["how"] == "failed"
    assert (tmp_path / "out" / "report.html").is_file()
