"""The callbacks of a run: training speed, last validation, plots for loggers, cost, progress log, and predictions."""

from __future__ import annotations

import csv
import logging
import math
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from .checkpoints import gather
from .figures import draw
from .parts import replacing
from .progress import SECONDS_BETWEEN_LINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)


class TrainSpeed(Callback):
    """Logs the learning rate and the pairs per second of all devices, excluding validation, when the loss is logged."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pairs, self.since = 0, time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:  # the sanity check precedes training
            self.since += time.perf_counter() - self.paused

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        head = trainer.optimizers[0].param_groups[0]  # the head's groups come first
        self.rate = head["lr"] / pl_module.hparams["head_rate"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        copies = 2 if pl_module.hparams["consistency"] else 1  # of each pair in the batch
        self.pairs += len(batch["label"]) * trainer.world_size // copies
        step_ends = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if pl_module.is_logged and step_ends:
            now = time.perf_counter()
            figures = {"train/lr": self.rate, "train/pairs_per_second": self.pairs / (now - self.since)}
            pl_module.log_dict(figures, prog_bar=True, batch_size=len(batch["label"]))
            self.pairs, self.since = 0, now


class ValidateAtEnd(Callback):
    """Moves validations to the ends of optimizer steps, and adds one after the last step of a run.

    Setting `should_stop` at the last step is Lightning's public way to validate before the run ends.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The interval counts batches. It is rounded up to whole steps, since no checkpoint holds accumulated gradients;
        # but not beyond the epoch, whose end is also the end of a step.
        every, accumulated = trainer.val_check_batch, trainer.accumulate_grad_batches
        if every not in (None, math.inf):
            rounded = -(-int(every) // accumulated) * accumulated
            longest = trainer.num_training_batches if trainer.check_val_every_n_epoch else math.inf
            trainer.val_check_batch = int(min(rounded, longest))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        done = trainer.current_epoch + 1
        may_stop = done >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
        last_epoch = done == trainer.max_epochs or (trainer.should_stop and may_stop)
        if (trainer.is_last_batch and last_epoch) or trainer.global_step == trainer.max_steps:
            trainer.should_stop = True
            if trainer.check_val_every_n_epoch:
                trainer.check_val_every_n_epoch = 1
            # With either of these, the run would end without the validation.
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None


class Pictures(Callback):
    """Sends the plots of each validation to every logger that accepts figures."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        senders = [send for logger in trainer.loggers if (send := _figure_sender(logger))]
        module: Any = pl_module
        if senders:
            for name, figure in draw({"val": module.scored["val"]}, module.threshold).items():
                figure.set_dpi(100)  # 600 pixels wide: a logger renders and stores every figure during training
                for send in senders:
                    send(f"val/{name}", figure, trainer.global_step)


def _figure_sender(logger: Any) -> Callable[[str, Figure, int], Any] | None:
    """A function (name, figure, step) that logs a figure with this logger; None if the logger accepts no figures."""
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_figure"):  # TensorBoard
        return lambda name, figure, step: experiment.add_figure(name, figure, step)
    if hasattr(logger, "log_image"):  # Weights & Biases
        return lambda name, figure, step: logger.log_image(name, [figure], step)
    if not hasattr(experiment, "log_figure"):
        return None
    if hasattr(logger, "run_id"):  # MLflow, which stores files
        return lambda name, figure, step: experiment.log_figure(logger.run_id, figure, f"{name}/{step}.png")
    return lambda name, figure, step: experiment.log_figure(name, figure, step=step)  # Comet


class Cost(Callback):
    """Counts the seconds of training, and the energy if codecarbon is installed, over all sessions of a resumed run."""

    def __init__(self) -> None:
        self.seconds, self.energy_kwh, self.since = 0.0, 0.0, 0.0
        self.tracker: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = time.perf_counter()
        if find_spec("codecarbon") and trainer.is_global_zero:
            threading.Thread(target=self._track, daemon=True).start()  # probing the hardware takes it seconds

    def _track(self) -> None:
        from codecarbon import OfflineEmissionsTracker

        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        # The country only matters for emissions, which are not reported. Offline: nothing is looked up or sent.
        tracker = OfflineEmissionsTracker(
            country_iso_code="USA", output_methods=[], log_level="critical", allow_multiple_runs=True
        )
        tracker.start_task()
        self.tracker = tracker

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._count()
        self.tracker, self.since = None, 0.0

    def _count(self) -> None:
        if self.since:
            now = time.perf_counter()
            self.seconds, self.since = self.seconds + now - self.since, now
        if self.tracker:
            self.energy_kwh += self.tracker.stop_task().energy_consumed
            self.tracker.start_task()

    def state_dict(self) -> dict[str, float]:
        self._count()
        return {"seconds": self.seconds, "energy_kwh": self.energy_kwh}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seconds, self.energy_kwh = state["seconds"], state["energy_kwh"]


class PlainProgress(Callback):
    """Logs a line every ten seconds and one at each validation, for output that is not a terminal."""

    def __init__(self) -> None:
        self.logged_at = float("-inf")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        now = time.monotonic()
        fresh = trainer.is_global_zero and pl_module.is_logged  # in other steps the figures are those of an earlier one
        if not fresh or now - self.logged_at < SECONDS_BETWEEN_LINES:
            return
        module: Any = pl_module
        figures = trainer.progress_bar_metrics  # read only now, because reading them makes a GPU wait
        if "train/lr" in figures:
            self.logged_at = now
            log.info(
                "step %d/%d  loss %.4f  lr %.2e  %.0f pairs/s",
                trainer.global_step,
                module.planned_steps(),
                figures["train/loss"],
                figures["train/lr"],
                figures["train/pairs_per_second"],
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            figures = trainer.callback_metrics
            log.info(
                "step %d  val/loss %.4f  val/average_precision %.4f  val/f1 %.4f",
                trainer.global_step,
                *(figures[f"val/{name}"] for name in ("loss", "average_precision", "f1")),
            )


class PredictionFile(Callback):
    """Writes `row,logit,score` of all ranks to a csv file, in the order of the source's rows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names, batches = ("row", "logit", "score"), trainer.predict_loop.predictions
        own = [row for batch in batches for row in zip(*(batch[name].tolist() for name in names), strict=True)]
        rows = [row for of_rank in gather(trainer, own) for row in of_rank]
        if trainer.is_global_zero:
            with replacing(self.path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(names)
                writer.writerows(sorted(rows))
            log.info("scores: %s", self.path)
