"""Options of a run that do not work with crossenc, or with each other: each is refused in one line before any work."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging

from .data import refuse_part_of_batches
from .errors import UsageError, one_line
from .metrics import evaluation_figures

# Callbacks that would change what the module and the data module have already fixed, and the options to use instead.
_UNSUPPORTED_CALLBACKS = {
    "LearningRateFinder": "--model.learning_rate",
    "BatchSizeFinder": "--data.batch_size",
    "BackboneFinetuning": "--model.freeze_layers",
    "GradientAccumulationScheduler": "--trainer.accumulate_grad_batches",  # the schedule counts its steps by this
    # It sets the averaged weights after the last checkpoint, but the best checkpoint is tested and exported.
    "StochasticWeightAveraging": "--trainer.callbacks+=EMAWeightAveraging",
    "OnExceptionCheckpoint": "--checkpoint_every_n_minutes",
    "SpikeDetection": "--trainer.gradient_clip_val",  # its state cannot be loaded to evaluate the best checkpoint
}

# Arguments of the data module that are taken from the model's or the run's.
LINKED = {f"data.{name}": f"model.{name}" for name in ("backbone", "max_length", "revision", "symmetric")}
LINKED |= {"data.twice": "model.consistency", "data.on_mismatch": "on_mismatch"}


def as_list(given: Any) -> list[Any]:
    """What was given, one item or a list, as a list; without None and True, which ask for Lightning's default."""
    return [item for item in (given if isinstance(given, list) else [given]) if item not in (None, True)]


def check_words(words: list[str]) -> None:
    """Refuse what the parser would tell of unclearly, or not at all.

    Raises:
        UsageError: A config is not YAML, has no options, an empty section or a key twice; or an argument is given that
            follows from another option or from the run's folder, and would be overwritten without a word.
    """
    for word, following in pairwise([*words, ""]):
        if word.startswith("-c"):  # the short form of --config
            name, value = "config", word[2:].removeprefix("=") or following
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            value = value if equals else following
        else:
            continue
        given, where = {name}, "on the command line"
        if name == "trainer.default_root_dir":
            raise UsageError("--trainer.default_root_dir is the run's folder; set --output and --run instead")
        if name in ("config", "data") and value:
            where = f"in {value[:200]}"
            config = _read_yaml(value) if name == "config" else {"data": value}
            if not config or isinstance(config, list):
                raise UsageError(f"the config {value[:200]} has no options; write some, or leave it out")
            config = config if isinstance(config, dict) else {}
            for section in ("model", "data", "trainer"):
                if str(config.get(section, "some")).lower() in ("", "~", "null"):
                    raise UsageError(f"the section {section}, {where}, is empty; give it an option, or remove it")
            data = config.get("data")
            data = _read_yaml(data, Path(value).parent if name == "config" else Path())
            given = {*config, *(f"data.{key}" for key in (data if isinstance(data, dict) else ()))}
        for target in given & LINKED.keys():
            raise UsageError(f"{target}, given {where}, follows from {LINKED[target]}; set {LINKED[target]} instead")


def _read_yaml(source: Any, folder: Path = Path()) -> Any:
    """The content of a YAML file, whose name is relative to `folder`, or of a text in YAML; all values are texts."""
    if not isinstance(source, str):
        return source
    try:
        opened: Any = (folder.expanduser() / Path(source).expanduser()).open(encoding="utf-8")
    except (OSError, ValueError, RuntimeError):  # not a file, or not even a name of one: the options themselves
        opened = nullcontext(source)
    try:
        with opened as text:
            return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"a config is not valid YAML: {one_line(error)}") from error


class _Loader(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # type: ignore[misc]
    """Reads YAML as the parser does, but refuses a key that stands twice, of which the parser would take the last.

    libyaml's loader, as the parser's is: PyYAML's own refuses a list such as [What?, Why?]. The base one leaves values
    as texts: the parser knows no dates, and 2026-02-30 is a fine name of a run.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            if key.value != "<<":  # a mapping may merge several others
                seen.add(str(key.value))
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def check_trainer(command: str, config: Any) -> None:
    """Refuse options that do not work with crossenc, and undo a default that would change what an option means.

    Raises:
        UsageError: An option of the Trainer, or the seed, cannot be used.
    """
    trainer, seed = config.trainer, config.seed_everything
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed_everything must be from 0 to {2**32 - 1}, or true or false, not {seed}")
    for callback in as_list(trainer.callbacks):  # early: some of them could not be written to config.yaml either
        _refuse_unsupported(callback.class_path.rpartition(".")[2])
    if trainer.barebones:
        raise UsageError("--trainer.barebones would leave out the run's checkpoints and metrics; remove it")
    if any(way in str(trainer.strategy) for way in ("spawn", "fork", "notebook")):
        raise UsageError("--trainer.strategy: the results of ddp_spawn and the like stay in other processes; use ddp")
    splits = ("val", "test") if command == "fit" else ({"validate": "val"}.get(command, command),)
    refuse_part_of_batches(trainer, splits)
    if command != "fit" and trainer[f"limit_{splits[0]}_batches"] == 0:
        raise UsageError(f"--trainer.limit_{splits[0]}_batches 0 leaves nothing to {command}")
    if (every := trainer.check_val_every_n_epoch) is not None and every < 1:
        raise UsageError(f"--trainer.check_val_every_n_epoch must be at least 1, or null, not {every}")
    if (trainer.gradient_clip_val or 0) < 0:
        raise UsageError(f"--trainer.gradient_clip_val must be at least 0, not {trainer.gradient_clip_val}")
    if trainer.accumulate_grad_batches < 1:
        raise UsageError(f"--trainer.accumulate_grad_batches must be at least 1, not {trainer.accumulate_grad_batches}")
    if trainer.val_check_interval == 0:
        raise UsageError("--trainer.val_check_interval must be above 0; for no validation, set --data.val_size 0")
    # Our default of check_val_every_n_epoch is not Lightning's, but a fraction alone must mean what it means there.
    if trainer.check_val_every_n_epoch is None and isinstance(trainer.val_check_interval, float):
        trainer.check_val_every_n_epoch = 1


def _refuse_unsupported(name: str) -> None:
    """Raise `UsageError` if a callback's class has the name of one that does not work with crossenc."""
    if name in _UNSUPPORTED_CALLBACKS:
        raise UsageError(f"{name} does not work with crossenc; use {_UNSUPPORTED_CALLBACKS[name]}")


def check_callbacks(callbacks: list[Any], strategy: Any) -> None:
    """Refuse callbacks that would fail hours later in the run; raises `UsageError`."""
    # A monitored metric is only checked if all callbacks are Lightning's, since others may log metrics of their own.
    all_known = all(type(callback).__module__.startswith("lightning.") for callback in callbacks)
    for callback in callbacks:
        name = type(callback).__name__
        _refuse_unsupported(name)
        if isinstance(callback, WeightAveraging) and strategy == "fsdp":
            raise UsageError(f"{name} does not work with --trainer.strategy fsdp, which shards the weights; use ddp")
        monitor = getattr(callback, "monitor", None)
        if not all_known or not monitor:
            continue
        example = dict.fromkeys(("label", "score", "score_raw", "score_crossed"), np.array([0.0, 1.0]))
        logged = [f"val/{name}" for name in ("loss", *evaluation_figures(example))]
        counters = ("epoch", "step") if isinstance(callback, Checkpoint) else ()
        if monitor not in (*logged, "train/loss", "train/lr", "train/pairs_per_second", *counters):
            raise UsageError(f"{name}: there is no metric {monitor}; choose one of {', '.join(logged)}")
