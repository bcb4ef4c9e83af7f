"""Several processes by their commands: as one process; two agents that find each other; a machine
that is lost; a request to stop, told by the exit code. The commands are those of
docs/multi-node.md, with gloo on this machine.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ranks import free_port

from arra.cli import main
from arra.train.signs import PREEMPTED

TOLERANCE = 2e-5
"""Of a loss in float32, one process against several: 1e-6 seen in 60 steps."""
AGENT = [sys.executable, "-m", "arra.train.launch", "--nproc-per-node", "1"]
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "GLOO_SOCKET_IFNAME": "lo",
}


def train_flags(data: Path, out: Path, steps: int, every: int) -> list[str]:
    """The scenes recipe, tiny."""
    small = (
        f"--steps {steps} --checkpoint.every {every} --batch-size 8 --log.every 1 --threads 1 "
        "--model.layers 2 --model.hidden-size 32 --model.heads 2 --model.mlp-size 48 "
        "--model.text-vocabulary 280 --model.new-rows statistics --align.layer 1 "
        "--dtype float32 --device cpu"
    )
    return ["train", "scenes", "--data", str(data), "--out", str(out), *small.split()]


class Agents:
    """Commands that run beside the test, each in a session of its own, as on machines of their
    own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()

    def start(self, command: list[str], **environment: str) -> subprocess.Popen[bytes]:
        said = self.folder / f"agent-{len(self.started)}.log"
        with said.open("wb") as output:
            agent = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | environment,
                start_new_session=True,
            )
        self.started.append(agent)
        return agent

    def said(self) -> str:
        return "\n".join(p.read_text() for p in sorted(self.folder.glob("agent-*.log")))

    def lose(self, agent: subprocess.Popen[bytes]) -> None:
        """The agent and all below it are gone at once, like a machine without power."""
        below = _below(agent.pid)
        agent.kill()
        for pid in below:
            os.kill(pid, signal.SIGKILL)
        agent.wait()

    def end(self) -> None:
        for agent in self.started:
            if agent.poll() is None:
                self.lose(agent)


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    started = Agents(tmp_path)
    yield started
    started.end()


def test_two_processes_train_as_one_does(
    agents: Agents, tiny_dataset: Path, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(train_flags(tiny_dataset, one, 6, 6)) == 0
    launch = ["-m", "arra.train.launch", "--nproc-per-node", "2", "--master-port"]
    launch += [str(free_port()), "-m", "arra.cli"]
    both = agents.start([sys.executable, *launch, *train_flags(tiny_dataset, two, 6, 6)])
    assert both.wait(120) == 0, agents.said()
    assert losses(two) == pytest.approx(losses(one), abs=TOLERANCE)


@pytest.mark.long
def test_two_agents_meet_and_stop_together(
    agents: Agents, tiny_dataset: Path, tmp_path: Path
) -> None:
    """One is asked to stop: both save after the same step and end with 75; the same commands go
    on."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(train_flags(tiny_dataset, one, 40, 100)) == 0
    flags = ["-m", "arra.cli", *train_flags(tiny_dataset, two, 40, 100)]
    meeting = [*AGENT, "--nnodes", "2", *_meeting()]
    first, second = (agents.start([*meeting, *flags]) for _ in range(2))
    _until(lambda: len(losses(two)) >= 10, agents)
    asked = time.monotonic()
    second.send_signal(signal.SIGTERM)
    assert second.wait(60) == PREEMPTED, agents.said()
    assert first.wait(60) == PREEMPTED, agents.said()
    assert time.monotonic() - asked < 60
    assert len(losses(two)) < 40, "it was over before it could be stopped"

    meeting = [*AGENT, "--nnodes", "2", *_meeting()]
    again = [agents.start([*meeting, *flags]) for _ in range(2)]
    assert [agent.wait(120) for agent in again] == [0, 0], agents.said()
    assert losses(two) == pytest.approx(losses(one), abs=TOLERANCE)


@pytest.mark.long
def test_a_lost_machine_leaves_the_other_to_finish(
    agents: Agents, tiny_dataset: Path, tmp_path: Path
) -> None:
    """SIGKILL of an agent and its process: the other goes on alone from the last checkpoint. It had
    begun alone, or not: the second joins at whatever moment it is there."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(train_flags(tiny_dataset, one, 60, 100)) == 0
    elastic = [*AGENT, "--nnodes", "1:2", "--max-restarts", "3", *_meeting()]
    flags = ["-m", "arra.cli", *train_flags(tiny_dataset, two, 60, 4)]
    first = agents.start([*elastic, *flags])
    _until(lambda: _listens(elastic), agents)  # the place where they meet is not lost
    second = agents.start([*elastic, *flags])
    _until(lambda: len(losses(two)) >= 20, agents)
    assert _processes(two) == 2, "they did not meet"
    agents.lose(second)
    assert first.wait(180) == 0, agents.said()
    assert losses(two) == pytest.approx(losses(one), abs=TOLERANCE)
    assert _processes(two) == 1


@pytest.mark.long
def test_the_exit_code_is_that_of_the_first_failure(
    agents: Agents, tiny_dataset: Path, tmp_path: Path
) -> None:
    flags = train_flags(tiny_dataset, tmp_path / "run", 4, 4)
    for wrong, code in ((["--no-such-flag", "1"], 2), (["--align.targets", "nothing"], 1)):
        agent = agents.start([*AGENT, "--standalone", "-m", "arra.cli", *flags, *wrong])
        assert agent.wait(60) == code, agents.said()


# ---- what the tests read -------------------------------------------------------------------------


def losses(run: Path) -> list[float]:
    """Of every step, in order."""
    log = run / "log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    assert [each["step"] for each in found] == list(range(1, len(found) + 1))
    return [each["loss"] for each in found]


def _processes(run: Path) -> int:
    card = json.loads((run / "run_card.json").read_text())
    return int(card["hardware"]["processes"])


def _meeting() -> list[str]:
    """Where agents meet: a new place each time."""
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{free_port()}"]
    return [*place, "--rdzv-id", "test", "--rdzv-conf", QUICK]


def _listens(command: list[str]) -> bool:
    """Whether the place where agents meet is open."""
    endpoint = next(word for word in command if word.startswith("localhost:"))
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", int(endpoint.partition(":")[2]))) == 0


def _until(reached: Callable[[], bool], agents: Agents) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, agents.said()
        assert all(a.poll() in (None, 0) for a in agents.started), agents.said()
        time.sleep(0.02)


def _below(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    children = [int(word) for word in found.stdout.split()]
    return children + [below for child in children for below in _below(child)]
