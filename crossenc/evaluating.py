"""The full report of an evaluation, for a run's checkpoint or any model that gives one logit for a pair."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from numpy.typing import NDArray

from .calibration import Calibration
from .card import TITLES, metric_table, write_report
from .data import PairDataModule
from .errors import DataError, OutputError, UsageError, one_line
from .figures import draw, save
from .loading import find, load_checkpoint, longest_pair, plain_model, read_threshold, require_head
from .metrics import evaluation_figures, intervals
from .module import CrossEncoderModule
from .parts import writing
from .records import is_evaluation, split_of, write_figures, write_scores

log = logging.getLogger(__name__)


def evaluate(
    model: str | Path,
    arguments: dict[str, Any],
    output: str,
    accelerator: str = "auto",
    devices: int | str = "auto",
    precision: str = "32-true",
) -> dict[str, float]:
    """Evaluate a model on the dev pairs, which choose its threshold, and on the test pairs, and write a report.

    Args:
        model: An export's folder, a Hub id, or a `.ckpt` file: any model with one logit, trained here or not.
        arguments: Those of `PairDataModule`, except the model's own. `source` is needed only where dev or test pairs
            are cut off it, or where the model was trained on it: then pairs whose questions are not in it are
            reported too.
        output: The folder to write: `README.md` with the report, `figures/`, `metrics.json`, `scores.parquet`.
        accelerator: As in Lightning: `auto`, `cpu`, `gpu`, ...
        devices: Number of devices; `auto` takes all GPUs (in a notebook, one), or one process on a CPU.
        precision: As in Lightning: `32-true`, `bf16-mixed`, ...

    Returns:
        The figures, as `metrics.json` has them.

    Raises:
        BackboneError: The model cannot be loaded, or does not have exactly one label.
        CheckpointError: The checkpoint is missing or was not written by crossenc.
        DataError: The source has neither dev nor test pairs.
        OutputError: The output exists and is not an earlier evaluation, or cannot be written.
        UsageError: There are no pairs; accelerator, devices or precision cannot be used; or a notebook asks for
            several devices.
    """
    sources = [arguments.get(name) for name in ("source", "val_source", "test_source")]
    if all(source is None or str(source) == "" for source in sources):  # PairDataModule refuses a DataFrame
        raise UsageError("there are no pairs to evaluate on; set --data.val_source, --data.test_source or both")
    folder = Path(output)
    if folder.exists() and not (is_evaluation(folder) or (folder.is_dir() and not any(folder.iterdir()))):
        raise OutputError(f"{output} exists and is not an earlier evaluation; choose another folder with --output")
    module = load_module(model)
    tokenizer_of = {name: module.hparams[name] for name in ("backbone", "revision")}
    data = PairDataModule(**{"source": "", **arguments, **tokenizer_of, "max_length": module.max_length})
    try:
        trainer = Trainer(
            accelerator=accelerator,
            devices=devices,
            precision=precision,  # type: ignore[arg-type]
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        raise UsageError(f"accelerator, devices or precision: {one_line(error)}") from error
    refuse_forks(trainer)
    splits = data.splits()
    if not {"val", "test"} & splits:
        raise DataError(f"{data.source} has neither dev nor test pairs; set --data.val_source or --data.test_source")
    with writing(output):
        folder.mkdir(parents=True, exist_ok=True)
    if "val" in splits:
        trainer.validate(module, data, verbose=False)
    if "test" in splits:
        trainer.test(module, data, verbose=False)
    if trainer.is_global_zero:
        with writing(output):
            columns = finish(module, data, folder, None)
            shutil.rmtree(folder / "figures", ignore_errors=True)  # an earlier evaluation may have had other plots
            save(draw(columns, module.threshold), folder / "figures")
            read_from = data.read_from(columns)
            write_report(folder, str(model), module.figures, module.threshold, read_from, columns.get("val"))
    return module.figures


def refuse_forks(trainer: Trainer) -> None:
    """Raise `UsageError` for several devices in a notebook: Lightning forks there, and figures stay in the forks."""
    if trainer.num_devices > 1 and hasattr(sys, "ps1"):
        raise UsageError(f"a notebook can use only one device, not {trainer.num_devices}; set devices to 1")


def load_module(model: str | Path) -> CrossEncoderModule:
    """The module of an export, a Hub id or a checkpoint; its scores are the model's own."""
    path = find(model)
    if path.is_file():
        module = load_checkpoint(path)[1]
        module.model = plain_model(module)  # with its calibration in its weights, as in its export
        module.fitted, module.folds, module.figures = Calibration(), False, {}
        module.hparams["calibrate"] = True  # so that the report says what a calibration would bring
        return module
    require_head(str(model), path)
    module = CrossEncoderModule(str(path), longest_pair(path))
    module.threshold, module.folds = read_threshold(model), False
    return module


def finish(
    module: CrossEncoderModule, data: PairDataModule, folder: Path, owner: str | None
) -> dict[str, dict[str, NDArray[Any]]]:
    """Add the figures that are worth their time only once to the module's, and write those of the splits
    that were evaluated, with the scores of each pair.

    These are 95 % intervals, and as `val_unseen/...` and `test_unseen/...` the figures of the pairs that share no
    question with the training pairs, unless these are all pairs or none. Returns the columns of each split as written.
    """
    figures = dict(module.figures)
    for split, columns in module.scored.items():
        unseen = data.unseen(split, columns["row"])
        parts = {split: columns}
        if not unseen.any():
            log.warning("all %s pairs share a question with the training pairs; new ones may be harder", TITLES[split])
        elif not unseen.all():
            parts[f"{split}_unseen"] = {name: values[unseen] for name, values in columns.items()}
        threshold = figures[f"{split}/threshold"]
        for name, part in parts.items():
            found = evaluation_figures(part, threshold) | intervals(part, threshold)
            figures |= {f"{name}/{key}": value for key, value in found.items()}
    module.figures = figures
    sources = data.read_from(module.scored)
    # Without the checkpoint's figures of other splits: the file may have newer ones, measured on other pairs.
    measured = {name: value for name, value in figures.items() if split_of(name) in sources}
    write_figures(folder, owner, measured, sources)
    evaluated = {split: columns | data.texts(split, columns["row"]) for split, columns in module.scored.items()}
    write_scores(folder, owner, evaluated)
    return evaluated


def print_figures(figures: dict[str, float], folded: bool = True) -> None:
    """Print the card's metric table; arguments as in `metric_table`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    splits, rows = metric_table(figures, folded)
    if not splits:
        return
    table = Table("", *splits, box=box.SIMPLE)
    for row in rows:
        table.add_row(*row)
    wide = Console(width=140)
    (Console() if wide.is_terminal else wide).print(table)
