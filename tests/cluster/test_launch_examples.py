"""The launch examples, run with a scheduler's programs replaced: what they would start is started."""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "launch"


def _program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _environment(tmp_path: Path) -> dict[str, str]:
    """Where torchrun only writes down how it was called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    _program(programs, "torchrun", f'echo "$*" >> {tmp_path / "calls"}; [[ "$*" != *fail* ]]')
    data, output = tmp_path / "data", tmp_path / "run"
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DATA": str(data), "OUTPUT": str(output)}


def _slurm(tmp_path: Path) -> None:
    requeue = f'if [[ $1 == requeue ]]; then echo "$*" >> {tmp_path / "requeued"}; else printf "node1\\nnode2\\n"; fi'
    _program(tmp_path / "bin", "scontrol", requeue)
    _program(tmp_path / "bin", "srun", '[[ $1 == --* ]] && shift; exec "$@"')


def test_slurm_queues_again_what_a_signal_stopped(tmp_path: Path) -> None:
    environment = _environment(tmp_path) | {"SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "77"}
    _slurm(tmp_path)
    command = ["bash", LAUNCH / "slurm.sbatch"]
    _program(tmp_path / "bin", "torchrun", '[[ "$*" == *doctor* ]] || exit 9')
    assert subprocess.run(command, env=environment).returncode == 9 and not (tmp_path / "requeued").exists()
    stopped = tmp_path / "run" / "stopped.json"
    _program(
        tmp_path / "bin", "torchrun", f'[[ "$*" == *doctor* ]] || {{ mkdir -p {stopped.parent}; > {stopped}; exit 9; }}'
    )
    assert subprocess.run(command, env=environment).returncode == 0
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"


@pytest.mark.parametrize("begun", [False, True])
def test_slurm_examines_the_ranks_then_trains_or_goes_on(begun: bool, tmp_path: Path) -> None:
    environment = _environment(tmp_path) | {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "77",
        "SLURM_GPUS_ON_NODE": "4",
    }
    _slurm(tmp_path)
    if begun:
        (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (tmp_path / "calls").read_text().splitlines()
    shared = "--nnodes 2 --nproc-per-node 4"
    assert shared in first and "--rdzv-endpoint node1:20077" in first and "ntpseg.cli doctor --data" in first
    assert shared in second and "ntpseg.cli train base data.path=" in second and "--deepspeed zero2" in second
    assert second.endswith("--autoresume"), "begins where nothing has begun, and else goes on"
    assert "--max-restarts 0" in first and "--max-restarts 3" in second
    assert re.search(r"--rdzv-id (\S+)", first)[1] != re.search(r"--rdzv-id (\S+)", second)[1]


@pytest.mark.parametrize("name", ["slurm.sbatch", "ssh.sh"])
def test_a_folder_that_is_not_named_ends_in_a_line(name: str, tmp_path: Path) -> None:
    environment = _environment(tmp_path)
    del environment["DATA"]
    done = subprocess.run(["bash", LAUNCH / name, "node1"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "DATA must be the folder" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_slurms_directives_are_ones_that_it_knows() -> None:
    known = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "output"}
    known |= {"open-mode", "signal", "requeue"}
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert lines[0].startswith("#!") and len(directives) >= 5
    # Slurm stops reading directives at the first command
    assert all(line.startswith("#") for line in lines[: lines.index(directives[-1])])
    assert {re.match(r"#SBATCH --([a-z-]+)", line)[1] for line in directives} <= known


def test_ssh_starts_every_host_and_hears_of_a_failure(tmp_path: Path) -> None:
    environment = _environment(tmp_path) | {"SSH": "fake-ssh", "GPUS": "2"}
    _program(tmp_path / "bin", "fake-ssh", 'host=$1; shift; cd /; eval "$*"')
    command = ["bash", str(LAUNCH / "ssh.sh"), "a", "b"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 4 and all("--nnodes 2" in call and "--master-addr a" in call for call in calls)
    assert [" doctor " in call for call in calls] == [True, True, False, False]
    assert {re.search(r"--node-rank (\d)", call)[1] for call in calls[:2]} == {"0", "1"}
    (tmp_path / "calls").unlink()
    environment["PRESET"] = "fail"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_ssh_really_starts_two_ranks(tmp_path: Path) -> None:
    """Two "hosts" are this machine; the doctor meets over gloo, and then training says that the data is missing."""
    programs, data = tmp_path / "bin", tmp_path / "data"
    for folder in (programs, data):
        folder.mkdir()
    _program(programs, "fake-ssh", 'shift; eval "$*"')
    _program(programs, "torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    environment |= {"SSH": "fake-ssh", "GPUS": "1", "PORT": str(_free_port()), "PRESET": "tiny", "DATA": str(data)}
    environment |= {"OUTPUT": str(tmp_path / "run"), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(LAUNCH / "ssh.sh"), "localhost", "localhost"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert "2 ranks: a run can start" in done.stdout, done.stderr[-2000:]
    assert done.returncode != 0 and str(data) in done.stderr


def test_the_kubernetes_job_has_one_command_for_all_its_pods() -> None:
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    for replica in replicas.values():
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"  # the operator looks for it by this name
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        volumes = {volume["name"] for volume in replica["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
        (script,) = container["args"]
        assert script.index("doctor") < script.index("train") and "--deepspeed zero2" in script
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0


def test_the_container_file_installs_what_the_package_names() -> None:
    text = (LAUNCH / "Containerfile").read_text()
    extras = re.search(r"\.whl\)\[([a-z,]+)\]", text)[1].split(",")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])
    assert "NTPSEG_FORCE_CUDA=1" in text and "--no-build-isolation" in text
    version = re.search(r"pytorch:(\d+\.\d+)", text)[1]
    (wanted,) = (line for line in project["dependencies"] if line.startswith("torch>"))
    low, high = re.search(r">=([\d.]+),<([\d.]+)", wanted).groups()
    as_numbers = [tuple(map(int, value.split("."))) for value in (low, version, high)]
    assert as_numbers[0] <= as_numbers[1] < as_numbers[2]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["slurm.sbatch", "ssh.sh"])
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    subprocess.run(["shellcheck", "-s", "bash", str(LAUNCH / name)], check=True)
