"""What examples/ holds can be run: the sbatch script on made-up SLURM programs, and the settings of
the Kubernetes files that matter. Their schemas were checked once by hand (docs/multi-node.md).

The made-up programs do what the script counts on: `scontrol show hostnames` and `requeue`, and
`srun` that runs its command once for each machine and ends with the highest exit code (srun(1)).
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import parse_args

from arra.config import TrainConfig
from arra.train.signs import PREEMPTED

EXAMPLES = Path(__file__).parents[2] / "examples"
KUBERNETES = ("jobset.yaml", "kubeflow-trainjob.yaml", "kubeflow-pytorchjob.yaml")
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
highest=0
for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do SLURM_NODEID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait "$task"; code=$?; ((code > highest)) && highest=$code; done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
"show hostnames") printf 'node1\\nnode2\\n' ;;
"requeue 4711") touch requeued ;;
*) exit 1 ;;
esac
"""
PYTHON = """#!/bin/bash
echo "$@" > "said-$SLURM_NODEID"
exit "$CODE"
"""


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLES / name).read_text()))


def trained(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> TrainConfig:
    """The run that a command line of `arra.cli` starts."""
    from arra import cli
    from arra.train import loop

    asked: list[TrainConfig] = []
    monkeypatch.setattr(loop, "train", asked.append)
    assert cli.main(words) == 0
    return asked[0]


# ---- SLURM ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 2, PREEMPTED])
def test_sbatch_script_goes_on_only_if_it_was_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": PYTHON}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "CODE": str(code),
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    flags = ["imagenet", "--data", "/shared/a b", "--out", "/shared/run", "--model.size", "L"]
    done = subprocess.run(
        ["bash", EXAMPLES / "slurm.sbatch", *flags], env=os.environ | job, cwd=tmp_path
    )
    assert done.returncode == code
    assert (tmp_path / "requeued").exists() == (code == PREEMPTED)

    said = [(tmp_path / f"said-{node}").read_text() for node in range(2)]
    assert said[0] == said[1], "all machines must be given the same command"
    words = said[0].replace("/shared/a b", "/shared/a_b").split()
    assert words[:2] == ["-m", "arra.train.launch"]
    options = parse_args(words[2:])
    assert (options.nnodes, options.nproc_per_node) == ("2", "8")
    assert options.rdzv_endpoint == f"node1:{20000 + 4711}"
    config = trained(monkeypatch, options.training_script_args)
    assert (config.recipe, config.model.size) == ("imagenet", "L")


def test_sbatch_script_is_told_in_time() -> None:
    """SIGTERM goes to the steps: srun itself would answer it with SIGKILL to all tasks."""
    script = (EXAMPLES / "slurm.sbatch").read_text()
    assert "--signal=TERM@180" in script
    assert "--requeue" in script
    assert "trap" not in script


# ---- Kubernetes ----------------------------------------------------------------------------------


def pods(name: str) -> list[dict[str, Any]]:
    """The pods' specs in a file."""
    found = []
    for document in read(name):
        spec = document["spec"]
        if "pytorchReplicaSpecs" in spec:
            found += [r["template"]["spec"] for r in spec["pytorchReplicaSpecs"].values()]
        else:
            jobs = spec.get("template", {}).get("spec", spec).get("replicatedJobs", [])
            found += [job["template"]["spec"]["template"]["spec"] for job in jobs]
    return found


@pytest.mark.parametrize("name", KUBERNETES)
def test_pods_have_time_to_save_and_storage_to_share(name: str) -> None:
    (pod,) = pods(name)
    assert pod["terminationGracePeriodSeconds"] >= 45, "30 s for the workers, some for torchrun"
    (container,) = pod["containers"]
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert places == {"shared": "/shared", "shm": "/dev/shm"}
    assert "persistentVolumeClaim" in volumes["shared"]
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"


@pytest.mark.parametrize("name", KUBERNETES)
def test_commands_are_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (container,) = pods(name)[0]["containers"]
    trainers = [d["spec"].get("trainer") for d in read(name)]
    container = next((t for t in trainers if t), container)
    assert container["command"] == ["python", "-m", "arra.train.launch"]
    options = parse_args(container["args"])
    assert options.training_script == "arra.cli"
    config = trained(monkeypatch, options.training_script_args)
    assert config.data_folder.startswith("/shared/")
    assert config.out.startswith("/shared/")
    reserved = {e["name"] for e in container.get("env", []) if e["name"].startswith("PET_")}
    assert not reserved, "the operator sets these itself"


@pytest.mark.parametrize("name", KUBERNETES[:2])
def test_exit_codes_decide_what_follows(name: str) -> None:
    document = read(name)[0]
    jobset = document["spec"].get("template", document)["spec"]
    assert jobset["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    (job,) = (j["template"]["spec"] for j in jobset["replicatedJobs"])
    rules = job["podFailurePolicy"]["rules"]
    by_code = {r["onExitCodes"]["values"][0]: r["action"] for r in rules if "onExitCodes" in r}
    assert by_code == {PREEMPTED: "Ignore", 2: "FailJob"}
    assert [r["action"] for r in rules if "onPodConditions" in r] == ["Ignore"]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "else there is no podFailurePolicy"


def test_jobset_meets_at_its_first_pod() -> None:
    (document,) = read("jobset.yaml")
    (job,) = document["spec"]["replicatedJobs"]
    nodes = job["template"]["spec"]
    (container,) = pods("jobset.yaml")[0]["containers"]
    options = parse_args(container["args"])
    name = document["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    assert options.rdzv_endpoint == f"{name}-{job['name']}-0-0.{name}:{port}"
    assert nodes["parallelism"] == nodes["completions"] == int(options.nnodes.split(":")[1])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert int(options.nproc_per_node) == gpus


def test_the_job_uses_its_runtime() -> None:
    runtime, job = read("kubeflow-trainjob.yaml")
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    # Kubeflow Trainer looks for a job and a container of this name.
    assert runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["name"] == "node"
    assert pods("kubeflow-trainjob.yaml")[0]["containers"][0]["name"] == "node"
