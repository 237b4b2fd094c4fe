"""Kill `score` and `mine` at random moments and let them go on: the output is that of an unbroken run, to the byte.

    python benchmarks/kill.py --out benchmarks/kill.json

A process is killed (SIGKILL) after a random share of the time that the unbroken run took, 20 times for each command,
and the same command is given again until the end; every tenth time the second run is killed as well. Each process is
forked off one that has loaded the libraries, so that the time goes to the work. A cross-encoder of one small layer with
random weights, a bi-encoder of two layers, and questions and pairs of the real data. Needs the extras `mine` and
`offline`.
"""

from __future__ import annotations

import csv
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from machine import begin, make_parser, make_tiny, read_record, write_record
from mining import make_questions, make_retriever


def run(arguments: list[str], seconds: float | None) -> tuple[float, bool]:
    """Seconds that a command took, and whether it was killed before its end."""
    from crossenc.cli import main as crossenc

    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if not child:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            os._exit(crossenc(arguments))
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            taken = time.perf_counter() - start
            if ended:
                break
            if seconds is not None and taken >= seconds:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return taken, True
            time.sleep(0.002)
        log.seek(0)
        if status:
            sys.exit(log.read().decode())
    return taken, False


def soak(name: str, arguments: list[str], outputs: list[Path], times: int, draw: random.Random) -> dict[str, Any]:
    command = [name, *arguments]
    whole, _ = run(command, None)
    expected = [file.read_bytes() for file in outputs]
    moments, kept, equal = [], 0, 0
    work = outputs[0].with_name(f".{outputs[0].name}.parts")
    for number in range(times):
        for file in outputs:
            file.unlink()
        moment = draw.uniform(0.0, 1.0) * whole
        _, killed = run(command, moment)
        if killed and number % 10 == 9:
            run(command, draw.uniform(0.0, 1.0) * whole)
        kept += any(work.rglob("*.npy"))
        if not all(file.exists() for file in outputs) or work.exists():
            run([*command, "--overwrite"] if outputs[0].exists() else command, None)
        equal += [file.read_bytes() for file in outputs] == expected
        left = sorted(file.name for file in outputs[0].parent.iterdir())
        assert left == sorted([*(file.name for file in outputs), "in.csv"]), left
        moments.append({"seconds": round(moment, 2), "killed": killed})
        print(
            f"{name} {number + 1}: killed {killed} at {moment:.1f} of {whole:.1f} s, equal so far {equal}", flush=True
        )
    return {"unbroken_seconds": whole, "moments": moments, "with_parts": kept, "byte_identical": equal}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", choices=["score", "mine"])
    arguments = begin(parser, "mine", "offline")
    import faiss  # noqa: F401
    import sentence_transformers  # noqa: F401
    import torch

    torch.set_num_threads(1)  # a process that has used more cannot be forked
    draw = random.Random(0)
    record: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as space:
        model, retriever = make_tiny(Path(space) / "model"), make_retriever(Path(space) / "retriever")
        questions = make_questions(arguments.data, 30_000)
        retrieval = ["--retriever", str(retriever), "--top-k", "5", "--min-similarity", "0.5"]
        jobs: dict[str, tuple[list[Any], list[str], list[str]]] = {
            "score": ([("question1", "question2"), *pairwise(questions)], [], ["out.csv"]),
            "mine": ([("text",), *((text,) for text in questions[:4_500])], retrieval, ["out.csv", "out.groups.csv"]),
        }
        for name in [arguments.only] if arguments.only else jobs:
            (rows, options, outputs), folder = jobs[name], Path(space) / name
            folder.mkdir()
            with (folder / "in.csv").open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(rows)
            command = [str(model), str(folder / "in.csv"), str(folder / "out.csv"), *options]
            record[name] = soak(name, command, [folder / output for output in outputs], arguments.times, draw)
            shutil.rmtree(folder)
    record = read_record(arguments.out) | record
    write_record(arguments.out, record)
    print("| | runs | killed before the end | with parts on the disk | byte-identical |\n|---|---|---|---|---|")
    for name, found in record.items():
        killed = sum(moment["killed"] for moment in found["moments"])
        print(f"| {name} | {len(found['moments'])} | {killed} | {found['with_parts']} | {found['byte_identical']} |")


if __name__ == "__main__":
    main()
