"""The command line: one table of commands, shown without importing torch; each command imports what it needs."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import crossenc

from .errors import CrossencError, LostProcessError, StoppedError, UsageError, one_line, parser_line

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

log = logging.getLogger(__name__)


def _run(command: str, args: list[str]) -> None:
    from .run import RunCLI

    RunCLI(command, _underscored(args))


def _evaluate(command: str, args: list[str]) -> None:
    from jsonargparse import ArgumentParser
    from lightning.pytorch.utilities import rank_zero_only

    from .evaluating import print_figures

    parser = ArgumentParser(prog=f"crossenc {command}", exit_on_error=False, description=COMMANDS[command][0])
    parser.add_argument("model", type=str, help=_MODEL_HELP)
    parser.add_class_arguments(crossenc.PairDataModule, "data", skip=_MODEL_ARGUMENTS | _TRAINING_ARGUMENTS)
    parser.set_defaults({"data.source": ""})
    parser.add_argument("--output", type=str, default="evaluation", help="Folder for the report.")
    parser.add_function_arguments(crossenc.evaluate, skip={"model", "arguments", "output"})
    given = _parse(parser, args)
    figures = crossenc.evaluate(arguments=given.pop("data"), **given)
    if getattr(rank_zero_only, "rank", 0) == 0:
        print_figures(figures, folded=False)
        print(f"\nreport: {given['output']}")


# Arguments of the data module that are not options of `evaluate`: those taken from the model, and those of training.
_MODEL_ARGUMENTS = {"backbone", "max_length", "revision"}
_TRAINING_ARGUMENTS = {"symmetric", "twice", "transitive", "batch_size", "batch_by", "window", "on_mismatch"}
_MODEL_HELP = "An export's folder, a Hub id, or a .ckpt file."
# Positional arguments of the commands that call a function, with their help; its other parameters are options.
_POSITIONAL = {
    "export": {"checkpoint": "A .ckpt file written by fit.", "output": "The folder to write."},
    "score": {
        "model": _MODEL_HELP,
        "pairs": "A csv, tsv, jsonl or parquet file, or - for jsonl from stdin.",
        "output": "The file to write, or - for jsonl to stdout.",
    },
    "rerank": {"model": _MODEL_HELP},
    "mine": {
        "model": _MODEL_HELP,
        "questions": "A csv, tsv, jsonl or parquet file of questions, or - for jsonl from stdin.",
        "output": "The file to write the pairs to; the groups go to a file beside it.",
    },
}


def _call(command: str, args: list[str]) -> None:
    """Call the function of the package that has the command's name, with the arguments from the command line."""
    from jsonargparse import ArgumentParser

    function, positional = getattr(crossenc, command), _POSITIONAL[command]
    parser = ArgumentParser(prog=f"crossenc {command}", exit_on_error=False, description=COMMANDS[command][0])
    for name, text in positional.items():
        parser.add_argument(name, type=str, help=text)
    parser.add_function_arguments(function, skip=set(positional))
    if command == "rerank":
        parser.set_defaults({"output": "-"})
    flags = {f"--{name}" for name, about in signature(function).parameters.items() if about.default is False}
    result = function(**_parse(parser, args, flags))
    if command == "export":
        print(result)
    elif command == "mine":
        print(result.pairs, result.groups, sep="\n")


def _underscored(args: list[str]) -> list[str]:
    """The arguments with options named like parameters, but values unchanged: `--on-error=a-b` to `--on_error=a-b`."""
    return [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in args]


_BOOLEANS = ("true", "false", "yes", "no", "on", "off")  # the words that jsonargparse accepts


def _parse(parser: ArgumentParser, args: list[str], flags: Collection[str] = ()) -> dict[str, Any]:
    """The parsed arguments. Options may be written with dashes, and those in `flags` without a value, for true."""
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    words = [
        f"{word}=true" if word in flags and following.lower() not in _BOOLEANS else word
        for word, following in pairwise([*_underscored(args), ""])
    ]
    given: dict[str, Any] = parser.parse_args(words).as_dict()
    del given["debug"]  # `main` handles it
    return given


# name: (what it does, how it runs)
COMMANDS: dict[str, tuple[str, Callable[[str, list[str]], None]]] = {
    "fit": ("train, keep the best checkpoint, test it and export it", _run),
    "validate": ("evaluate a checkpoint on the dev pairs, and show the threshold that they choose", _run),
    "test": ("evaluate a checkpoint on the test pairs at its stored threshold", _run),
    "predict": ("score every pair of a source, and write predictions.csv", _run),
    "evaluate": ("report on any model: evaluate MODEL --data.val_source DEV --data.test_source TEST", _evaluate),
    "score": ("add a score to every pair in a file of any size: score MODEL INPUT OUTPUT", _call),
    "rerank": ("rerank the candidates of each query: rerank MODEL --queries Q --corpus C", _call),
    "mine": ("find the duplicates in a large set of questions: mine MODEL QUESTIONS OUTPUT", _call),
    "export": ("export a checkpoint to a folder: export CKPT OUT", _call),
}


def command_table() -> str:
    """The help of `crossenc` itself: one line for each command."""
    lines = "".join(f"  {name:<10}{text}\n" for name, (text, _) in COMMANDS.items())
    return (
        f"usage: python -m crossenc COMMAND [options]\n\n{lines}\n"
        "first run, in a checkout:    python -m crossenc fit --config configs/quickstart.yaml\n"
        "options of a command:        python -m crossenc COMMAND --help"
    )


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after one line on stderr if the input is bad.

    A run that a signal stopped after its checkpoint was written returns 143 (SIGTERM) or 130 (SIGINT).
    """
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(command_table())
        return 0
    if args[0] == "--version":
        print(crossenc.__version__)
        return 0
    name, rest = args[0], args[1:]
    debug = "--debug" in rest or os.environ.get("CROSSENC_DEBUG", "") not in ("", "0")
    try:
        if name not in COMMANDS:
            raise UsageError(f"there is no command {name!r}; choose one of {', '.join(COMMANDS)}")
        run = COMMANDS[name][1]
        by_trainer = run in (_run, _evaluate)
        _set_up_output()
        if by_trainer or name == "export":
            _quiet_lightning()
        if by_trainer:
            _watch_first_process(name)
        # With a Trainer, Lightning handles SIGTERM; and only the main thread may handle signals.
        in_main = threading.current_thread() is threading.main_thread()
        with _exit_on_sigterm() if in_main and not by_trainer else nullcontext():
            run(name, rest)
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return 1
    except Exception as error:
        if isinstance(error, getattr(sys.modules.get("torch"), "OutOfMemoryError", ())):
            about = f"{one_line(error)[:200]}; set a smaller --data.batch_size, --data.eval_tokens or model"
            error = UsageError(about)
        if debug or not _is_user_error(error):
            raise
        if isinstance(error, StoppedError):
            log.info(str(error))
        elif not (_is_child() and (isinstance(error, LostProcessError) or _first_process_ends_soon())):
            said = parser_line(error) if isinstance(error, ArgumentError) else one_line(error)
            print(f"crossenc {name}: error: {said}", file=sys.stderr)
        return error.exit_code if isinstance(error, CrossencError) else 2
    except (KeyboardInterrupt, SystemExit) as stop:  # a signal where no checkpoint is written
        if "lightning" in sys.modules:
            from lightning.pytorch.utilities.exceptions import SIGTERMException

            if isinstance(stop, SIGTERMException):  # Python would exit with code 0
                print(f"crossenc {name}: ended by SIGTERM", file=sys.stderr)
                return 143
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return 130  # also for a KeyboardInterrupt that Lightning has turned into a SystemExit
    return 0


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_FIRST_PROCESS = "CROSSENC_FIRST_PROCESS"


def _is_child() -> bool:
    """Whether Lightning's first process launched this one; if so, the first one reports why the run ends."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def _watch_first_process(command: str) -> None:
    """Exit if the first process is killed before all have joined; torch would wait for it for half an hour."""
    if not _is_child():
        os.environ[_FIRST_PROCESS] = str(os.getpid())  # for the processes that Lightning launches
        return

    def watch() -> None:
        while _first_process_lives():
            joined = getattr(sys.modules.get("torch.distributed"), "is_initialized", None)
            if joined and joined():
                return
            time.sleep(1)
        print(f"crossenc {command}: error: the first process of the run died, so this one stops too", file=sys.stderr)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _first_process_lives() -> bool:
    if sys.platform == "win32":  # there, the parent may be a launcher of Python, and its number is never taken back
        return True
    return os.environ.get(_FIRST_PROCESS, str(os.getppid())) == str(os.getppid())


def _first_process_ends_soon() -> bool:
    """Whether the first process ends within 15 seconds. If so, it has met the same error and printed it."""
    end = time.monotonic() + 15
    while _first_process_lives() and time.monotonic() < end:
        time.sleep(0.1)
    return not _first_process_lives()


def _is_user_error(error: Exception) -> bool:
    """Whether an error is about the input: one of ours, of the parser, of a file, or of the Trainer's options."""
    if isinstance(error, CrossencError | ArgumentError | OSError):
        return True
    if "lightning" not in sys.modules:  # then it cannot be one of Lightning's
        return False
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException)


# Warnings of libraries that say nothing useful to a user of crossenc, and why.
_IGNORED_WARNINGS = (
    ".*does not have many workers",  # tokens are cached and padding is cheap, so 0 workers is the right number
    ".*LeafSpec.* is deprecated",  # torch's own pytree, which Lightning 2.6 calls in the old way
    ".*is_gradient_checkpointing. is deprecated",  # peft uses a name that transformers 5 is replacing
    ".*loading a checkpoint outside the 'fit' stage",  # it loads the averaged weights, the only ones to evaluate
    ".*add the following callbacks",  # an evaluation needs none, and a resumed run uses those that it is given
    "The dirpath has changed from",  # evaluating a checkpoint writes none
    "No seed found",  # `--seed_everything true` without PL_GLOBAL_SEED means 0, and config.yaml says so
    "Precision .* is not supported by the model summary",  # its sizes are those of 32 bits
    ".*WeightAveraging callback with a model that overrides",  # configure_model only shards, so no weight is missed
    "GPU available but not used",  # an option or a config, such as quickstart.yaml, has chosen the CPU
    "The PyTorch Profiler default schedule will be overridden",  # a dev set of few batches is recorded as a whole
    ".*is smaller than the logging interval",  # a short run is no mistake
    "The .srun. command is available",  # it is nearly always an interactive job, or a login node
    ".*exists and is not empty",  # a resumed run writes into its own folder, after metrics.csv was renamed
)


def _set_up_output() -> None:
    """Log to stderr, and reduce the libraries' logs and progress bars to what a user needs."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():  # a notebook's is no file
        sys.stdout.reconfigure(encoding="utf-8")  # like every file that we write
    # onnxruntime calls `logging.warning` and the like, which install a printing handler if the root logger has none.
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("crossenc")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)
    # The errors of these libraries reach the user as exceptions.
    for library in ("huggingface_hub", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # Two of them set their level again when they are imported later.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for message in _IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    # As a warning, its text would be written to config.yaml; as an error, jsonargparse tries the option's other types.
    warnings.filterwarnings("error", message=r"\s*Unable to serialize instance")


def _quiet_lightning() -> None:
    """Hide Lightning's hardware lists, tips and seeds. It must be imported first, since importing it sets its level."""
    import lightning.pytorch  # noqa: F401

    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
