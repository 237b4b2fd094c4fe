"""Score chunks of pairs on one device or several: the engine of `score`, `rerank` and `mine`.

1 prepare   tokenize a chunk and batch it by length, in a thread of its own, while the previous chunk is computed
2 compute   the logits, with torch or onnxruntime
3 share     several devices have a process each, which takes the next chunk when it has finished its last: none waits
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .backbone import load_tokenizer
from .encode import PairCollator, encode_texts
from .errors import BackboneError, CrossencError, LostProcessError, UsageError, require_choice, require_count
from .forward import padded, pair_logits, piece_cost
from .loading import find, fingerprint, load, longest_pair, require_head
from .onnx_model import OnnxModel, find_onnx
from .sampler import plan_evaluation

Precision: TypeAlias = Literal["32-true", "bf16-mixed", "bf16-true"]
Backend: TypeAlias = Literal["torch", "onnx", "onnx-int8"]
Texts: TypeAlias = list[tuple[str, str]]
Logits: TypeAlias = NDArray[np.float32]
# Tokens in a batch, padding included: as in evaluation, and few for ONNX, whose graph holds all attention at once.
_TOKENS = {"onnx": 4_096, "cpu": 16_384, "cuda": 65_536}


@dataclass(frozen=True)
class Scoring:
    """What decides a pair's score, the model and how it is computed; and the number of devices."""

    model: str | Path
    precision: Precision = "32-true"
    backend: Backend = "torch"
    both_orders: bool = False
    devices: int = 1

    def __post_init__(self) -> None:
        require_choice("precision", self.precision, Precision)
        require_choice("backend", self.backend, Backend)
        object.__setattr__(self, "devices", require_count("devices", self.devices))  # the class is frozen
        if self.backend != "torch" and self.precision != "32-true":
            raise UsageError(f"precision {self.precision} needs backend torch; {self.backend} has its own precision")

    def find(self) -> Path:
        """The model's folder or checkpoint, checked before any work; its weights are not read.

        Raises:
            BackboneError, CheckpointError, HubError: as in `loading.find`; or the model has no head with one label, or
                no file for the backend.
            MissingExtraError: onnxruntime is not installed.
        """
        path = find(self.model, onnx=self.backend != "torch")
        if path.is_file():
            from .checkpoints import read_checkpoint  # imports Lightning, which takes seconds

            read_checkpoint(path, mmap=True)
            return path
        require_head(str(self.model), path)
        if self.backend != "torch":
            find_onnx(path, self.backend)
        elif not any(path.glob("*model*.safetensors")):
            raise BackboneError(f"{self.model} has no model.safetensors; transformers' save_pretrained writes one")
        return path

    def facts(self) -> dict[str, Any]:
        """What finished parts depend on, in plain types; this does not include the number of devices."""
        return {
            "model": fingerprint(self.find()),
            "precision": self.precision,
            "backend": self.backend,
            "both_orders": self.both_orders,
        }


def score_chunks(scoring: Scoring, chunks: Iterable[tuple[int, Texts]]) -> Iterator[tuple[int, Logits]]:
    """Logits of numbered chunks of pairs, each of shape (pairs,), in the order in which they are finished."""
    if scoring.devices == 1:
        yield from _overlapped(Scorer(scoring), chunks)
    else:
        yield from _shared(scoring, chunks)


class Scorer:
    """A model on one device, that of number `rank`."""

    def __init__(self, scoring: Scoring, rank: int = 0) -> None:
        self.scoring = scoring
        threads = max(1, torch.get_num_threads() // scoring.devices)
        if scoring.backend != "torch":
            folder = scoring.find()
            self.tokenizer, self.max_length = load_tokenizer(str(folder)), longest_pair(folder)
            self.model: Any = OnnxModel(folder, scoring.backend, rank, threads)
            self.compute, self.tokens, cost = self._by_onnx, _TOKENS["onnx"], 2**40  # all in one piece
            self.device = torch.device("cpu")
        else:
            self.model, self.tokenizer, self.max_length = load(scoring.model)
            self.device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
            if self.device.type == "cpu" and scoring.devices > 1:
                torch.set_num_threads(threads)
            self.model.to(self.device, torch.bfloat16 if scoring.precision == "bf16-true" else torch.float32)
            self.compute, self.tokens = partial(pair_logits, self.model), _TOKENS[self.device.type]
            cost = piece_cost(self.model.config.model_type, self.device.type)
        self.collate = PairCollator(self.tokenizer, piece_cost=cost)

    def prepare(self, texts: Texts) -> tuple[int, list[Any]]:
        """The number of rows to compute, and their batches: the pairs of a chunk, and if asked for, swapped ones."""
        both = texts + [(b, a) for a, b in texts] if self.scoring.both_orders else texts
        table = encode_texts(both, self.tokenizer, self.max_length)
        plan = plan_evaluation(table["length"].to_numpy(), self.tokens, rank=0, ranks=1)
        return len(both), [self.collate(table.take(rows)) for rows in plan]

    def logits(self, prepared: tuple[int, list[Any]]) -> Logits:
        """The logits of a chunk, in its order; the mean over both orders of the texts if both were asked for."""
        count, batches = prepared
        found = torch.empty(count, device=self.device)
        mixed = self.scoring.precision == "bf16-mixed"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            for batch in batches:
                on_device = {
                    name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                    for name, value in batch.items()
                }
                found[on_device["row"]] = self.compute(on_device)
        logits: Logits = found.cpu().numpy()
        if not np.isfinite(logits).all():
            raise BackboneError(
                f"{self.scoring.model} gives NaN or infinity for some pairs: its weights are damaged, or too large for "
                f"{self.scoring.backend} in {self.scoring.precision}"
            )
        return logits.reshape(2, -1).mean(0) if self.scoring.both_orders else logits

    def _by_onnx(self, batch: Any) -> torch.Tensor:
        (inputs,) = padded(batch)
        logits = self.model({name: values.numpy() for name, values in inputs.items()})
        return torch.from_numpy(logits).float()  # other tools write graphs with 16 or 64 bits too


def _overlapped(scorer: Scorer, chunks: Iterable[tuple[int, Texts]]) -> Iterator[tuple[int, Logits]]:
    """A thread prepares the next chunk while the model computes the last; tokenizing releases Python's lock."""
    with ThreadPoolExecutor(1) as pool:
        submitted = ((number, pool.submit(scorer.prepare, texts)) for number, texts in chunks)
        upcoming = next(submitted, None)
        while upcoming:
            (number, prepared), upcoming = upcoming, next(submitted, None)
            yield number, scorer.logits(prepared.result())


def _shared(scoring: Scoring, chunks: Iterable[tuple[int, Texts]]) -> Iterator[tuple[int, Logits]]:
    if scoring.backend == "torch" and torch.cuda.is_available() and scoring.devices > torch.cuda.device_count():
        raise UsageError(
            f"devices must be at most {torch.cuda.device_count()}, the GPUs of this machine, not {scoring.devices}"
        )
    context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU
    tasks, results = context.Queue(), context.Queue()
    workers = [
        context.Process(target=_work, args=(scoring, rank, tasks, results), daemon=True)
        for rank in range(scoring.devices)
    ]
    upcoming = chain(chunks, [None] * scoring.devices)  # None ends a process

    def hand_out(count: int) -> int:
        """Put up to `count` further tasks into the queue, and return how many of them are chunks."""
        given = 0
        for task in islice(upcoming, count):
            tasks.put(task)
            given += task is not None
        return given

    try:
        for worker in workers:
            worker.start()
        # Each process computes one chunk and prepares the next; as many wait in the queue, and no more are read ahead.
        underway = hand_out(4 * scoring.devices)
        while underway:
            yield _next_result(results, workers)
            underway += hand_out(1) - 1
    finally:
        tasks.cancel_join_thread()  # after an error, the exit would wait for somebody to take the remaining tasks
        started = [worker for worker in workers if worker.pid]
        for worker in started:
            worker.kill()
        for worker in started:  # or they stay in the process table, and may hold a GPU's memory for a moment
            worker.join(10)


def _next_result(results: Any, workers: list[Any]) -> tuple[int, Logits]:
    while True:
        with suppress(queue.Empty):
            number, found = results.get(timeout=1)
            if isinstance(found, Exception):
                raise found
            return number, found
        if dead := [worker for worker in workers if worker.exitcode]:
            # An error while it works is sent here; one with exit code 1 could not even begin.
            unguarded = 'the script that called this has no `if __name__ == "__main__":`'
            cause = unguarded if dead[0].exitcode == 1 else "memory ran out"
            raise LostProcessError(
                f"a scoring process died (exit code {dead[0].exitcode}), perhaps because {cause}; "
                "finished parts are kept: run the same command again, or with fewer devices"
            )


def _work(scoring: Scoring, rank: int, tasks: Any, results: Any) -> None:
    """The process of one device: it takes chunks until its parent ends it or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # left to the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        for number, logits in _overlapped(Scorer(scoring, rank), iter(tasks.get, None)):
            results.put((number, logits))
    except (CrossencError, torch.OutOfMemoryError) as error:
        results.put((None, type(error)(str(error))))
    except Exception as error:
        results.put((None, RuntimeError(f"in a scoring process: {type(error).__name__}: {error}")))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
