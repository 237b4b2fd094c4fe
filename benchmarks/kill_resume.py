"""Kill runs at random moments, go on with them, and compare their weights with those of a run that was never killed.

    python benchmarks/kill_resume.py

A trial starts a run, kills all its processes (SIGKILL) at a moment at which a whole run trains, goes on with
`--ckpt_path last`, and at the end compares last.ckpt and best.ckpt with those of the whole run, bit by bit. The run has
all that makes it hard: dropout, two accumulated batches, a worker process that loads ahead, several epochs, validations
and checkpoints at steps that do not coincide; half of the trials have two processes (gloo). The model is a BERT of two
small layers with random weights. Exit code 1 if any trial ended differently.

Processes are forked from one that has imported everything, so that a trial takes seconds; what runs in them is what
`python -m crossenc` and torchrun run.
"""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from machine import begin, make_bert, make_parser, write_record

FORK = multiprocessing.get_context("forkserver")


def make_inputs(folder: Path) -> dict[str, Any]:
    """A small backbone and a small file of pairs in `folder`; returns the options of the run."""
    from crossenc.pairs import sample_pairs

    make_bert(folder / "backbone", 2, 32, intermediate_size=64)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text_a", "text_b", "label"])
        writer.writeheader()
        writer.writerows(sample_pairs()["train"][:130])
    return {
        "model.backbone": folder / "backbone",
        "model.learning_rate": 1e-3,
        "data.source": folder / "pairs.csv",
        "data.num_workers": 1,
        "data.test_size": 0,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.accumulate_grad_batches": 2,
        "trainer.val_check_interval": 22,
        "trainer.num_sanity_val_steps": 0,
        "trainer.logger": False,  # to whom pictures go, which would take half of the time
        "checkpoint_every_n_steps": 4,
        "ckpt_path": "last",
    }


def command(options: dict[str, Any], output: Path, processes: int) -> list[str]:
    more = {"output": output, "data.batch_size": 4 // processes, "trainer.devices": processes}
    return ["fit", *(f"--{name}={value}" for name, value in {**options, **more}.items())]


def work(arguments: list[str], environment: dict[str, str], said: Path) -> None:
    """What a forked process does: the command line, in a session of its own, so that its workers can be killed too."""
    os.setsid()
    target = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked from the server
    from lightning.pytorch.utilities import rank_zero_only

    from crossenc.cli import main

    rank_zero_only.rank = int(environment.get("RANK", 0))  # set from the environment at its import, which was before

    sys.exit(main(arguments))


def start_server() -> None:
    """Import everything once: its time is no part of a run's time, in which it is killed."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"  # of what was killed
    FORK.set_forkserver_preload(
        ["crossenc.run", "datasets", "pandas", "peft", "tensorboard", "transformers.models.bert.modeling_bert"]
    )
    ready = FORK.Process(target=int)
    ready.start()
    ready.join()


def start(arguments: list[str], processes: int, said: Path) -> list[Any]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        environment = {
            "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none",
        } if processes > 1 else {}  # fmt: skip
        started.append(
            FORK.Process(target=work, args=(arguments, {name: str(v) for name, v in environment.items()}, said))
        )
        started[-1].start()
    return started


def finish(started: list[Any], said: Path) -> None:
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        sys.exit(f"a run ended with {[process.exitcode for process in started]}:\n{said.read_text()}")


def kill(started: list[Any]) -> None:
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended, or has no session of its own yet
            process.kill()
    for process in started:
        process.join()


def training_of(run: Path, since: float) -> tuple[float, float]:
    """From when to when a run trained, in seconds after its start: in imports and exports a kill meets nothing."""
    begin, end = (run / name for name in ("config.yaml", "last.ckpt"))
    return begin.stat().st_mtime - since, end.stat().st_mtime - since


def step_of(file: Path) -> int | None:
    return torch.load(file, weights_only=True)["global_step"] if file.is_file() else None


def same(one: Path, other: Path) -> bool:
    ours, theirs = (torch.load(file, weights_only=True) for file in (one, other))
    return ours["global_step"] == theirs["global_step"] and all(
        torch.equal(value, theirs["state_dict"][name]) for name, value in ours["state_dict"].items()
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--kills", type=int, nargs="+", default=[1], help="kills in a trial, of the trials in turn")
    parser.add_argument("--epochs", type=int, default=8, help="of a run, 15 steps each")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the trials in turn")
    parser.add_argument("--strategy", default="ddp", choices=["ddp", "fsdp"], help="of two processes")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    arguments = begin(parser, "offline", data=False)
    draw, trials = random.Random(arguments.seed), []
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("HF_DATASETS_CACHE", str(folder / "cache"))
        start_server()
        options, whole, seconds = make_inputs(folder), {}, {}
        options["trainer.max_epochs"] = arguments.epochs
        for processes in set(arguments.processes):
            options["trainer.strategy"] = arguments.strategy if processes > 1 else "auto"
            whole[processes], said, since = folder / f"whole-{processes}", folder / "whole.log", time.time()
            finish(start(command(options, whole[processes], processes), processes, said), said)
            seconds[processes] = training_of(whole[processes] / "run", since)
            told = "{} processes: a whole run trains from {:.1f} to {:.1f} s"
            print(told.format(processes, *seconds[processes]), flush=True)
        for trial in range(arguments.trials):
            processes = arguments.processes[trial % len(arguments.processes)]
            options["trainer.strategy"] = arguments.strategy if processes > 1 else "auto"
            output, said = folder / str(trial), folder / f"{trial}.log"
            run, killed = command(options, output, processes), []
            for _ in range(arguments.kills[trial % len(arguments.kills)]):
                started, moment = start(run, processes, said), draw.uniform(*seconds[processes])
                time.sleep(moment)
                kill(started)
                killed.append({"seconds": round(moment, 2), "last_step": step_of(output / "run" / "last.ckpt")})
            finish(start(run, processes, said), said)
            equal = all(
                same(output / "run" / file, whole[processes] / "run" / file) for file in ("last.ckpt", "best.ckpt")
            )
            trials.append({"processes": processes, "killed": killed, "identical": equal})
            print(trials[-1], flush=True)
            identical = sum(trial["identical"] for trial in trials)
            write_record(arguments.out, {"seed": arguments.seed, "identical": identical, "trials": trials})
    print(f"{identical} of {len(trials)} ended bit-identical")
    sys.exit(identical < len(trials))


if __name__ == "__main__":
    main()
