"""The checkpoints of a run: written completely or not at all, and resumed from exactly.

last.ckpt   every N steps and minutes, after each validation, at the end, and when a signal stops the run
best.ckpt   after the validation with the best average precision so far
"""

from __future__ import annotations

import logging
import random
import re
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
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from .errors import CheckpointError, StoppedError, one_line
from .parts import replacing, writing

log = logging.getLogger(__name__)

# The first checkpoint is written at this step at the latest, so that a run that fails early loses little.
FIRST_STEP = 50


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint next to its target and renames it, so that the old one stays intact until the new one is."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with writing(path), replacing(path) as unfinished:
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                try:
                    torch.save(checkpoint, file)  # Lightning's own writer makes a copy in memory and another in /tmp
                except RuntimeError as error:  # which torch raises in place of the OSError of a full disk
                    raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
            try:
                _load(unfinished, mmap=True)  # in milliseconds: no weights are read
            except Exception as error:  # told now, and not at the end of the run, or when it is to resume
                kind = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
                raise CheckpointError(
                    f"{path} could not be read back ({kind[1] if kind else one_line(error)[:200]}): the state of a "
                    "callback or an argument of the module is no plain value; give it as a number of Python (not of "
                    "NumPy), a text, a list, a dict or a tensor"
                ) from error


class BestCheckpoint(ModelCheckpoint):
    """Keeps `best.ckpt`, the checkpoint with the best average precision on the dev pairs after a validation.

    Lightning forgets the best score so far when the run's folder was moved; here the paths are updated instead. A run
    starts choosing afresh if it resumes from another run's checkpoint or with other dev pairs, or if its `best.ckpt` is
    missing or damaged. Dev pairs that all have the same label have no average precision and choose no checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val/average_precision",
            mode="max",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.dev_pairs: str | None = None  # a digest of the pairs that choose the best

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
        other_pairs = self.dev_pairs != state_dict.get("dev_pairs", self.dev_pairs)
        if other_pairs or not state_dict["best_model_path"] or not is_whole(best):
            return
        paths: dict[str, Any] = dict.fromkeys(("best_model_path", "kth_best_model_path"), str(best))
        paths["best_k_models"] = {str(best): state_dict["best_model_score"]}
        super().load_state_dict({**state_dict, **paths, "dirpath": self.dirpath})


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` in the run's folder. A run resumes from it exactly: it includes the random generators' states.

    On SIGTERM or SIGINT, the step (and a validation that follows it) is finished, the checkpoint is written, and the
    run stops with a `StoppedError`. On SLURM, these two are left to Lightning. There, the signal that comes shortly
    before a job's time limit makes Lightning's handler write a checkpoint and requeue the job; that handler is delayed
    to the end of the step. Called at once, as Lightning does it, it would find the processes at different places in the
    step, and they would wait for each other forever.

    It is a `Checkpoint` because Lightning calls these last: the file then includes what `BestCheckpoint` found in the
    same step.
    """

    def __init__(self, every_n_steps: int = 500, every_n_minutes: float = 10.0, checkpoint: str | None = None) -> None:
        self.every_n_steps, self.every_n_minutes = every_n_steps, every_n_minutes
        self.checkpoint = checkpoint  # to resume from; the Trainer does not know it yet in `setup`
        self.saved_step, self.saved_at, self.signal = 0, time.monotonic(), 0
        self.stepped = True
        self.random: list[dict[str, Any]] = []
        self.handlers: dict[int, Any] = {}
        self.group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and len(set(gather(trainer, self.checkpoint is None))) > 1:
            raise CheckpointError(
                f"only some of the processes found the checkpoint {self.checkpoint or 'that the others resume from'}; "
                "--output must be a folder that all machines share"
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_handlers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_handlers(trainer)
        if self.random:
            _set_random_states(self.random[trainer.global_rank % len(self.random)])
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
        if torch.distributed.is_initialized():
            # gloo, on the CPU: the exchange after each step must not make a GPU wait.
            self.group = torch.distributed.new_group(backend="gloo")

    def _install_handlers(self, trainer: Trainer) -> None:
        if self.handlers:
            return
        cluster, numbers = _cluster_environment(trainer), [signal.SIGTERM, signal.SIGINT]
        slurm = isinstance(cluster, SLURMEnvironment)
        if slurm:  # if the job is requeued, there is a handler to delay
            numbers = [n for n in (cluster.requeue_signal,) if cluster.auto_requeue and callable(signal.getsignal(n))]
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self.handlers = {number: signal.signal(number, self._note_signal) for number in numbers}
        if trainer.received_sigterm and not slurm:  # Lightning got it before these handlers were installed
            self.signal = signal.SIGTERM

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _note_signal(self, number: int, frame: Any) -> None:
        self.signal = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Set before the batch ends, since other callbacks may write checkpoints there before this one is called.
        self.stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.stepped or self._validation_follows(trainer, batch_idx):
            return
        due, number = self._agree(time.monotonic() - self.saved_at >= 60 * self.every_n_minutes)
        step = trainer.global_step
        if due or step % self.every_n_steps == 0 or step == min(FIRST_STEP, self.every_n_steps):
            self.save(trainer)
        self._act_on_signal(trainer, number)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A validation by time may fall in the middle of a step, and no checkpoint holds the gradients so far.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self.stepped:
            self.saved_step = -1  # a checkpoint already saved in this step lacks the results of the validation
            self.save(trainer)
            self._act_on_signal(trainer, self._agree(False)[1])

    def _agree(self, due: bool) -> tuple[bool, int]:
        """Whether a checkpoint is due by time on any rank, and the signal that any rank has received, or 0."""
        flags = torch.tensor([due, self.signal])
        if self.group is not None:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, self.group)
        return bool(flags[0]), int(flags[1])

    def _act_on_signal(self, trainer: Trainer, number: int) -> None:
        if not number:
            return
        if isinstance(_cluster_environment(trainer), SLURMEnvironment):
            signal.signal(number, signal.SIG_IGN)  # this process may receive it only now, after another one's
            self.signal = 0
            self.handlers[number](number, None)
            return
        self.save(trainer)
        # Lightning's launcher kills the first process if one that it launched ends with a code other than 0.
        launched = trainer.local_rank and isinstance(_cluster_environment(trainer), LightningEnvironment)
        raise StoppedError(
            f"{signal.Signals(number).name} at step {trainer.global_step}; resume with: {command_to_go_on(trainer)}",
            0 if launched else 128 + number,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
        self._restore_handlers()  # not later: Lightning restores its own before `teardown`

    def save(self, trainer: Trainer) -> None:
        """Write `last.ckpt`, unless this step is saved already."""
        if self.saved_step == trainer.global_step:
            return
        trainer.save_checkpoint(trainer.strategy.broadcast(Path(trainer.default_root_dir)) / "last.ckpt")
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()

    def _validation_follows(self, trainer: Trainer, batch_idx: int) -> bool:
        """Whether a validation follows this batch: a run resumed from a checkpoint between the two would skip it."""
        epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
        if not trainer.enable_validation or (epochs and (trainer.current_epoch + 1) % epochs):
            return False
        number = batch_idx if epochs is not None else trainer.fit_loop.total_batch_idx
        stops = (
            trainer.should_stop
            and trainer.current_epoch >= (trainer.min_epochs or 0)
            and trainer.global_step >= (trainer.min_steps or 0)
        )
        # None: validations come by time, which only the Trainer knows.
        return stops or (every is not None and (number + 1) % every == 0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = gather(trainer, _random_states())
        checkpoint["whole_step"] = self.stepped  # False for a validation in the middle of a step

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.random = checkpoint.get("random_states", [])


def command_to_go_on(trainer: Trainer) -> str:
    """The command that resumes a run from its `last.ckpt`."""
    folder = Path(trainer.default_root_dir)
    # With slashes, which Windows reads too: backslashes would be quoted, and its cmd does not know these quotes.
    config, checkpoint = (shlex.quote((folder / name).as_posix()) for name in ("config.yaml", "last.ckpt"))
    launcher = "torchrun ... -m" if TorchElasticEnvironment.detect() else "python -m"
    return f"{launcher} crossenc fit --config {config} --ckpt_path {checkpoint}"


def _cluster_environment(trainer: Trainer) -> Any:
    """What launched the processes. For a single one, only SLURM, whose signals Lightning handles then too, else None.

    Not every process of a SLURM job is SLURM's: one may be started by hand in an interactive job, or by torchrun.
    """
    known = getattr(trainer.strategy, "cluster_environment", None)
    if known is None and SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return SLURMEnvironment()
    return known


def read_checkpoint(path: Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; with `mmap`, tensors are read from the file when they are needed.

    Raises:
        CheckpointError: The file is missing, damaged, or was not written by crossenc.
    """
    if path.is_dir():
        found = ", ".join(map(str, sorted(path.glob("*.ckpt")))) or "there is none"
        raise CheckpointError(f"{path} is a folder; name a checkpoint in it: {found}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        loaded = _load(path, mmap)
    except Exception as error:  # for arbitrary bytes, the unpickler raises errors of any kind
        raise CheckpointError(
            f"{path} cannot be read: the file is truncated, damaged or not a checkpoint of tensors and plain values"
        ) from error
    if not isinstance(loaded, dict) or "crossenc" not in loaded:
        raise CheckpointError(f"{path} was not written by crossenc")
    return loaded


def _load(file: Path, mmap: bool) -> Any:
    # On the CPU: weights that were saved on a GPU would be copied there, each of them.
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)


def owner(path: Path) -> str:
    """The name that a checkpoint's figures and scores are stored under. It includes the step, because a resumed run
    reuses the file name for other weights."""
    return f"{path.name}, step {read_checkpoint(path, mmap=True)['global_step']}"


def what_lacks(loaded: dict[str, Any]) -> str | None:
    """Why no run can resume exactly from a checkpoint with this content, or None."""
    if "optimizer_states" not in loaded:  # a ModelCheckpoint with save_weights_only writes none
        return "has weights only, so no run can resume from it"
    if not loaded.get("whole_step", True):
        return "was written in the middle of a step, whose gradients it does not have"
    return None


def find_newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps in a run's folder; skips those that no run can resume from, with a warning."""
    found = []
    for path in folder.glob("*.ckpt"):
        try:
            loaded = read_checkpoint(path, mmap=True)
            if lack := what_lacks(loaded):
                raise CheckpointError(f"{path} {lack}")
            found.append((loaded["global_step"], path.name == "last.ckpt", path))
        except CheckpointError as error:
            log.warning("checkpoint skipped: %s", error)
    for step, _, path in sorted(found, reverse=True):
        if not is_whole(path):
            log.warning("checkpoint skipped: %s is damaged", path)
            continue
        log.info("resuming from %s, step %d", path, step)
        return path
    return None


def is_whole(path: Path) -> bool:
    """Whether all of a checkpoint can be read, by the checksums of its archive: its directory may be intact anyway."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception:  # for arbitrary bytes, the reader raises errors of any kind
        return False


def gather(trainer: Trainer, item: Any) -> list[Any]:
    """The items of all ranks, in the order of the ranks; all ranks must call it."""
    items = [item] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(items, item)
    return items


def _random_states() -> dict[str, Any]:
    """The states of this process's random generators, in types that `torch.load(weights_only=True)` accepts."""
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
