"""The checkpoints of a run: written whole or not at all, and gone on with exactly.

last.ckpt   every so many steps and minutes, after each validation, at the end, and when a signal ends the run
best.ckpt   after the validation with the best average precision so far
"""

from __future__ import annotations

import logging
import os
import random
import shlex
import signal
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from .errors import CheckpointError, StoppedError
from .parts import replacing, writing

log = logging.getLogger(__name__)

# The first checkpoint comes at this step at the latest: what fails soon after its start costs little.
FIRST_STEP = 50


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it: what stood there stays whole until the new one is."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with writing(path), replacing(path) as unfinished:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                try:
                    torch.save(checkpoint, file)  # Lightning's own way makes a copy in memory, and one in /tmp
                except RuntimeError as error:  # what torch makes of a full disk
                    raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, by average precision on the dev pairs after each validation.

    Lightning forgets what was best so far when the run's folder was moved; here the paths follow it. A run that goes on
    from a checkpoint of another, or with other dev pairs, or whose best one is gone or damaged, chooses its own best.
    Dev pairs of one label, which have no average precision, choose none.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val/average_precision",
            mode="max",
            save_on_train_epoch_end=False,
            auto_insert_metric_name=False,
            enable_version_counter=False,
        )
        self.dev_pairs: str | None = None  # a digest of those that chose it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        facts = getattr(getattr(trainer, "datamodule", None), "facts", {})
        self.dev_pairs = facts["plan"]["dev tokens"] if stage == "fit" and facts else None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.callback_metrics.get(str(self.monitor), torch.tensor(0.0)).isnan():
            super().on_validation_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "dev_pairs": self.dev_pairs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        best = Path(str(self.dirpath)) / "best.ckpt"
        others = self.dev_pairs != state_dict.get("dev_pairs", self.dev_pairs)
        if others or not state_dict["best_model_path"] or not is_whole(best):
            return
        here: dict[str, Any] = dict.fromkeys(("best_model_path", "kth_best_model_path"), str(best))
        here["best_k_models"] = {str(best): state_dict["best_model_score"]}
        super().load_state_dict({**state_dict, **here, "dirpath": self.dirpath})


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` in the run's folder, from which a run goes on exactly: the random generators are in it too.

    SIGTERM and SIGINT let the step end (and the validation that follows it), write the checkpoint, and end the run by a
    `StoppedError`. On SLURM they are left to Lightning. Its handler of the signal that comes before a job's time is up,
    which writes a checkpoint and puts the job into the queue again, waits for the end of the step too: called at once,
    as Lightning does, it finds the processes at different places, and they wait for each other for ever.

    A `Checkpoint`, so that Lightning calls it last: what the keeper of the best one knows of this step is in the file.
    """

    def __init__(self, every_n_steps: int = 500, every_n_minutes: float = 10.0, checkpoint: str | None = None) -> None:
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.checkpoint = checkpoint  # that the run goes on from, which the Trainer does not know in `setup` yet
        self.saved_step, self.saved_at, self.signal = 0, time.monotonic(), 0
        self.stepped = True
        self.random: list[dict[str, Any]] = []
        self.handlers: dict[int, Any] = {}
        self.group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and len(set(gather(trainer, self.checkpoint is None))) > 1:
            raise CheckpointError(
                f"only some of the processes found the checkpoint {self.checkpoint or 'that others go on with'}; "
                "--output must be a folder that all machines share"
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_signals(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_signals(trainer)
        if self.random:
            _set_random_states(self.random[trainer.global_rank % len(self.random)])
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if torch.distributed.is_initialized():
            # On CPUs' own network: asking all ranks after each step must not make a GPU wait.
            self.group = torch.distributed.new_group(backend="gloo")

    def _take_signals(self, trainer: Trainer) -> None:
        if self.handlers:
            return
        slurm, cluster = "SLURM_JOB_ID" in os.environ, _cluster(trainer)
        taken = [] if slurm else [signal.SIGTERM, signal.SIGINT]
        if isinstance(cluster, SLURMEnvironment) and cluster.auto_requeue and cluster.requeue_signal is not None:
            taken = [cluster.requeue_signal]
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self._note) for number in taken}
        if trainer.received_sigterm and not slurm:  # by Lightning, a moment before
            self.signal = signal.SIGTERM

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._give_signals_back()

    def _give_signals_back(self) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Known before the batch's end, where other callbacks write checkpoints first.
        self.stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.stepped or self._validation_follows(trainer, batch_idx):
            return
        late, number = self._ask_all_ranks(time.monotonic() - self.saved_at >= 60 * self.every_n_minutes)
        step = trainer.global_step
        if late or step % self.every_n_steps == 0 or step == min(FIRST_STEP, self.every_n_steps):
            self.save(trainer)
        self._obey(trainer, number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A validation whose time has come may fall within a step, whose gradients no checkpoint has.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self.stepped:
            self.saved_step = -1  # what was saved in this step knows nothing of the validation
            self.save(trainer)
            self._obey(trainer, self._ask_all_ranks(False)[1])

    def _ask_all_ranks(self, late: bool) -> tuple[bool, int]:
        """Whether any rank's time for a checkpoint has come, and the signal that any has got, or 0."""
        asked = torch.tensor([late, self.signal])
        if self.group is not None:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, self.group)
        return bool(asked[0]), int(asked[1])

    def _obey(self, trainer: Trainer, number: int) -> None:
        if not number:
            return
        if isinstance(_cluster(trainer), SLURMEnvironment):
            signal.signal(number, signal.SIG_IGN)  # a process may get it only now
            self.signal = 0
            self.handlers[number](number, None)
            return
        self.save(trainer)
        raise StoppedError(
            f"{signal.Signals(number).name} at step {trainer.global_step}; go on with: {command_to_go_on(trainer)}",
            # Lightning's launcher kills the first process when one that it started ends with any other code than 0.
            0 if trainer.local_rank and not _is_started_by_others(trainer) else 128 + number,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self._give_signals_back()  # not later: Lightning takes its own back before `teardown`

    def save(self, trainer: Trainer) -> None:
        """Write `last.ckpt`, unless it is of this step already."""
        if self.saved_step == trainer.global_step:
            return
        trainer.save_checkpoint(trainer.strategy.broadcast(Path(trainer.default_root_dir)) / "last.ckpt")
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    def _validation_follows(self, trainer: Trainer, batch_idx: int) -> bool:
        """A checkpoint between a step and its validation would resume without the validation."""
        epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
        if not trainer.enable_validation or (epochs and (trainer.current_epoch + 1) % epochs):
            return False
        number = batch_idx if epochs is not None else trainer.fit_loop.total_batch_idx
        stops = (
            trainer.should_stop
            and trainer.current_epoch >= (trainer.min_epochs or 0)
            and trainer.global_step >= (trainer.min_steps or 0)
        )
        # None: validation comes after a time, which only the Trainer looks at.
        return stops or (every is not None and (number + 1) % every == 0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = gather(trainer, _random_states())
        checkpoint["whole_step"] = self.stepped  # not in a validation that falls within one

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.random = checkpoint.get("random_states", [])


def command_to_go_on(trainer: Trainer) -> str:
    """The command that goes on with a run from its `last.ckpt`."""
    folder = Path(trainer.default_root_dir)
    return (
        f"{'torchrun ... -m' if _is_started_by_others(trainer) else 'python -m'} crossenc fit "
        f"--config {shlex.quote(str(folder / 'config.yaml'))} --ckpt_path {shlex.quote(str(folder / 'last.ckpt'))}"
    )


def _is_started_by_others(trainer: Trainer) -> bool:
    """Whether torchrun or a cluster has started the processes, and not Lightning."""
    cluster = _cluster(trainer)
    return cluster is not None and not isinstance(cluster, LightningEnvironment)


def _cluster(trainer: Trainer) -> Any:
    """What tells each process which one it is; None where there is only one."""
    return getattr(trainer.strategy, "cluster_environment", None)


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What a checkpoint file holds, on the CPU; with `mmap`, tensors are read from the file when they are needed.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by crossenc.
    """
    if path.is_dir():
        found = ", ".join(map(str, sorted(path.glob("*.ckpt")))) or "there is none"
        raise CheckpointError(f"{path} is a folder; name a checkpoint in it: {found}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # of bytes that are no checkpoint the unpickler makes errors of any kind
        raise CheckpointError(
            f"{path} is no checkpoint that can be read: the file is damaged or of another kind"
        ) from error
    if not isinstance(loaded, dict) or "crossenc" not in loaded:
        raise CheckpointError(f"{path} was not written by crossenc")
    return loaded


def owner(path: Path) -> str:
    """What a checkpoint's figures and scores are kept under: a run that goes on gives its name to other weights."""
    return f"{path.name}, step {read_checkpoint(path, mmap=True)['global_step']}"


def keep_evaluation(path: Path, evaluation: dict[str, Any]) -> None:
    """Add to a checkpoint what a validation of its weights chose and found after training."""
    loaded = read_checkpoint(path)
    loaded["crossenc"] |= evaluation
    AtomicCheckpointIO().save_checkpoint(loaded, path)


def what_lacks(loaded: dict[str, Any]) -> str | None:
    """Why no run can go on exactly from what a checkpoint holds, or None."""
    if "optimizer_states" not in loaded:  # as a ModelCheckpoint can be told to write it
        return "has weights only, from which no run can go on"
    if not loaded.get("whole_step", True):
        return "was written within a step, and has none of its gradients"
    return None


def find_newest(folder: Path) -> Path | None:
    """The checkpoint of most steps in a run's folder; a damaged one is passed over, and a line says so."""
    found = []
    for path in folder.glob("*.ckpt"):
        try:
            loaded = read_checkpoint(path, mmap=True)
            if lack := what_lacks(loaded):
                raise CheckpointError(f"{path} {lack}")
            found.append((loaded["global_step"], path.name == "last.ckpt", path))
        except CheckpointError as error:
            log.warning("passed over: %s", error)
    for step, _, path in sorted(found, reverse=True):
        if not is_whole(path):
            log.warning("passed over: %s is damaged", path)
            continue
        log.info("going on from %s, step %d", path, step)
        return path
    return None


def is_whole(path: Path) -> bool:
    """Whether all of a checkpoint can be read; a look at its table of contents does not tell."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # of bytes that are no checkpoint the reader makes errors of any kind
        return False


def gather(trainer: Trainer, item: Any) -> list[Any]:
    """What each rank gives, in the order of the ranks; all ranks must call it."""
    items = [item] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(items, item)
    return items


def _random_states() -> dict[str, Any]:
    """The states of this process's random generators, in types that `weights_only` loads."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
    }


def _set_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
