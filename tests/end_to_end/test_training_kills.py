"""Training that is killed, or asked to stop, and started again equals training that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import killed_commands
import pytest
from ranks import RankFailed, free_port, in_ranks
from saved_runs import assert_same_run

from arra.cli import main
from arra.models.run_folder import latest_checkpoint, step_name
from arra.train.signs import PREEMPTED

TINY = [
    *("--batch-size", "4", "--threads", "1", "--device", "cpu", "--seed", "1"),
    *("--model.layers", "2", "--model.hidden-size", "24", "--model.heads", "2"),
    *("--model.mlp-size", "32", "--model.text-vocabulary", "280", "--align.layer", "1"),
    *("--optim.ema", "0.9", "--log.every", "3", "--log.validate-every", "6"),
    *("--log.validate-images", "4", "--checkpoint.every", "2", "--checkpoint.keep", "2"),
]


def command(data: Path, out: Path, *more: str) -> list[str]:
    return ["train", "scenes", "--data", str(data), "--out", str(out), *TINY, *more]


def run(lines: Sequence[tuple[str, object, str, list[str]]]) -> list[dict]:
    """What became of each command: (where, when, whom or signal, command)."""
    text = [
        "\t".join([where, str(when), whom, argv[argv.index("--out") + 1], *argv])
        for where, when, whom, argv in lines
    ]
    modules = ["arra.train.loop", "transformers.models.llama.modeling_llama"]
    done = subprocess.run(
        [sys.executable, killed_commands.__file__, *modules],
        input="\n".join(text),
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("run ")]
    return [json.loads(line.removeprefix("run ")) for line in said]


def hidden(out: Path) -> list[Path]:
    return [p for p in (out / "checkpoints").iterdir() if p.name.startswith(".")]


# ---- SIGKILL -------------------------------------------------------------------------------------


def test_three_kills_and_the_same_run(tiny_dataset: Path, tmp_path: Path) -> None:
    steps = ["--steps", "24"]
    whole, killed = (command(tiny_dataset, tmp_path / name, *steps) for name in ("one", "two"))
    ends = run(
        [
            ("never", 0, "main", whole),
            ("saves", 2, "main", killed),
            ("trains", 0.05, "main", killed),
            ("saves", 3, "main", killed),
            ("never", 0, "main", killed),
        ]
    )
    assert [each["exit"] for each in ends] == [0, -9, -9, -9, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert not hidden(tmp_path / "two")


@pytest.mark.long
def test_twenty_kills_and_the_same_run(tiny_dataset: Path, tmp_path: Path) -> None:
    """At random moments, six of them while a checkpoint is written, of one run."""
    chance = random.Random(0)
    steps = ["--steps", "400"]
    whole, killed = (command(tiny_dataset, tmp_path / name, *steps) for name in ("one", "two"))
    kills = [("saves", chance.randint(2, 5)) for _ in range(6)]
    kills += [("trains", round(chance.uniform(0.02, 0.5), 3)) for _ in range(14)]
    chance.shuffle(kills)
    lines = [("never", 0, "main", whole)]
    lines += [(where, when, "main", killed) for where, when in kills]
    ends = run([*lines, ("never", 0, "main", killed)])
    assert [each["exit"] for each in ends] == [0, *[-9] * 20, 0]
    assert sum(each["in_a_file"] for each in ends) >= 5, "too few while a checkpoint was written"
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert not hidden(tmp_path / "two")


# ---- SIGTERM and Ctrl-C --------------------------------------------------------------------------


def test_a_stop_saves_and_says_so_by_its_code(tiny_dataset: Path, tmp_path: Path) -> None:
    """Also one that comes while it validates, at a step whose log line is then missing."""
    steps = ["--steps", "24", "--checkpoint.every", "100"]
    whole, stopped = (command(tiny_dataset, tmp_path / name, *steps) for name in ("one", "two"))
    ends = run(
        [
            ("never", 0, "main", whole),
            ("trains", 0.05, "SIGTERM", stopped),
            ("validates", 1, "SIGTERM", stopped),
            ("trains", 0.02, "SIGINT", stopped),
            ("never", 0, "main", stopped),
        ]
    )
    assert [each["exit"] for each in ends] == [0, PREEMPTED, PREEMPTED, 130, 0]
    assert_same_run(tmp_path / "one", tmp_path / "two")


def stopped_by_one(argv: list[str], which: int, number: int, after: float) -> int:
    """The exit code of a process, of which rank `which` gets a signal."""
    if int(os.environ["RANK"]) == which:
        killed_commands.die_in_training(after, lambda: os.kill(os.getpid(), number))
    try:
        return main(argv)
    except SystemExit as error:
        return int(str(error.code))


TWO = ["--steps", "8", "--checkpoint.every", "3"]


@pytest.fixture(scope="module")
def of_two(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run of two processes."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert in_ranks(2, main, command(tiny_dataset, out, *TWO)) == [0, 0]
    return out


def test_all_processes_stop_after_the_same_step(
    tiny_dataset: Path, tmp_path: Path, of_two: Path
) -> None:
    argv = command(tiny_dataset, tmp_path / "run", *TWO)
    ends = in_ranks(2, stopped_by_one, argv, 1, signal.SIGTERM, 0.1)
    assert ends == [PREEMPTED, PREEMPTED]
    assert in_ranks(2, stopped_by_one, argv, 0, signal.SIGINT, 0.0) == [130, 130]
    assert in_ranks(2, main, argv) == [0, 0]
    assert_same_run(of_two, tmp_path / "run")


def test_one_killed_of_two_ends_both_and_the_same_command_goes_on(
    tiny_dataset: Path, tmp_path: Path, of_two: Path
) -> None:
    argv = command(tiny_dataset, tmp_path / "run", *TWO)
    with pytest.raises(RankFailed):
        in_ranks(2, stopped_by_one, argv, 1, signal.SIGKILL, 0.2)
    assert in_ranks(2, main, argv) == [0, 0]
    assert_same_run(of_two, tmp_path / "run")


# ---- torchrun ------------------------------------------------------------------------------------


def started_by_torchrun(argv: list[str]) -> subprocess.Popen[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(free_port()), "-m", "arra.cli", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit code and what was printed."""
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


def when_there(path: Path, process: subprocess.Popen[str]) -> None:
    latest = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < latest
        time.sleep(0.02)


def workers_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that torchrun has started."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        found += [int(entry.name)] if parent == process.pid else []
    return found


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_torchrun_is_killed_and_stopped(tiny_dataset: Path, tmp_path: Path) -> None:
    """One worker is killed: the other one ends. SIGTERM to torchrun: both save, within 30 s."""
    more = ["--steps", "200", "--checkpoint.every", "5"]
    whole, argv = (command(tiny_dataset, tmp_path / name, *more) for name in ("one", "two"))
    assert finished(started_by_torchrun(whole))[0] == 0
    process = started_by_torchrun(argv)
    when_there(tmp_path / "two" / "checkpoints" / "step-00000005", process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert finished(process)[0] == 1
    reached = latest_checkpoint(tmp_path / "two")
    assert reached is not None
    process = started_by_torchrun(argv)
    when_there(reached.with_name(step_name(int(reached.name[5:]) + 10)), process)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert "asked to stop: saved after step" in finished(process)[1]
    assert time.monotonic() - began < 30
    assert finished(started_by_torchrun(argv))[0] == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
