r"""Mining: what the cross-encoder adds to a bi-encoder on groups that are known, and how time and memory grow.

    python -m crossenc fit --config configs/quora-best.yaml --run quora \
        --seed_everything 1 --trainer.precision 32-true \
        --data.source ../shared/data/quora/train.tsv --data.val_source ../shared/data/quora/dev.tsv
    python benchmarks/mining.py pairs --folder pairs
    python -m crossenc fit --run mining --model.backbone checkpoints/quora/model --model.symmetric true \
        --model.shared_segments true --model.learning_rate 1e-4 --data.batch_size 32 --trainer.max_epochs 3 \
        --trainer.precision 32-true \
        --data.source pairs/train.csv --data.val_source pairs/dev.csv
    python benchmarks/mining.py quality --model checkpoints/mining/model --out benchmarks/mining_quality.json
    python benchmarks/mining.py scale --out benchmarks/mining_scale.json
    python benchmarks/mining.py floor

`pairs` writes what the retriever finds in the sample's training groups: the model goes on with them, so that it
has seen such candidates as it will be given. `quality` mines the test groups' questions, of which neither saw one, by
the model alone and with the dev pairs.
`scale` mines real questions, blown up by sampling and light edits; its bi-encoder is the first two layers of
all-MiniLM-L6-v2 and its cross-encoder one small layer, so that it ends within minutes. Each run is a process whose
phases are told apart by what it leaves on the disk, and whose peak of memory is reset between them. `floor` tells how
many of the real duplicates have vectors of at least some similarity. Needs the extras `mine` and `offline`.
"""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from machine import (
    BACKBONE,
    begin,
    make_parser,
    make_tiny,
    peak_memory,
    quiet,
    read_record,
    read_tsv,
    require_data,
    write_record,
)

# The sample's duplicates are worded less alike than Quora's.
SAMPLE_FLOOR = 0.35
PHASES = {"vectors": "copies", "neighbours": "vectors", "scores": "neighbours"}  # a folder's first sight ends a phase


def make_retriever(folder: Path) -> Path:
    """The first two layers of the offline bi-encoder."""
    from sentence_transformers import SentenceTransformer

    from crossenc.backbone import locate

    model = SentenceTransformer(locate(BACKBONE), device="cpu")
    inner = model[0].auto_model
    inner.encoder.layer = inner.encoder.layer[:2]
    inner.config.num_hidden_layers = 2
    model.save(str(folder))
    return folder


def make_questions(data: Path, count: int) -> list[str]:
    """Real questions: all different ones first, then samples of them with light edits, three in ten exact copies."""
    texts: dict[str, None] = {}
    for name in ("train.tsv", "dev.tsv"):
        for a, b, _ in read_tsv(data / name):
            texts |= {a: None, b: None}
    real, draw = list(texts), random.Random(0)
    return (real + [edit(draw.choice(real), draw) for _ in range(count - len(real))])[:count]


def edit(text: str, draw: random.Random) -> str:
    """The same, or with a word left out, two words turned, two letters turned, or other first words."""
    words, kind = text.split(), draw.random()
    if kind < 0.3 or len(words) < 4:
        return draw.choice([text, text.lower(), f" {text}"])
    place = draw.randrange(1, len(words) - 1)
    if kind < 0.5:
        del words[place]
    elif kind < 0.7:
        words[place], words[place + 1] = words[place + 1], words[place]
    elif kind < 0.9:
        word = words[place]
        words[place] = word[:1] + word[2:3] + word[1:2] + word[3:]
    else:
        words = ["Please", "tell", "me:", *words]
    return " ".join(words)


def sample_questions(split: str) -> tuple[list[str], np.ndarray]:
    """Questions of one split of the embedded sample's groups, as its pairs are split, and the group of each."""
    from crossenc.pairs import sample_groups

    by_topic: dict[str, list[list[str]]] = {}
    for group in sample_groups():
        by_topic.setdefault(group["topic"], []).append(group["questions"])
    topics = list(by_topic.values())
    parts = {"train": [own[:5] for own in topics], "val": [own[5:] for own in topics[0::2]]}
    parts["test"] = [own[5:] for own in topics[1::2]]
    groups = [questions for own in parts[split] for questions in own]
    of = [number for number, questions in enumerate(groups) for _ in questions]
    return [question for questions in groups for question in questions], np.array(of)


def write_pairs(folder: Path) -> None:
    """Pairs to train on for mining, and dev pairs: all of a group, and what the retriever finds across groups."""
    from crossenc.neighbors import embed

    for split, name in (("train", "train.csv"), ("val", "dev.csv")):
        texts, of = sample_questions(split)
        a, b = np.triu_indices(len(texts), 1)
        vectors = embed(texts, BACKBONE, {})
        similarities, same = (vectors @ vectors.T)[a, b], of[a] == of[b]
        rows = np.random.default_rng(0).permutation(np.flatnonzero(same | (similarities >= SAMPLE_FLOOR)))
        with (folder / name).open("w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            writer.writerow(["text_a", "text_b", "label"])
            writer.writerows((texts[a[row]], texts[b[row]], int(of[a[row]] == of[b[row]])) for row in rows)


def quality(model: str, dev: Path) -> dict[str, Any]:
    from crossenc import mine
    from crossenc.neighbors import embed

    texts, of = sample_questions("test")
    true = {(a, b) for a, b in combinations(range(len(texts)), 2) if of[a] == of[b]}
    vectors = embed(texts, BACKBONE, {})
    a, b = np.triu_indices(len(texts), 1)
    similarities = (vectors @ vectors.T)[a, b]
    order = np.argsort(-similarities, kind="stable")
    hits = np.cumsum(of[a[order]] == of[b[order]])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + len(true))
    best = int(f1.argmax())
    before = {"threshold": float(similarities[order[best]]), "precision": hits[best] / (best + 1)}
    before |= {"recall": hits[best] / len(true), "f1": f1[best]}
    record: dict[str, Any] = {"questions": len(texts), "groups": int(of.max()) + 1, "true_pairs": len(true)}
    record["bi-encoder at its best threshold"] = {name: float(value) for name, value in before.items()}
    thresholds = np.arange(SAMPLE_FLOOR, 0.7, 0.01)
    groups = [figures(complete(a, b, similarities, least, len(texts)), true) for least in thresholds]
    record["groups of the bi-encoder, complete linkage, at their best threshold"] = max(groups, key=lambda of: of["f1"])
    for more in ({}, {"both_orders": True}, {"dev": str(dev)}, {"dev": str(dev), "both_orders": True}):
        called = " ".join(["mine", *(f"--{name.replace('_', '-')}" for name in more)])
        for linkage in ("components", "complete"):
            found = mine(model, texts, retriever=BACKBONE, min_similarity=SAMPLE_FLOOR, linkage=linkage, **more)
            record[called] = figures({(row["a"], row["b"]) for row in found.pairs}, true)
            of_group = {row["id"]: row["group"] for row in found.groups}
            record[f"groups of {called} --linkage {linkage}"] = figures(pairs_within(of_group), true)
    print("| pairs by | precision | recall | F1 |\n|---|---|---|---|")
    for name, row in record.items():
        if isinstance(row, dict):
            print(f"| {name} | {row['precision']:.3f} | {row['recall']:.3f} | {row['f1']:.3f} |")
    return record


def complete(a: np.ndarray, b: np.ndarray, scores: np.ndarray, least: float, count: int) -> set[tuple[int, int]]:
    """Pairs within the groups that `mine --linkage complete` makes of scored pairs."""
    from crossenc.mining import DUPLICATE, group

    kept = scores >= least
    pairs = np.zeros(int(kept.sum()), dtype=DUPLICATE)
    pairs["a"], pairs["b"], pairs["score"] = a[kept], b[kept], scores[kept]
    groups, _ = group(pairs, count, "complete")
    return pairs_within({row: number for row, number in enumerate(groups.tolist()) if number >= 0})


def pairs_within(of_group: dict[int, int]) -> set[tuple[int, int]]:
    made: dict[int, list[int]] = {}
    for row in sorted(of_group):
        made.setdefault(of_group[row], []).append(row)
    return {pair for members in made.values() for pair in combinations(members, 2)}


def figures(found: set[tuple[int, int]], true: set[tuple[int, int]]) -> dict[str, float]:
    hits = len(found & true)
    precision, recall = hits / max(1, len(found)), hits / len(true)
    return {"pairs": len(found), "precision": precision, "recall": recall, "f1": 2 * hits / (len(found) + len(true))}


def scale(data: Path, counts: list[int], options: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {"options": options}
    print("| rows | phase | seconds | peak, MB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as space:
        model, retriever = make_tiny(Path(space) / "model"), make_retriever(Path(space) / "retriever")
        for count in counts:
            file, output = Path(space) / f"{count}.csv", Path(space) / f"{count}-out.csv"
            with file.open("w", encoding="utf-8", newline="") as out:
                csv.writer(out).writerows([("text",), *((text,) for text in make_questions(data, count))])
            command = [sys.executable, "-m", "crossenc", "mine", str(model), str(file), str(output), *options]
            command += ["--retriever", str(retriever)]
            phases, said = watch(command, Path(space) / f".{count}-out.csv.parts")
            for name, (seconds, memory) in phases.items():
                print(f"| {count:,} | {name} | {seconds:.1f} | {memory:,.0f} |", flush=True)
            told = ("memory", "index", "copies", "to score", "groups", "per second")
            record[str(count)] = {
                "phases": {name: {"seconds": seconds, "peak_mb": memory} for name, (seconds, memory) in phases.items()},
                "log": [line for line in said if any(word in line for word in told)],
            }
            print(*record[str(count)]["log"], sep="\n", flush=True)
    return record


def watch(command: list[str], work: Path) -> tuple[dict[str, tuple[float, float]], list[str]]:
    """Seconds and peak memory (MB) of each phase of a mining run, and what it logs."""
    found: dict[str, tuple[float, float]] = {}
    seen: set[str] = set()
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        peak = 0.0
        while process.poll() is None:
            peak = peak_memory(process.pid) or peak
            now = time.perf_counter()
            for folder, phase in PHASES.items():
                if folder not in seen and (work / folder).is_dir():
                    seen.add(folder)
                    found[phase] = (now - start, peak)
                    start = now
                    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # the kernel's way to reset the peak
            time.sleep(0.05)
        found["scores, groups, output"] = (time.perf_counter() - start, peak)
        log.seek(0)
        said = log.read().splitlines()
    if process.returncode:
        sys.exit("\n".join(said))
    return found, said


def floor(data: Path) -> dict[str, Any]:
    from crossenc.neighbors import embed

    first, second, labels = zip(*read_tsv(data / "train.tsv"), strict=True)
    similarities = (embed(first, BACKBONE, {}) * embed(second, BACKBONE, {})).sum(1)
    same, record = np.array(labels) == "1", {}
    print("| cosine of at least | of the duplicates | of the other pairs |\n|---|---|---|")
    for limit in (0.4, 0.5, 0.6, 0.7, 0.8):
        record[str(limit)] = [float((similarities[same == of] >= limit).mean()) for of in (True, False)]
        print(f"| {limit} | {100 * record[str(limit)][0]:.1f} % | {100 * record[str(limit)][1]:.1f} % |")
    return record


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["pairs", "quality", "scale", "floor"])
    parser.add_argument("--model", default="checkpoints/quickstart/model", help="the export that quality mines with")
    parser.add_argument("--rows", type=json.loads, default=[20_000, 60_000, 200_000], help="list of sizes")
    parser.add_argument("--options", default="--top-k 5 --min-similarity 0.8")
    parser.add_argument("--folder", type=Path, default=Path("pairs"), help="where train.csv and dev.csv are")
    arguments = begin(parser, "mine", "offline", data=False)
    quiet()
    if arguments.what in ("scale", "floor"):
        require_data(arguments.data)
    if arguments.what == "pairs":
        arguments.folder.mkdir(parents=True, exist_ok=True)
        write_pairs(arguments.folder)
        return
    if arguments.what == "quality":
        record = quality(arguments.model, arguments.folder / "dev.csv")
    elif arguments.what == "scale":
        record = scale(arguments.data, arguments.rows, arguments.options.split())
    else:
        record = floor(arguments.data)
    write_record(arguments.out, read_record(arguments.out) | record)


if __name__ == "__main__":
    main()
