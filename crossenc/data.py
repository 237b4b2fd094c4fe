"""PairDataModule: read, split, encode and load question pairs.

1 read    pairs.read              any source -> row, text_a, text_b, label (Arrow, cached)
2 split   splits                  by position or question -> train, val, test; `limit` keeps the first rows of each
3 encode  encode.encode           token ids (Arrow, cached), in `prepare_data`: once a machine, before other ranks read
4 order   sampler                 which pairs make a step, and which device takes them
5 load    DataLoader              batches, packed without padding
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from . import pairs
from .backbone import DEFAULT_BACKBONE, load_config, load_tokenizer, resolve_max_length
from .card import TITLES
from .encode import PairBatch, PairCollator, encode, tell_cut
from .errors import CheckpointError, DataError, UsageError, require_choice, require_count
from .forward import piece_cost
from .sampler import BatchBy, EvaluationOrder, TrainingOrder
from .splits import add_transitive, sizes, split_by_position, split_by_question, unseen

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

Split: TypeAlias = Literal["position", "question"]
OnMismatch: TypeAlias = Literal["refuse", "continue"]

# A process that is forked while a thread of torch.distributed enters Python may hang: python/cpython, issue 112275.
_FORKS_HANG = sys.version_info < (3, 11, 8)

QUORA, QUORA_SUBSET = "sentence-transformers/quora-duplicates", "pair-class"


class PairDataModule(LightningDataModule):
    """Question pairs for fit, validate and test; `predict` scores every pair of `source`, labels or not.

    Args:
        source: A csv, tsv, jsonl or parquet file; a folder with `train.*` and optionally `dev.*` and `test.*`; a Hub
            data set `ID` or `ID:SPLIT`; `FOLDER:SPLIT`, a folder laid out like a Hub data set; or `sample`, the bundled
            pairs, which have their own splits. Empty if there are only pairs to evaluate.
        subset: Configuration of the Hub data sets.
        val_source: Source of the dev pairs, given like `source`; null takes them from `source`.
        test_source: Source of the test pairs, given like `source`; null takes them from `source`.
        columns: Column names of the source: `{text_a: left, text_b: right, label: same}`. Not needed for common names
            (sentence1, question1, ..., label, is_duplicate, ...).
        split: `position` takes the first rows for dev and the next for test, as sentence-transformers' example does;
            `question` puts no question into two of the splits that `source` is cut into.
        val_size: Number of dev rows to take from `source`, or their fraction if under 1. Null: 10,000, or a tenth of a
            source with fewer than 100,000 rows; none if `val_source` or `test_source` is given.
        test_size: The same for the test rows.
        batch_size: Pairs per batch and device.
        batch_by: `pairs` puts `batch_size` pairs into every batch. `tokens` gives every step equally many tokens, and
            `batch_size` pairs on average: short pairs come in larger batches, and the number of steps is the same.
        window: Sort the pairs of this many steps by length before they are cut into steps: faster, but steps are less
            alike, which can cost quality. 1 is a plain shuffle; see `benchmarks/README.md` for figures.
        eval_tokens: Tokens in an evaluation batch, including padding. Null: 16,384 on a CPU, 65,536 elsewhere.
        num_workers: Processes that make batches; 0 uses the main process, which is enough for cached tokens. On several
            devices, more need Python 3.11.8 or newer.
        num_proc: Processes that tokenize; null uses the tokenizer's own threads, one for each core.
        transitive: Add training pairs that follow from others: if a and b are duplicates, a is to c what b is to c.
            Pairs that are among the dev or test pairs are not added.
        limit: Keep only this many rows of each split (the first ones), also for training; for a quick try.
        on_mismatch: When a checkpoint comes from other data, tokenizer, devices or batches: `refuse` to resume, or keep
            weights and optimizer and `continue` with the next epoch.
        symmetric: The model's.
        twice: Put every pair into a training batch twice, which the model's `consistency` needs.
        backbone: The model's; its tokenizer is used.
        max_length: The model's.
        revision: The model's.

    Raises:
        DataError: A file, column, row or label cannot be used.
        HubError: The Hub is out of reach.
    """

    def __init__(
        self,
        source: str = QUORA,
        subset: str | None = None,
        val_source: str | None = None,
        test_source: str | None = None,
        columns: dict[str, str] | None = None,
        split: Split = "position",
        val_size: float | None = None,
        test_size: float | None = None,
        batch_size: int = 64,
        batch_by: BatchBy = "pairs",
        window: int = 1,
        eval_tokens: int | None = None,
        num_workers: int = 0,
        num_proc: int | None = None,
        transitive: bool = False,
        limit: int | None = None,
        on_mismatch: OnMismatch = "refuse",
        symmetric: bool = False,
        twice: bool = False,
        backbone: str = DEFAULT_BACKBONE,
        max_length: int | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        require_choice("data.split", split, Split)
        require_choice("data.batch_by", batch_by, BatchBy)
        require_choice("data.on_mismatch", on_mismatch, OnMismatch)
        for name in (source, val_source, test_source):
            pairs.require_name(name)
        self.source, self.val_source, self.test_source = (str(name or "") for name in (source, val_source, test_source))
        self.subset, self.columns, self.split = subset, columns, split
        self.val_size, self.test_size = val_size, test_size
        self.batch_size = require_count("data.batch_size", batch_size)
        self.window = require_count("data.window", window)
        self.num_workers = require_count("data.num_workers", num_workers, 0)
        self.limit, self.eval_tokens, self.num_proc = (
            None if value is None else require_count(f"data.{name}", value)
            for name, value in (("limit", limit), ("eval_tokens", eval_tokens), ("num_proc", num_proc))
        )
        self.batch_by, self.on_mismatch = batch_by, on_mismatch
        self.trained_limit: int | None = None  # the `limit` of the run whose checkpoint is evaluated
        self.transitive, self.symmetric, self.twice = transitive, symmetric, twice
        self.train_loader: PairLoader | None = None
        self.position: dict[str, int] = {}
        self.begun = (0, 0)  # the step and the epoch since which the run has used the current batches
        self.backbone = str(backbone)  # a Path from Python
        self.tokenizer = load_tokenizer(self.backbone, revision)
        self.model_type = load_config(self.backbone, revision).model_type
        self.max_length = resolve_max_length(self.backbone, max_length, revision)
        self.tables: dict[str, Dataset] = {}
        self.encoded: dict[str, Dataset] = {}
        self.swapped: dict[str, Dataset] = {}  # `encoded` with the texts in the other order, where needed
        self.facts: dict[str, Any] = {}
        self.validates: int | float | None = None  # the Trainer's own limit_val_batches, while a fit has no dev pairs

    def prepare_data(self) -> None:
        """Read, check and encode everything that the run needs, into the cache of `datasets`."""
        self._load(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str) -> None:
        """Read everything from the cache that `prepare_data` has filled, and log what there is."""
        if self.trainer and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            refuse_part_of_batches(self.trainer, {"test": ["test"], "predict": []}.get(stage, ["val"]))
        loaded = self._load(stage)
        if stage == "fit":
            self.position, self.begun = {}, (0, 0)  # forget an earlier fit; a checkpoint's values are loaded later
            if "train" not in loaded:
                raise DataError("there are no training pairs; set --data.source")
            self.facts = {
                "source": _as_path(self.source),
                "sources": self.read_from(),
                "backbone": self.backbone,
                "subset": self._subset(self.source),
                "split": "group" if self.source == pairs.SAMPLE else self.split if self._cut_off(loaded) else None,
                "limit": self.limit,
                "transitive": self.transitive,
                "rows": {name: len(part) for name, part in loaded.items()},
                "duplicates": {
                    name: float((np.array(part["label"][:]) >= 0.5).mean()) for name, part in loaded.items()
                },
                "plan": {
                    "training tokens": digest(loaded["train"]),
                    "dev tokens": digest(loaded["val"]) if "val" in loaded else None,
                    "tokenizer": sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:12],
                    "devices": self._rank_and_devices()[1],
                    "accumulated batches": self._accumulated(),
                    **self._limited(),
                    "batch_size": self.batch_size,
                    "batch_by": self.batch_by,
                    "window": self.window,
                    "symmetric": self.symmetric,
                    "twice": self.twice,
                    "seed": _seed(),
                },
            }
            if self.trainer and "val" not in loaded:  # without dev pairs there is no validation
                self.validates, self.trainer.limit_val_batches = self.trainer.limit_val_batches, 0
        self._log(loaded, stage)
        self.encoded |= loaded

    def teardown(self, stage: str) -> None:
        if self.trainer and self.validates is not None:
            self.trainer.limit_val_batches, self.validates = self.validates, None

    def on_exception(self, exception: BaseException) -> None:
        self.teardown("fit")

    @rank_zero_only
    def _log(self, loaded: dict[str, Dataset], stage: str) -> None:
        for name in sorted(loaded.keys() - self.encoded):  # once for each split
            tell_cut(loaded[name], f"{TITLES[name]} pairs", self.max_length)
            size = {"val": self.val_size, "test": self.test_size}.get(name)
            if size is not None and name in self._sources():
                log.info(
                    "--data.%s_size %s is not used, since the %s pairs have their own source", name, size, TITLES[name]
                )
        if stage == TrainerFn.PREDICTING and len(loaded["predict"]) == self.limit:
            log.info("data.limit %d: no pairs after the first %d are scored", self.limit, self.limit)
        if stage != "fit":
            return
        if self.num_workers and not self._workers():
            log.info(
                "data.num_workers %d is not used: on several devices it needs Python 3.11.8 or newer", self.num_workers
            )
        if "val" not in loaded:
            log.info(
                "there are no dev pairs to choose the best checkpoint, a threshold and a calibration; to have some, "
                "set --data.val_source or --data.val_size"
            )
        for name, share in self.facts["duplicates"].items():
            log.info("%s: %s pairs, %.1f %% duplicates", TITLES[name], f"{len(loaded[name]):,}", 100 * share)
            if name == "val" and share in (0, 1):
                log.warning(
                    "all dev pairs have the same label, so they choose no threshold and no checkpoint: the last one is "
                    "used; if the source is sorted by label, shuffle it, or set --data.val_source"
                )

    def _load(self, stage: str | None) -> dict[str, Dataset]:
        if stage == TrainerFn.PREDICTING:
            parts = {"predict": _first(self._read(self.source, labelled=False), self.limit)}
        else:
            # Fit needs all splits, the test split too, so that a broken test file is reported before training.
            needed = {"validate": ("val",), "test": ("test",)}.get(stage or "fit", pairs.SPLITS)
            parts = self._read_splits(needed, self.limit)
            by_question = self.split == "question" and self.source != pairs.SAMPLE
            if by_question and {"train"} < set(parts) and not self._cut_off(parts):
                raise UsageError(
                    "--data.split question has nothing to split: the evaluation pairs have their own source, whose "
                    "questions may also be in the training pairs; remove the option"
                )
        if self.transitive and "train" in parts:
            parts["train"] = add_transitive(parts["train"], [parts[name] for name in parts if name != "train"])
        self.tables |= parts
        for name, part in parts.items():
            if self._in_both_orders(name):
                self.swapped[name] = encode(part, self.tokenizer, self.max_length, self.num_proc, swap=True)
        return {name: encode(part, self.tokenizer, self.max_length, self.num_proc) for name, part in parts.items()}

    def _read(self, source: str, labelled: bool = True) -> Dataset:
        return pairs.read(source, self._subset(source), self.columns, labelled)

    def _subset(self, source: str) -> str | None:
        return QUORA_SUBSET if self.subset is None and source.partition(":")[0] == QUORA else self.subset

    def _sources(self) -> dict[str, str]:
        """The source of each split; a split without one is cut off from `train`."""
        if not self.source:
            named = {}
        elif self.source == pairs.SAMPLE:
            named = {split: f"{pairs.SAMPLE}:{split}" for split in pairs.SPLITS}
        elif Path(self.source).is_dir():
            named = pairs.files_of(Path(self.source))
        else:
            named = {"train": self.source}
        given = {"val": self.val_source, "test": self.test_source}
        return named | {split: source for split, source in given.items() if source}

    def _read_splits(self, needed: tuple[str, ...], limit: int | None) -> dict[str, Dataset]:
        sources = self._sources()
        parts = {split: self._read(sources[split]) for split in needed if split in sources and split != "train"}
        rest = [split for split in needed if split not in parts]
        if rest and "train" in sources:
            table = self._read(sources["train"])
            rows = self._cut(table, sources)
            parts |= {split: table.select(rows[split]) for split in rest if len(rows[split])}
        return {split: _first(parts[split], limit) for split in needed if split in parts}

    def _cut_off(self, splits: Collection[str]) -> set[str]:
        """Those of the splits that are cut off from the source of the training pairs."""
        return {"val", "test"} & set(splits) - set(self._sources())

    def _cut(self, table: Dataset, sources: dict[str, str]) -> dict[str, Sequence[int]]:
        """The rows of each split within one table. A split with its own source gets none of them."""
        separate = {"val", "test"} & set(sources)
        given = {"val": self.val_size, "test": self.test_size}
        wanted = {split: 0 if split in separate or (separate and n is None) else n for split, n in given.items()}
        val, test = sizes(len(table), wanted["val"], wanted["test"], sources["train"])
        if self.split == "question" and val + test:
            rows = split_by_question(table["text_a"][:], table["text_b"][:], val, test)
            if empty := [name for name, size in (("val", val), ("test", test)) if size and not rows[name]]:
                raise DataError(
                    f"--data.split question leaves no {TITLES[empty[0]]} pairs of {sources['train']}: its questions "
                    "are too connected; set --data.split position, "
                    f"--data.{empty[0]}_source, or --data.{empty[0]}_size 0"
                )
            return rows
        return split_by_position(len(table), val, test)

    def read_from(self, splits: Collection[str] = ("val", "test")) -> dict[str, str]:
        """The source of the dev and the test pairs, which may be the one that they are cut off from."""
        sources = {"val": self.val_source or self.source, "test": self.test_source or self.source}
        return {split: _as_path(source) for split, source in sources.items() if split in splits}

    def splits(self) -> set[str]:
        """The splits that the sources provide."""
        return set(self._read_splits(pairs.SPLITS, self.limit))

    def texts(self, split: str, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """`text_a` and `text_b` of these rows (in ascending order) of a loaded split, each of shape (rows,)."""
        table = self._pairs(split, rows)
        return {name: np.array(table[name][:], dtype=object) for name in ("text_a", "text_b")}

    def _pairs(self, split: str, rows: NDArray[np.int64]) -> Dataset:
        return self.tables[split].select(np.flatnonzero(np.isin(self.tables[split]["row"][:], rows)))

    def unseen(self, split: str, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """For each of these rows (in ascending order) of a loaded split, whether neither of its questions is in the
        training pairs, shape (rows,). All True if there are no training pairs.
        """
        train = self.tables.get("train")
        if train is None:
            train = self._read_splits(("train",), self.trained_limit).get("train")
        return unseen(self._pairs(split, rows), train) if train is not None else np.ones(len(rows), dtype=bool)

    def train_dataloader(self) -> DataLoader[PairBatch]:
        rank, ranks = self._rank_and_devices()
        order = TrainingOrder(
            self._lengths("train"),
            self.batch_size,
            by=self.batch_by,
            window=self.window,
            accumulate=self._accumulated(),
            rank=rank,
            ranks=ranks,
            seed=_seed(),
            symmetric=self.symmetric,
            twice=self.twice,
        )
        limit, batches = self.trainer.limit_train_batches if self.trainer else 1.0, len(order)
        limit = min(limit, batches) if isinstance(limit, int) else int(limit * batches)  # as Lightning counts them
        self.train_loader = PairLoader(order, limit, **self._loader_arguments("train", order.mean_pairs()))
        # Lightning would restore the loader's state, but when it counts steps it makes the loader before it has read
        # the checkpoint, and then does not.
        self.train_loader.load_state_dict(self.position)
        return self.train_loader

    def val_dataloader(self) -> DataLoader[PairBatch]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[PairBatch]:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[PairBatch]:
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: str) -> DataLoader[PairBatch]:
        rank, ranks = self._rank_and_devices()
        tokens = self.eval_tokens or (16_384 if self._on_cpu() else 65_536)
        lengths = self._lengths(split)
        if len(lengths) < ranks:  # some would have no batch, and with sharded weights the others would wait for them
            raise DataError(f"{len(lengths)} {TITLES[split]} pairs are too few for {ranks} devices; use fewer devices")
        if self._in_both_orders(split):
            lengths = np.tile(lengths, 2)
        order = EvaluationOrder(lengths, tokens, rank=rank, ranks=ranks)
        return DataLoader(sampler=order, **self._loader_arguments(split))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch to a GPU from pinned memory, so that the CPU need not wait.

        It is pinned here because the loader's pinning thread would break a CUDA graph captured at the same time.
        """
        if device.type != "cuda":
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        return batch | {name: value.pin_memory().to(device, non_blocking=True) for name, value in tensors.items()}

    def _in_both_orders(self, split: str) -> bool:
        """Whether the pairs of a split are followed by the same pairs with their texts swapped.

        For evaluation, only in `validate` and `test`: it would double the time of the validations during a fit.
        """
        if split == "train":
            return self.symmetric
        return self.trainer is not None and self.trainer.state.fn in (TrainerFn.VALIDATING, TrainerFn.TESTING)

    def _rank_and_devices(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _accumulated(self) -> int:
        return self.trainer.accumulate_grad_batches if self.trainer else 1

    def _workers(self) -> int:
        return 0 if _FORKS_HANG and self._rank_and_devices()[1] > 1 else self.num_workers

    def _limited(self) -> dict[str, str]:
        """What the Trainer takes of an epoch, for the plan. Not that of fast_dev_run, which may try any checkpoint."""
        if self.trainer is None or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return {}
        return {"limit_train_batches": str(self.trainer.limit_train_batches)}  # as text, 1 is not 1.0

    def _on_cpu(self) -> bool:
        return self.trainer is None or self.trainer.strategy.root_device.type == "cpu"

    def _lengths(self, split: str) -> NDArray[np.int64]:
        if split not in self.encoded:
            where, name = self.source or "an empty source", TITLES[split]
            raise DataError(f"{where} leaves no {name} pairs; set --data.{split}_source or --data.{split}_size")
        part = self.encoded[split]
        return part.with_format("numpy", columns=["length"])[:]["length"].astype(np.int64)  # type: ignore[no-any-return]

    def _loader_arguments(self, split: str, mean_pairs: float | None = None) -> dict[str, Any]:
        from datasets import concatenate_datasets

        part = self.encoded[split]
        if self._in_both_orders(split):
            part = concatenate_datasets([part, self.swapped[split]])
        cost = piece_cost(self.model_type, "cpu" if self._on_cpu() else "cuda", training=split == "train")
        if self.trainer and isinstance(self.trainer.strategy, ModelParallelStrategy):
            cost = 2**40  # so costly that a batch is one piece: devices that shard the weights compute equally many
        return {
            "dataset": part.with_format("arrow", columns=[name for name in part.column_names if name != "cut"]),
            "batch_size": None,  # the order yields whole batches
            "collate_fn": PairCollator(self.tokenizer, mean_pairs, cost),
            "num_workers": self._workers(),
            "persistent_workers": self._workers() > 0,
            "worker_init_fn": _leave_process_group,
            "generator": torch.Generator(),  # of its own: making an iterator must not advance the one of dropout
        }

    def state_dict(self) -> dict[str, Any]:
        """What the run trains on, for the model card and for the checks on resuming, and its position in the data."""
        where = {"step": self.trainer.global_step, "begun": self.begun} if self.trainer else {}
        return {**self.facts, **where, "position": self.train_loader.state_dict() if self.train_loader else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the position in the data. If the batches or their order differ from the checkpoint's, refuse, or skip
        to the next epoch. Other dev pairs are refused too, since they would choose another best checkpoint.

        Raises:
            CheckpointError: Something differs, and `on_mismatch` is `refuse`.
        """
        self.trained_limit = state.get("limit")
        if not (self.trainer and self.trainer.state.fn == TrainerFn.FITTING and "plan" in state):
            return
        before, now = _readable_plan(state), _readable_plan(self.facts)
        differing = {
            name: f"{name} {before[name]} (now {now[name]})"
            for name in now
            if name in before and state["plan"][name] != self.facts["plan"][name]  # older checkpoints have fewer
        }
        self.position, changes = state["position"], ", ".join(differing.values())
        self.begun = state.get("begun", (0, 0))
        reordered = bool(differing.keys() - {"dev tokens"})
        if differing and self.on_mismatch == "refuse":
            raise CheckpointError(
                f"the checkpoint was trained with {changes}; resume with the same, or give --on_mismatch continue to "
                f"keep weights and optimizer{' and start at the next epoch' * reordered}"
            )
        if differing:
            log.info("the checkpoint was trained with %s: resuming%s", changes, " at the next epoch" * reordered)
        if reordered:
            if "step" in state:  # older checkpoints do not have it
                self.begun = state["step"], self.position["epoch"] + 1
            self.position = {**self.position, "batches": sys.maxsize}
        if self.train_loader:  # with sharded weights, the checkpoint is loaded after the loader is made
            self.train_loader.load_state_dict(self.position)


class PairLoader(DataLoader[PairBatch]):
    """A DataLoader over a `TrainingOrder` that can resume within an epoch, at the batch after the last one used.

    Batches count when they are handed out, no matter how many the worker processes have prefetched. An epoch has only
    the first `limit` batches: a run that resumes at an epoch's end asks for one more batch, and must get none.
    """

    def __init__(self, order: TrainingOrder, limit: int, **arguments: Any) -> None:
        super().__init__(sampler=order, **arguments)
        self.order, self.limit, self.epoch, self.batches = order, limit, 0, 0

    def __iter__(self) -> Any:
        # As a generator, this runs when the first batch is requested, and by then Lightning has set the epoch.
        if self.epoch != self.order.epoch:
            self.epoch, self.batches = self.order.epoch, 0
        self.order.start = self.batches
        for batch in islice(super().__iter__(), max(0, self.limit - self.batches)):
            self.batches += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.batches = state.get("epoch", 0), min(state.get("batches", 0), len(self))


def refuse_part_of_batches(trainer: Any, splits: Iterable[str]) -> None:
    """Raise `UsageError` if a Trainer, or its options, would take only a part of these splits, or break up batches."""
    if trainer.overfit_batches:
        raise UsageError("--trainer.overfit_batches would break up the batches; set --data.limit instead")
    for name in splits:
        limit = getattr(trainer, f"limit_{name}_batches")
        if limit and not (isinstance(limit, float) and limit == 1):  # batches are sorted by length, the longest first
            raise UsageError(f"--trainer.limit_{name}_batches would take only the longest pairs; use --data.limit")


def _leave_process_group(worker: int) -> None:
    """Keep Ctrl-C, which a terminal sends to the whole process group, from the workers: the step that is finished then
    still needs them. Windows has no such groups."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def digest(part: Dataset) -> str:
    """A short hash of a split's tokens and labels, in their order."""
    hashed = sha256()
    for table in part.with_format("arrow", columns=["input_ids", "label"]).iter(10_000):
        for column in (table["input_ids"].combine_chunks().flatten(), table["label"]):
            hashed.update(column.to_numpy().tobytes())
    return hashed.hexdigest()[:12]


def _as_path(source: str) -> str:
    """Prefix the name of a folder with `./` where it could be taken for a Hub id, such as `data/pairs`."""
    names = (source, pairs.name_and_split(source)[0])  # a folder, or FOLDER:SPLIT
    is_folder = any(name and Path(name).is_dir() for name in names)
    return f"./{source}" if is_folder and not Path(source).is_absolute() and source[0] != "." else source


def _first(part: Dataset, limit: int | None) -> Dataset:
    return part.take(min(limit or sys.maxsize, len(part)))


def _readable_plan(facts: dict[str, Any]) -> dict[str, Any]:
    """The entries of the plan for messages: a digest comes with the data that it is of."""
    sources, rows = {"train": facts["source"], **facts.get("sources", {})}, facts["rows"]
    origins = {
        f"{name} tokens": f"{rows[split]:,} pairs of {sources[split]}"
        for split, name in (("train", "training"), ("val", "dev"))
        if split in rows and split in sources
    }
    origins["tokenizer"] = facts["backbone"]
    return {name: f"{value} of {origins[name]}" if name in origins else value for name, value in facts["plan"].items()}


def _seed() -> int:
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))  # set by seed_everything
