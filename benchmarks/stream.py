"""Peak memory of `score` over the number of rows: the whole of it, and what reads and writes without the model.

    python benchmarks/stream.py --out benchmarks/stream.json

Each run is a process of its own, with a cross-encoder of one small layer, so that rows and not layers take the memory.
Ten million rows would take that model a quarter of an hour here: for them the parts are laid beside the output as a
run that was broken at its end would have left them, and the run checks all rows, finds every part and joins. Needs the
extra `offline`.
"""

from __future__ import annotations

import csv
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import begin, make_parser, make_tiny, peak_memory, read_record, write_record
from mining import make_questions

CHUNK = 10_000


def write_pairs(data: Path, file: Path, rows: int) -> None:
    questions = make_questions(data, 20_000)
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["id", "question1", "question2"])
        count = len(questions)
        writer.writerows((i, questions[i % count], questions[i * 7919 % count]) for i in range(rows))


def run(command: list[str], until: Path | None = None) -> tuple[float, float]:
    """Seconds and peak memory (MB) of a command; it is killed when there is a part in the folder `until`."""
    start, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        while process.poll() is None:
            peak = peak_memory(process.pid) or peak
            if until is not None and any(until.glob("*.npy")):
                process.kill()
            time.sleep(0.02)
        log.seek(0)
        if until is None and process.returncode:
            sys.exit(log.read())
    return time.perf_counter() - start, peak


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--joined", type=int, nargs="*", default=[100_000, 10_000_000], help="rows without the model")
    arguments = begin(parser, "offline")
    record: dict[str, Any] = {}
    print("| rows | | seconds | peak, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as space:
        model, file, output = make_tiny(Path(space) / "model"), Path(space) / "in.csv", Path(space) / "out.csv"
        command = [sys.executable, "-m", "crossenc", "score", str(model), str(file), str(output)]
        for what, counts in (("scored", arguments.rows), ("checked and joined", arguments.joined)):
            for rows in counts:
                write_pairs(arguments.data, file, rows)
                if what != "scored":
                    work = output.with_name(f".{output.name}.parts")
                    run(command, until=work)
                    mark = next(work.glob("*.npy")).name.partition("-")[2]  # of what the parts depend on
                    for number in range(-(-rows // CHUNK)):
                        logits = np.zeros(min(CHUNK, rows - CHUNK * number), dtype=np.float32)
                        np.save(work / f"{number:08d}-{mark}", logits)
                seconds, peak = run(command)
                with output.open("rb") as found:
                    assert sum(1 for _ in found) >= rows
                output.unlink()
                record[f"{rows} {what}"] = {"seconds": seconds, "peak_mb": peak}
                print(f"| {rows:,} | {what} | {seconds:.1f} | {peak:,.0f} |", flush=True)
    write_record(arguments.out, read_record(arguments.out) | record)


if __name__ == "__main__":
    main()
