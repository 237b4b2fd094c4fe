"""The callbacks of a run: speed, a last validation, progress on a terminal and elsewhere, predictions to a file."""

from __future__ import annotations

import csv
import logging
import os
import random
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, RichProgressBar
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from .errors import StoppedError, UsageError

log = logging.getLogger(__name__)


class TrainSpeed(Callback):
    """Logs the learning rate and the pairs per second of all devices, validation apart, every few batches."""

    batches_between_figures = 10

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pairs, self.since = 0, time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.training:
            self.since += time.perf_counter() - self.paused

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.pairs += len(batch["label"]) * trainer.world_size
        if (batch_idx + 1) % self.batches_between_figures == 0:
            now = time.perf_counter()
            size = len(batch["label"])
            pl_module.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"], prog_bar=True, batch_size=size)
            pl_module.log("train/pairs_per_second", self.pairs / (now - self.since), prog_bar=True, batch_size=size)
            self.pairs, self.since = 0, now


class ValidateAtEnd(Callback):
    """Validates after the last step too, wherever `val_check_interval` falls.

    To ask for a stop at the step that is the last anyway is Lightning's public way to validate before leaving.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_epoch = trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1
        if (trainer.is_last_batch and last_epoch) or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it: what stood there stays whole until the new one is."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        unfinished = Path(path).with_name(f".{Path(path).name}")
        super().save_checkpoint(checkpoint, unfinished, storage_options)
        unfinished.replace(path)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` in the run's folder, from which a run goes on exactly: the random generators are in it too.

    SIGTERM and SIGINT let the step end (and the validation that follows it), write the checkpoint, and end the run by a
    `StoppedError`. On SLURM they are left to Lightning, which puts the job into the queue again.

    A `Checkpoint`, so that Lightning calls it last: what the keeper of the best one knows of this step is in the file.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
        every_n_minutes: Minutes after which the next step writes one anyway.
    """

    def __init__(self, every_n_steps: int = 500, every_n_minutes: float = 10.0) -> None:
        if every_n_steps < 1 or every_n_minutes <= 0:
            raise UsageError("last.every_n_steps must be at least 1 and last.every_n_minutes above 0")
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.saved_step, self.saved_at, self.signal = -1, time.monotonic(), 0
        self.random: list[dict[str, Any]] = []
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.random:
            _set_random_states(self.random[trainer.global_rank % len(self.random)])
            self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        else:
            self.save(trainer)  # so that there is always one
        if "SLURM_JOB_ID" not in os.environ and threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._give_signals_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_signals_back()

    def _give_signals_back(self) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or self._validation_follows(trainer, batch_idx):
            return
        late = time.monotonic() - self.saved_at >= 60 * self.every_n_minutes
        if trainer.strategy.broadcast(late) or trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)
        self._stop_if_signalled(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.save(trainer)
            self._stop_if_signalled(trainer)

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(bool(self.signal), all=False):
            self.save(trainer)
            number, folder = self.signal or signal.SIGTERM, Path(trainer.default_root_dir)
            raise StoppedError(
                f"{signal.Signals(number).name} at step {trainer.global_step}; go on with: python -m crossenc fit "
                f"--config {shlex.quote(str(folder / 'config.yaml'))} "
                f"--ckpt_path {shlex.quote(str(folder / 'last.ckpt'))}",
                number,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write `last.ckpt`, unless it is of this step already."""
        if trainer.fast_dev_run or self.saved_step == trainer.global_step:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(trainer.strategy.broadcast(Path(trainer.default_root_dir)) / "last.ckpt")
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    def _validation_follows(self, trainer: Trainer, batch_idx: int) -> bool:
        """A checkpoint between a step and its validation would resume without the validation."""
        if not trainer.enable_validation:
            return False
        number = batch_idx if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx
        return trainer.should_stop or (number + 1) % trainer.val_check_batch == 0  # type: ignore[operator]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = _gather(trainer, _random_states())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.random = checkpoint.get("random_states", [])


def _gather(trainer: Trainer, item: Any) -> list[Any]:
    """What each rank gives, in the order of the ranks; all ranks must call it."""
    items = [item] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(items, item)
    return items


def _random_states() -> dict[str, Any]:
    """The states of this process's random generators, in types that `weights_only` loads."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, numbers, rest = states["python"]
    random.setstate((version, tuple(numbers), rest))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))


class TerminalProgress(RichProgressBar):
    """Lightning's bar with loss, learning rate and pairs per second; a run's name says more than a version number."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        return {name.removeprefix("train/"): value for name, value in metrics.items() if name != "v_num"}


class PlainProgress(ProgressBar):
    """A line every ten seconds and one at each validation, for logs that nobody watches live."""

    seconds_between_lines = 10.0

    def __init__(self) -> None:
        super().__init__()
        self.enabled, self.written = True, float("-inf")

    def disable(self) -> None:
        self.enabled = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if not self.enabled or now - self.written < self.seconds_between_lines:
            return
        figures = trainer.progress_bar_metrics  # asked for only now, since a GPU has to wait for it
        if "train/lr" in figures:
            self.written = now
            log.info(
                "step %d/%d  loss %.4f  lr %.2e  %.0f pairs/s",
                trainer.global_step,
                trainer.estimated_stepping_batches,
                figures["train/loss"],
                figures["train/lr"],
                figures["train/pairs_per_second"],
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            figures = trainer.callback_metrics
            log.info(
                "step %d  val/loss %.4f  val/average_precision %.4f  val/f1 %.4f",
                trainer.global_step,
                *(figures[f"val/{name}"] for name in ("loss", "average_precision", "f1")),
            )


class PredictionFile(Callback):
    """Writes `row,logit,score` to a csv, in the order of the source's rows, whichever rank scored them."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows: list[tuple[int, float, float]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.rows += zip(*(outputs[name].tolist() for name in ("row", "logit", "score")), strict=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = [row for share in _gather(trainer, self.rows) for row in share]
        if trainer.is_global_zero:
            unfinished = self.path.with_name(f".{self.path.name}")
            with unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(("row", "logit", "score"))
                writer.writerows(sorted(rows))
            unfinished.replace(self.path)
