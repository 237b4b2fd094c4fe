"""Score chunks of pairs on one device or many: the engine under `score`, `rerank` and `mine`.

1 prepare   token ids of a chunk, its batches by length, in a thread of its own while the chunk before is computed
2 compute   logits, by torch or onnxruntime
3 share     with several devices one process each, which takes the next chunk when it is done with its last: none waits
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .backbone import load_tokenizer
from .encode import PairCollator, encode_texts
from .errors import BackboneError, CrossencError, LostProcessError, UsageError, require_choice
from .forward import padded, pair_logits, piece_cost
from .loading import find, fingerprint, load, longest_pair, require_head
from .onnx_model import OnnxModel, find_onnx
from .sampler import plan_evaluation

Precision: TypeAlias = Literal["32-true", "bf16-mixed", "bf16-true"]
Backend: TypeAlias = Literal["torch", "onnx", "onnx-int8"]
Texts: TypeAlias = list[tuple[str, str]]
Logits: TypeAlias = NDArray[np.float32]
# Tokens in a batch, padding included: as in evaluation, and few where a graph holds all of a batch's attention at once.
_TOKENS = {"onnx": 4_096, "cpu": 16_384, "cuda": 65_536}


@dataclass(frozen=True)
class Scoring:
    """What decides a pair's score: the model and how it is computed; and on how many devices."""

    model: str | Path
    precision: Precision = "32-true"
    backend: Backend = "torch"
    both_orders: bool = False
    devices: int = 1

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, Precision)
        require_choice("backend", self.backend, Backend)
        if self.devices < 1:
            raise UsageError(f"devices {self.devices} is not at least 1")
        if self.backend != "torch" and self.precision != "32-true":
            raise UsageError(f"precision {self.precision} is torch's; backend {self.backend} has its own")

    def find(self) -> Path:
        """The model's folder or checkpoint, for a look before any work; its weights are not read.

        Raises:
            BackboneError, CheckpointError, HubError: as `loading.find`; or there is no head of one label, or no file of
                the backend.
            MissingExtraError: onnxruntime is not installed.
        """
        path = find(self.model, onnx=self.backend != "torch")
        if path.is_file():
            from .checkpoints import read_checkpoint  # and with it Lightning, which takes seconds

            read_checkpoint(path, mmap=True)
            return path
        require_head(str(self.model), path)
        if self.backend != "torch":
            find_onnx(path, self.backend)
        elif not any(path.glob("*model*.safetensors")):
            raise BackboneError(f"{self.model} has no model.safetensors; transformers' save_pretrained writes one")
        return path

    def facts(self) -> dict[str, Any]:
        """What finished parts depend on, in plain types; the number of devices is none of it."""
        return {
            "model": fingerprint(self.find()),
            "precision": self.precision,
            "backend": self.backend,
            "both_orders": self.both_orders,
        }


def score_chunks(scoring: Scoring, chunks: Iterable[tuple[int, Texts]]) -> Iterator[tuple[int, Logits]]:
    """Logits of numbered chunks of pairs, each of shape (pairs,), in the order in which they are done."""
    if scoring.devices == 1:
        yield from _overlapped(Scorer(scoring), chunks)
    else:
        yield from _shared(scoring, chunks)


class Scorer:
    """One model on one device; the `rank`th of those that there are."""

    def __init__(self, scoring: Scoring, rank: int = 0) -> None:
        self.scoring = scoring
        threads = max(1, torch.get_num_threads() // scoring.devices)
        if scoring.backend != "torch":
            folder = scoring.find()
            self.tokenizer, self.max_length = load_tokenizer(str(folder)), longest_pair(folder)
            self.model: Any = OnnxModel(folder, scoring.backend, rank, threads)
            self.compute, self.tokens, cost = self._by_onnx, _TOKENS["onnx"], 2**40  # all in one piece
        else:
            self.model, self.tokenizer, self.max_length = load(scoring.model)
            self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
            if self.device.type == "cpu" and scoring.devices > 1:
                torch.set_num_threads(threads)
            self.model.to(self.device, torch.bfloat16 if scoring.precision == "bf16-true" else torch.float32)
            self.compute, self.tokens = self._by_torch, _TOKENS[self.device.type]
            cost = piece_cost(self.model.config.model_type, self.device.type)
        self.collate = PairCollator(self.tokenizer, piece_cost=cost)

    def prepare(self, texts: Texts) -> tuple[int, list[Any]]:
        """The number of rows to compute, and their batches: those of a chunk, or twice as many in both orders."""
        both = texts + [(b, a) for a, b in texts] if self.scoring.both_orders else texts
        table = encode_texts(both, self.tokenizer, self.max_length)
        plan = plan_evaluation(table["length"].to_numpy(), self.tokens, rank=0, ranks=1)
        return len(both), [self.collate(table.take(rows)) for rows in plan]

    def logits(self, prepared: tuple[int, list[Any]]) -> Logits:
        """The logits of a chunk, in its order; the mean of both orders where both were asked for."""
        logits = self.compute(*prepared)
        if not np.isfinite(logits).all():
            raise BackboneError(
                f"{self.scoring.model} gives some pairs no number: its weights are damaged, or too large for "
                f"{self.scoring.backend} in {self.scoring.precision}"
            )
        return logits.reshape(2, -1).mean(0) if self.scoring.both_orders else logits

    def _by_torch(self, count: int, batches: list[Any]) -> Logits:
        found = torch.empty(count, device=self.device)
        mixed = self.scoring.precision == "bf16-mixed"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            for batch in batches:
                there: Any = {
                    name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.items()
                }
                found[there["row"]] = pair_logits(self.model, there)
        logits: Logits = found.cpu().numpy()
        return logits

    def _by_onnx(self, count: int, batches: list[Any]) -> Logits:
        found = np.empty(count, dtype=np.float32)
        for batch in batches:
            (inputs,) = padded(batch)
            found[batch["row"].numpy()] = self.model({name: values.numpy() for name, values in inputs.items()})
        return found


def _overlapped(scorer: Scorer, chunks: Iterable[tuple[int, Texts]]) -> Iterator[tuple[int, Logits]]:
    """A thread prepares the next chunk while the model computes the last; tokenizing leaves Python's lock."""
    with ThreadPoolExecutor(1) as pool:
        prepared = ((number, pool.submit(scorer.prepare, texts)) for number, texts in chunks)
        coming = next(prepared, None)
        while coming:
            (number, own), coming = coming, next(prepared, None)
            yield number, scorer.logits(own.result())


def _shared(scoring: Scoring, chunks: Iterable[tuple[int, Texts]]) -> Iterator[tuple[int, Logits]]:
    if scoring.backend == "torch" and torch.cuda.is_available() and scoring.devices > torch.cuda.device_count():
        raise UsageError(f"devices {scoring.devices} is more than the GPUs here, {torch.cuda.device_count()}")
    context = multiprocessing.get_context("spawn")  # a process that was forked cannot use a GPU
    tasks, results = context.Queue(), context.Queue()
    workers = [
        context.Process(target=_work, args=(scoring, rank, tasks, results), daemon=True)
        for rank in range(scoring.devices)
    ]
    coming = chain(chunks, [None] * scoring.devices)  # None ends a process

    def hand_out(count: int) -> int:
        """Put the next so many tasks into the queue, and say how many of them are chunks."""
        given = 0
        for task in islice(coming, count):
            tasks.put(task)
            given += task is not None
        return given

    try:
        for worker in workers:
            worker.start()
        # Each process computes one chunk and prepares the next; as many wait, and no more are read ahead.
        underway = hand_out(4 * scoring.devices)
        while underway:
            yield _next_result(results, workers)
            underway += hand_out(1) - 1
    finally:
        tasks.cancel_join_thread()  # after an error nobody takes what is left, and the end would wait for that
        begun = [worker for worker in workers if worker.pid]
        for worker in begun:
            worker.kill()
        for worker in begun:  # or it stays in the table of processes, and a GPU's memory may be held for a moment
            worker.join(10)


def _next_result(results: Any, workers: list[Any]) -> tuple[int, Logits]:
    while True:
        try:
            number, found = results.get(timeout=1)
        except queue.Empty:
            if dead := [worker for worker in workers if worker.exitcode]:
                cause = ", perhaps for want of memory" if dead[0].exitcode < 0 else ""
                raise LostProcessError(
                    f"a scoring process ended by itself (exit code {dead[0].exitcode}){cause}; "
                    "finished parts are kept: give the same command again, or fewer devices"
                ) from None
            continue
        if isinstance(found, Exception):
            raise found
        return number, found


def _work(scoring: Scoring, rank: int, tasks: Any, results: Any) -> None:
    """One device's process: takes chunks until its parent ends it, or ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's matter
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for number, logits in _overlapped(Scorer(scoring, rank), iter(tasks.get, None)):
            results.put((number, logits))
    except CrossencError as error:
        results.put((None, type(error)(str(error))))
    except Exception as error:
        results.put((None, RuntimeError(f"in a scoring process: {type(error).__name__}: {error}")))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
