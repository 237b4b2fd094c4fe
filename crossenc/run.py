"""One run of fit, validate, test or predict: LightningCLI plus the folder of a run.

checkpoints/NAME/    config.yaml  metrics.csv  events.out.tfevents.*  best.ckpt  last.ckpt
                     metrics.json  scores.parquet  model/  predictions.csv
"""

from __future__ import annotations

import locale
import logging
import os
import shutil
import sys
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, WeightAveraging
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import DistError

from .backbone import has_head
from .callbacks import Cost, Pictures, PlainProgress, PredictionFile, TrainSpeed, ValidateAtEnd
from .checkpoints import (
    AtomicCheckpointIO,
    BestCheckpoint,
    LastCheckpoint,
    command_to_go_on,
    find_newest,
    owner,
    read_checkpoint,
    what_lacks,
)
from .data import OnMismatch, PairDataModule
from .errors import CheckpointError, HubError, LostProcessError, UsageError, one_line, parser_line
from .evaluating import finish, print_figures, refuse_forks
from .exporting import export, score_pairs
from .loading import read_threshold
from .module import CrossEncoderModule, averaged_by, layer_shapes
from .options import LINKED, as_list, check_callbacks, check_trainer, check_words
from .parts import writing

log = logging.getLogger(__name__)

DEFAULT_RUN, DEFAULT_OUTPUT = "run", "checkpoints"
# The Trainer's part of the recipe of sentence-transformers' Quora example, and no table of layers.
TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "gradient_clip_val": 1.0,
    "val_check_interval": 500,
    "check_val_every_n_epoch": None,  # count the 500 batches across epochs
    "log_every_n_steps": 10,
    "enable_model_summary": False,
}

# The model's options that a checkpoint's optimizer depends on: if they differ, it has other parameters, or would
# silently keep its own learning rates.
_OPTIMIZER_OPTIONS = (
    "optimizer",
    "learning_rate",
    "weight_decay",
    "layer_decay",
    "head_rate",
    "freeze_layers",
    "shared_segments",
    "lora",
)

_PROFILERS: dict[str, Any] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}


def native_precision(accelerator: str) -> str:
    """`bf16-mixed` if the hardware has native bf16 arithmetic, else `32-true`."""
    native = False
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif accelerator in ("auto", "cpu"):
        native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if native else "32-true"


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` when training starts, so that a run that refuses to resume does not change the folder's.

    It leaves out `ckpt_path`, which would override a `--ckpt_path` given before `--config`.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del self.config.ckpt_path
        super().setup(trainer, pl_module, "fit")


class RunCLI(LightningCLI):
    """LightningCLI for one command, with the options of a run, such as `--run`, `--output` and `--examples`."""

    def __init__(self, command: str, args: list[str]) -> None:
        self.command = command
        self.folder, self.goes_on, self.old_log = Path(), True, Path()
        self.checkpoint: str | None = None
        parsing: dict[str, Any] = {"exit_on_error": False, "allow_abbrev": False}
        try:
            super().__init__(
                CrossEncoderModule,
                PairDataModule,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},  # the folder is new, or belongs to the run that is resumed
                trainer_defaults=TRAINER_DEFAULTS,
                seed_everything_default=42,
                parser_kwargs={"prog": "python -m crossenc", **parsing, command: parsing},
                args=[command, *args],
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,  # not needed: the module's arguments are plain values
            )
        except BaseException as error:
            log_file = self.folder / "metrics.csv"
            if self.old_log.is_file() and not log_file.exists():
                self.old_log.rename(log_file)  # the run did not resume
            own = self.folder / "config.yaml"
            if isinstance(error, HubError) and self.checkpoint and own.is_file():
                raise HubError(f"{error}; for the options of the checkpoint's run, add --config {own}") from error
            if isinstance(error, HubError) and self.command == "fit":
                local = "--data.source FILE --model.backbone FOLDER, or to try it out --config configs/quickstart.yaml"
                raise HubError(f"{error}: {local}") from error
            if isinstance(error, UnicodeError):
                raise UsageError(
                    f"a config file or an option cannot be read or written in this system's encoding ({one_line(error)}"
                    "); save config files as UTF-8, and where the system has another encoding, set PYTHONUTF8=1"
                ) from error
            if isinstance(error, RuntimeError | ValueError) and "SLURM" in str(error):  # Lightning's advice
                raise UsageError(one_line(error)) from error
            if isinstance(error, ValueError) and "val_check_interval" in str(error):  # raised once the pairs are read
                raise UsageError(f"{one_line(error)}; 1.0 is the end of an epoch") from error
            # DistError is torch's own class; gloo raises a plain RuntimeError.
            if isinstance(error, RuntimeError) and (isinstance(error, DistError) or "gloo" in str(error)):
                raise LostProcessError(
                    f"another process of the run ended, so this one stops too ({one_line(error)[:200]}); the output of "
                    "the other one says why; resume with: --ckpt_path last"
                ) from error
            raise
        finally:
            if not self.goes_on:
                discard_if_empty(self.folder)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the current command, because building each parser takes a second."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str | None, default=None, help="Name of the run's folder (default: run).")
        parser.add_argument("--output", type=str, default=DEFAULT_OUTPUT, help="Folder that holds the runs.")
        parser.add_argument(
            "--examples",
            type=list[tuple[str, str]],
            default=[],
            help="Pairs of texts to score with the export at the end of fit.",
        )
        parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
        # These are options of all commands, because all of them read the config.yaml that fit wrote.
        parser.add_argument(
            "--checkpoint_every_n_steps",
            type=PositiveInt,
            default=500,
            help="Write last.ckpt every this many steps, and for the first time at step 50 at the latest.",
        )
        parser.add_argument(
            "--checkpoint_every_n_minutes",
            type=PositiveFloat,
            default=10.0,
            help="After this many minutes, write last.ckpt at the end of the next step in any case.",
        )
        parser.add_argument(
            "--on_mismatch",
            type=OnMismatch,
            default="refuse",
            help="When a run is resumed with other data, tokenizer, devices or batches: `refuse`, or keep weights and "
            "optimizer and `continue` with the next epoch.",
        )
        for target, source in LINKED.items():
            parser.link_arguments(source, target, bool if target == "data.twice" else None)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        check_words(args)  # type: ignore[arg-type]  # a list of words, as __init__ gives it
        self.config = parser.parse_args(args)  # type: ignore[arg-type]
        config = self.config[self.command]
        given_path, self.asked = config.ckpt_path, config.model.clone()
        check_trainer(self.command, config)
        if self.command == "fit" and not config.trainer.fast_dev_run:
            try:
                text = parser.dump(self.config, skip_none=False)  # as SaveConfig will write it
            except (TypeError, ValueError, UserWarning) as error:
                raise UsageError(
                    "the options cannot be written to config.yaml; in place of Timer, use --trainer.max_time; a "
                    f"function, also as a default, must have an import path: {parser_line(error)[:300]}"
                ) from error
            text.encode(locale.getpreferredencoding(False))  # in which the parser reads and writes files
        config.ckpt_path = self.checkpoint = _find_checkpoint(self.command, config)
        self.folder, self.goes_on = _run_folder(config)
        if self.command == "fit":
            config.ckpt_path = None  # else LightningCLI replaces the given options by those of the checkpoint
        # A run that was killed before its first checkpoint starts again in the same folder.
        self.goes_on |= given_path == "last" and self.folder.is_dir()

    def before_instantiate_classes(self) -> None:
        config = self.config[self.command]
        config.ckpt_path = self.checkpoint
        if config.trainer.precision is None:
            config.trainer.precision = native_precision(str(config.trainer.accelerator))
            has = "has" if config.trainer.precision == "bf16-mixed" else "does not have"
            log.info("precision %s: this hardware %s native bf16 arithmetic", config.trainer.precision, has)
        if self.command != "fit" and self.checkpoint:
            defaults = signature(CrossEncoderModule).parameters
            for name, value in self.asked.items():
                if value not in (config.model[name], defaults[name].default):
                    log.info("model.%s is taken from the checkpoint: %s (not %s)", name, config.model[name], value)
        if self.command in ("validate", "test"):
            config.verbose = False  # print only our own table
        elif self.command == "predict":
            config.return_predictions = True  # PredictionFile needs them
        if TorchElasticEnvironment.detect():  # torchrun determines the number of processes
            local = int(os.environ["LOCAL_WORLD_SIZE"])
            config.trainer.devices, config.trainer.num_nodes = local, int(os.environ["WORLD_SIZE"]) // local
        if not self.goes_on:
            self.folder = _claim(self.folder)
        config.output, config.run = str(self.folder.parent), self.folder.name  # `--run` may contain folders
        config.trainer.default_root_dir = str(self.folder)  # in place of another run's folder in its config.yaml
        log.info("run folder: %s", self.folder)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (ImportError, TypeError, ValueError) as error:  # from the Trainer, or the user's loggers and callbacks
            raise UsageError(f"an option cannot be used: {parser_line(error)}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the run's loggers and callbacks, in addition to the user's."""
        given = self.config_init[self.command].trainer
        callbacks = as_list(given.callbacks)
        check_callbacks(callbacks, given.strategy)
        kwargs["callbacks"] = [*callbacks, *self._callbacks(given, callbacks)]
        if not any(isinstance(callback, ProgressBar) for callback in kwargs["callbacks"]):
            kwargs["enable_progress_bar"] = False  # or Lightning adds its own in addition to `PlainProgress`
        if kind := _PROFILERS.get(str(given.profiler)):  # Lightning would only log the report, where nobody sees it
            kwargs["profiler"] = kind(filename="profile")  # in the run's folder
        if self.command == "fit" and given.logger is not False:
            log_file = self.folder / "metrics.csv"
            if log_file.is_file() and getattr(rank_zero_only, "rank", 0) == 0:
                # Of the run that is resumed; CSVLogger would delete it.
                names = (log_file.with_stem(f"metrics-{number}") for number in count(1))
                self.old_log = log_file.rename(next(name for name in names if not name.exists()))
            ours = [kind(self.folder, name="", version="") for kind in (CSVLogger, TensorBoardLogger)]
            kwargs["logger"] = [*ours, *as_list(given.logger)]
        elif given.logger in (None, True):
            kwargs["logger"] = False  # an evaluation writes metrics.json, and does not add to the logs of the fit
        if given.strategy == "fsdp":
            # Lightning's own fsdp does not run on CPUs; this strategy leaves the sharding to `configure_model`.
            kwargs["strategy"] = ModelParallelStrategy(save_distributed_checkpoint=False)
        kwargs["plugins"] = [*as_list(given.plugins), AtomicCheckpointIO()]
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            raise UsageError(f"an option cannot be used: {one_line(error)}") from error
        refuse_forks(trainer)
        # Lightning checks this only for several devices. srun sets the variable, and sbatch does not.
        tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
        if trainer.world_size == 1 and tasks > 1 and SLURMEnvironment.detect():  # not in an interactive shell
            raise UsageError(
                f"srun started {tasks} processes, but each would train alone; set --trainer.devices and "
                "--trainer.num_nodes as --ntasks-per-node and --nodes"
            )
        return trainer

    def _callbacks(self, given: Any, users: list[Any]) -> list[Any]:
        callbacks: list[Any] = [TrainSpeed(), ValidateAtEnd(), Pictures(), Cost()] if self.command == "fit" else []
        if given.enable_progress_bar is not False and not any(isinstance(own, ProgressBar) for own in users):
            # A GPU has to wait whenever the loss is read.
            refresh = 10 if torch.cuda.is_available() else 1
            # With Lightning's three decimals, a learning rate would be shown as 0.000.
            bar = RichProgressBar(refresh, theme=RichProgressBarTheme(metrics_format=".5g"))
            callbacks.append(bar if sys.stderr.isatty() else PlainProgress())
        if self.command == "fit" and given.enable_checkpointing is not False and not given.fast_dev_run:
            config, self.best = self.config["fit"], BestCheckpoint(self.folder)
            every = (config.checkpoint_every_n_steps, config.checkpoint_every_n_minutes)
            callbacks += [self.best, LastCheckpoint(*every, self.checkpoint)]
        if self.command == "predict" and not given.fast_dev_run:
            callbacks.append(PredictionFile(self.folder / "predictions.csv"))
        return callbacks

    def before_validate(self) -> None:
        if self.checkpoint is None and not has_head(self.model.model.config.architectures):
            log.info("without --ckpt_path, the head is new, and its scores mean nothing")

    before_test = before_predict = before_validate

    def before_fit(self) -> None:
        if self.checkpoint:
            loaded = read_checkpoint(Path(self.checkpoint), mmap=True)
            sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
            if sharded and not loaded["crossenc"].get("sharded"):
                raise CheckpointError(
                    "the run started with unsharded weights, whose optimizer a sharded run cannot take over; resume "
                    "without --trainer.strategy fsdp, or start a new run with its export as --model.backbone"
                )
            before, now = loaded["hyper_parameters"], self.model.hparams
            changed = [
                f"model.{name} {before.get(name)} (now {now[name]})"
                for name in _OPTIMIZER_OPTIONS
                if before.get(name) != now[name]
            ]
            # Lightning would take averaged weights for plain ones, or start an average in the middle of the run.
            averaged_before, averaged_now = loaded["crossenc"]["training"].get("averaged by"), averaged_by(self.trainer)
            if averaged_before != averaged_now:
                changed.append(f"the callback {averaged_before} (now {averaged_now})")
            # Shapes are compared and not the backbone's name, since its folder may have been moved.
            if not changed and layer_shapes(loaded["state_dict"]) != layer_shapes(self.model.state_dict()):
                changed = [f"the weights of model.backbone {before['backbone']} (which do not fit {now['backbone']})"]
            if changed:
                raise CheckpointError(
                    f"the run started with {', '.join(changed)}, which its optimizer depends on; resume with the same, "
                    "or start a run with another name"
                )
        total, trained = (self.model.model.num_parameters(only_trainable=only) / 1e6 for only in (False, True))
        log.info("backbone %s: %.1f M parameters, %.1f M trained", self.model.hparams.backbone, total, trained)

    def after_fit(self) -> None:
        try:
            self._test_and_export()
        except (KeyboardInterrupt, SystemExit):  # a signal, which Lightning may turn into a SystemExit
            log.info("training is done; test and export with: %s", command_to_go_on(self.trainer))
            raise

    def _test_and_export(self) -> None:
        """Test the best checkpoint, export it, and print the figures."""
        if self.config["fit"].trainer.fast_dev_run:
            return
        done, planned = self.trainer.global_step, self.model.planned_steps()
        if 0 < done < planned:
            log.info("training ended at step %d of %s, due to max_time, a callback or --on_mismatch", done, planned)
        if not self.trainer.checkpoint_callbacks or not self.trainer.global_step:
            log.info("no step was taken, or checkpoints are disabled: there is nothing to test and export")
            return
        best = chosen = self.best.best_model_path
        if not chosen:  # without a validation, no checkpoint was chosen
            best = str(self.trainer.strategy.broadcast(self.folder) / "last.ckpt")  # the first rank chose the folder
            if not Path(best).is_file():  # the checkpoint is of another run, and no steps were left to train
                if self.trainer.is_global_zero and not self.goes_on:
                    (self.folder / "config.yaml").unlink(missing_ok=True)
                raise CheckpointError(f"{self.checkpoint} is already fully trained; raise max_epochs or max_steps")
        # When a model is evaluated, Lightning's weight averaging would swap in the weights that are not averaged.
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, WeightAveraging)]
        if "val" in self.datamodule.encoded and self.trainer.limit_val_batches != 0:
            loggers, self.trainer.loggers = self.trainer.loggers, []  # keep this out of the learning curves
            self.trainer.validate(self.model, self.datamodule, ckpt_path=best, verbose=False)
            self.trainer.loggers = loggers
            if not chosen and self.trainer.is_global_zero:
                loaded = read_checkpoint(Path(best))
                loaded["crossenc"] |= self.model.evaluation()
                AtomicCheckpointIO().save_checkpoint(loaded, best)
            self.trainer.strategy.barrier()
            # Report the checkpoint's threshold: with other batches, scores differ in the last digits.
            if (threshold := read_threshold(best)) is not None:
                self.model.figures["val/threshold"] = threshold
        figures = dict(self.model.figures)  # the test replaces them by the checkpoint's, which has fewer on dev pairs
        if "test" in self.datamodule.encoded and self.trainer.limit_test_batches != 0:
            self.trainer.test(self.model, self.datamodule, ckpt_path=best, verbose=False)
        self.model.figures |= figures
        if self.trainer.is_global_zero:
            finish(self.model, self.datamodule, self.folder, owner(Path(best)))
            folder = export(best, str(Path(best).parent / "model"), overwrite=True)
            print_figures(self.model.figures)
            print(f"\nexport: {folder}")
            if examples := self.config["fit"].examples:
                print("its scores for the examples:")
                for (a, b), score in zip(examples, score_pairs(folder, examples), strict=True):
                    print(f"  {score:.3f}  {a} | {b}")

    def after_validate(self) -> None:
        if self.trainer.is_global_zero and not self.config[self.command].trainer.fast_dev_run:
            checkpoint = owner(Path(self.checkpoint)) if self.checkpoint else None
            finish(self.model, self.datamodule, self.folder, checkpoint)
            split = "val" if self.command == "validate" else "test"
            print_figures({name: value for name, value in self.model.figures.items() if name.startswith(split)})

    after_test = after_validate


def _find_checkpoint(command: str, config: Any) -> str | None:
    """The path of `--ckpt_path`: `best` and `last` are those of the run that `--output` and `--run` name.

    With `last`, `fit` resumes from the newest intact checkpoint, and starts from scratch if there is none, so that the
    same command starts a run and resumes it.
    """
    if config.ckpt_path is None:
        return None
    path, home = Path(config.ckpt_path), Path(config.output) / (config.run or DEFAULT_RUN)
    if command == "fit" and config.ckpt_path == "last":
        if newest := find_newest(home):
            return str(newest)
        log.info("there is no checkpoint in %s yet: starting the run", home)
        return None
    if config.ckpt_path in ("best", "last"):
        path = home / f"{config.ckpt_path}.ckpt"
    if not path.exists():
        raise CheckpointError(f"--ckpt_path {config.ckpt_path}: there is no {path}")
    loaded = read_checkpoint(path, mmap=True)
    if command == "fit" and (lack := what_lacks(loaded)):
        raise CheckpointError(f"{path} {lack}; give the run's last.ckpt")
    return str(path)


def _run_folder(config: Any) -> tuple[Path, bool]:
    """The run's folder, and whether it is already the run's own: a run whose checkpoint is in it is resumed there."""
    named = Path(config.output) / (config.run or DEFAULT_RUN)
    if not config.ckpt_path:
        return named, False
    home = Path(config.ckpt_path).parent
    # No other folder was given with --output.
    own = config.output == DEFAULT_OUTPUT or home.resolve().is_relative_to(Path(config.output).resolve())
    if home.resolve() == named.resolve() or (own and config.run is None and (home / "config.yaml").is_file()):
        return home, True
    return named, False


def _claim(folder: Path) -> Path:
    """Create the first of `NAME`, `NAME-2`, `NAME-3`, ... that does not exist; creating it claims it for this run."""
    if getattr(rank_zero_only, "rank", 0) != 0:  # only the first rank writes
        return folder
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    free = folder
    for number in count(2):
        try:
            free.mkdir()
            break
        except FileExistsError:
            free = folder.with_name(f"{folder.name}-{number}")
    return free


@rank_zero_only
def discard_if_empty(folder: Path) -> None:
    """Remove a run's folder if it is empty apart from the start of a log, so that bad input leaves no trace."""
    if folder.is_dir() and all("tfevents" in path.name or path.name == "hparams.yaml" for path in folder.iterdir()):
        shutil.rmtree(folder)
