"""The README's commands for many devices, as far as one machine allows, and what they do when a process is lost.

Two machines are two network namespaces, each with an address of its own; SLURM is what it tells its tasks.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from .conftest import flags, run_on, runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text().splitlines()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
NAMES, ADDRESSES = (f"cx-{os.getpid()}-a", f"cx-{os.getpid()}-b"), ("10.213.7.1", "10.213.7.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[list[list[str]]]:
    """For each of two machines, the words that run a command there and nowhere else."""
    if shutil.which("ip") is None:
        pytest.skip("needs the command ip, from iproute2")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", NAMES[0], "type", "veth", "peer", "name", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES, strict=True):
            ip("link", "set", name, "netns", name)
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            for device in (name, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield [["ip", "netns", "exec", name] for name in NAMES]
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def readme(first: str) -> list[str]:
    """The words of the README's command for many devices that begins so."""
    (line,) = (line for line in README if line.startswith(first) and "configs/ddp.yaml" in line)
    return shlex.split(line)


def exported() -> dict[str, str]:
    """What the README sets for torchrun."""
    return dict(line.removeprefix("export ").split("=") for line in README if line.startswith("export TORCH"))


def options(pairs_file: Path, backbone: Path, output: Path) -> list[str]:
    """Sixteen epochs of 6 steps for two processes, to stand behind the README's words."""
    named = {
        "data.source": pairs_file,
        "data.batch_size": 4,
        "model.backbone": backbone,
        "model.learning_rate": 1e-3,
        "trainer.max_epochs": 16,
        "trainer.val_check_interval": 40,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
        "trainer.logger": False,  # to whom pictures go, which would take longer than what is trained
        "checkpoint_every_n_steps": 4,
        "output": output,
        "run": "run",
    }
    return flags(named)


def start(words: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A process whose standard error goes to a file: of two that wait for each other, none may wait for a reader."""
    words = [{"python": sys.executable}.get(word, word) for word in words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with log.open("wb") as said:
        return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said, cwd=ROOT, env=environment)


def end(processes: list[subprocess.Popen[bytes]], logs: list[Path], timeout: float) -> list[str]:
    """What processes said, that end within so many seconds."""
    until = time.monotonic() + timeout
    try:
        for process in processes:
            process.wait(max(until - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(f"{log.name}: {log.read_text()}" for log in logs))
    return [log.read_text() for log in logs]


def children(process: subprocess.Popen[bytes]) -> list[int]:
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found if "crossenc" in Path(f"/proc/{pid}/cmdline").read_text()]


def wait_for(file: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + 120
    while not file.exists():
        time.sleep(0.01)
        if process.poll() is not None or time.monotonic() > until:
            pytest.fail(f"no {file}: {log.read_text()}")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "run" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def alone(pairs_file: Path, tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of two processes on one machine that nothing happened to."""
    output = tmp_path_factory.mktemp("alone")
    words = [*readme("python -m crossenc")[3:], *options(pairs_file, tiny_backbone, output)]
    run_on(2, [str(ROOT / word) if word.startswith("configs/") else word for word in words], output / "log")
    return output


def test_torchrun_over_two_machines_goes_on_after_a_death_and_trains_the_same(
    machines: list[list[str]], alone: Path, pairs_file: Path, tiny_backbone: Path, tmp_path: Path
):
    words = " ".join(readme("torchrun")).replace("HOST", ADDRESSES[0]).replace("per-node=8", "per-node=1").split()
    started, output, logs = [], tmp_path / "shared", [tmp_path / name for name in NAMES]
    try:
        for there, name, address, log in zip(machines, NAMES, ADDRESSES, logs, strict=True):
            # What else tells a machine its address and its part is its name.
            own = [f"--local-addr={address}", f"--rdzv-conf=is_host={name == NAMES[0]}"]
            command = [*there, *TORCHRUN, *own, *words[1:], *options(pairs_file, tiny_backbone, output)]
            started.append(start(command, log, GLOO_SOCKET_IFNAME=name, **exported()))
        wait_for(output / "run" / "last.ckpt", started[0], logs[0])
        (worker,) = children(started[1])
        os.kill(worker, signal.SIGKILL)
        said = end(started, logs, 240)
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    assert "resuming from" in said[0]
    assert all(torch.equal(value, weights(alone)[name]) for name, value in weights(output).items())
    assert [path.name for path in output.iterdir()] == ["run"]


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_the_others_stop_when_a_process_dies(pairs_file: Path, tiny_backbone: Path, tmp_path: Path, launcher: str):
    """Within a minute, with a line that says so, and no traceback of ours."""
    words = [*readme("python -m crossenc"), *options(pairs_file, tiny_backbone, tmp_path)]
    if launcher == "lightning":
        words += ["--trainer.devices=2"]
    else:
        words = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "--", *words[2:]]
    log = tmp_path / "log"
    process = start(words, log)
    try:
        wait_for(tmp_path / "run" / "last.ckpt", process, log)
        os.kill(children(process)[-1], signal.SIGKILL)
        (said,) = end([process], [log], 60)
    finally:
        process.kill()
    assert process.returncode not in (0, None)
    assert "error: another process of the run ended, so this one stops too" in said
    assert launcher == "torchrun" or "Traceback" not in said


def test_a_process_ends_when_the_first_one_dies_before_they_are_joined(
    pairs_file: Path, tiny_backbone: Path, tmp_path: Path
):
    words = [*readme("python -m crossenc"), *options(pairs_file, tiny_backbone, tmp_path), "--trainer.devices=2"]
    log = tmp_path / "log"
    first = start(words, log)
    while not (others := children(first)):
        assert first.poll() is None, log.read_text()
        time.sleep(0.01)
    first.kill()
    first.wait()
    until = time.monotonic() + 60
    while (left := [pid for pid in others if runs(pid)]) and time.monotonic() < until:
        time.sleep(0.1)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, log.read_text()
    assert log.read_text().endswith("error: the first process of the run died, so this one stops too\n")


@pytest.mark.parametrize("count", [1, 2])
def test_slurm_puts_the_job_into_the_queue_again_and_it_goes_on(
    alone: Path, pairs_file: Path, tiny_backbone: Path, tmp_path: Path, count: int
):
    """Tasks with what srun tells them, and a scontrol that takes a note (codecarbon asks it for more)."""
    scontrol, queue = tmp_path / "bin" / "scontrol", tmp_path / "queue"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\n[ "$1" != requeue ] || echo "$@" >> {queue}\n')
    scontrol.chmod(0o755)
    job = {"JOB_ID": str(os.getpid()), "JOB_NAME": "crossenc", "NODELIST": "127.0.0.1", "NTASKS_PER_NODE": "1"}
    job |= dict.fromkeys(("NTASKS", "NNODES"), str(count))
    environment = {f"SLURM_{name}": value for name, value in job.items()}
    environment["PATH"] = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    words = [*readme("srun")[1:], *options(pairs_file, tiny_backbone, tmp_path), "--trainer.devices=1"]
    words += [f"--trainer.num_nodes={count}", f"--data.batch_size={8 // count}"]
    logs = [tmp_path / f"log{rank}" for rank in range(count)]

    def tasks() -> list[subprocess.Popen[bytes]]:
        places = ({"SLURM_PROCID": rank, "SLURM_NODEID": rank, "SLURM_LOCALID": "0"} for rank in map(str, range(count)))
        return [start(words, log, **environment, **place) for log, place in zip(logs, places, strict=True)]

    first = tasks()
    try:
        wait_for(tmp_path / "run" / "last.ckpt", first[0], logs[0])
        for process in first:  # at different steps
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.2)
        wait_for(queue, first[0], logs[0])
    finally:
        for process in first:
            process.kill()
            process.wait()
    assert queue.read_text().split() == ["requeue", environment["SLURM_JOB_ID"]]
    assert (tmp_path / "run" / "hpc_ckpt_1.ckpt").is_file()
    again = tasks()
    said = end(again, logs, 240)
    assert [process.returncode for process in again] == [0] * count, said
    assert torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["global_step"] == 16 * 6
    if count == 1:
        alone = tmp_path / "alone"
        end([start([*words, f"--output={alone}"], logs[0])], logs, 240)
    assert all(torch.equal(value, weights(alone)[name]) for name, value in weights(tmp_path).items())
