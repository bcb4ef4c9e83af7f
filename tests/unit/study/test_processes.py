"""Jobs side by side: threads, failures, and that nothing is left running."""

import os
import signal
import subprocess
import sys
import time

import pytest

from arra.study.processes import Job, run_jobs


def job(tmp_path, name, code):
    return Job(name, (sys.executable, "-c", code), tmp_path / f"{name}.log", lambda: "busy")


def run(jobs, say=print):
    run_jobs(jobs, parallel=2, threads=3, say=say, every=0.1)


def test_jobs_run_side_by_side_with_their_threads(tmp_path):
    meet = """
import os, pathlib, time
mine = pathlib.Path({mine!r}); other = pathlib.Path({other!r})
mine.touch()
while not other.exists():
    time.sleep(0.02)
print(os.environ["OMP_NUM_THREADS"])
"""
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    said = []
    jobs = [
        job(tmp_path, "one", meet.format(mine=a, other=b)),
        job(tmp_path, "two", meet.format(mine=b, other=a)),
        job(tmp_path, "three", "import time; time.sleep(0.5)"),
    ]
    run(jobs, said.append)
    assert (tmp_path / "one.log").read_text().strip() == "3"
    assert any("three: busy" in line for line in said)


def test_a_failure_is_told_and_ends_the_others(tmp_path):
    slow = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
time.sleep(60)
"""
    wait = f"""
import pathlib, sys, time
while not pathlib.Path({str(tmp_path / "pid")!r}).exists():
    time.sleep(0.02)
sys.exit("arra: the disk is full.")
"""
    with pytest.raises(ValueError, match=r"bad failed \(exit code 1\): the disk is full\."):
        run([job(tmp_path, "slow", slow), job(tmp_path, "bad", wait)])
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_job_that_dies_silently_is_still_named(tmp_path):
    code = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    with pytest.raises(ValueError, match="it printed nothing"):
        run([job(tmp_path, "dead", code)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_study_leaves_nothing_running(tmp_path, number):
    pid = tmp_path / "pid"
    slow = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "part")!r}).write_text(str(os.getpid()))
os.rename({str(tmp_path / "part")!r}, {str(pid)!r})
time.sleep(600)
"""
    study = f"""
import pathlib, sys
from arra.study.processes import Job, run_jobs
job = Job("slow", (sys.executable, "-c", {slow!r}), pathlib.Path({str(tmp_path / "log")!r}), str)
run_jobs([job], parallel=1, threads=1, say=print)
"""
    running = subprocess.Popen([sys.executable, "-c", study])
    while not pid.exists():
        time.sleep(0.02)
    running.send_signal(number)
    assert running.wait(120) == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
