"""The command line: one table of commands, answered without torch; each command loads what it needs."""

from __future__ import annotations

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
from typing import TYPE_CHECKING, Any

import crossenc

from .errors import CrossencError, LostProcessError, StoppedError, UsageError, one_line

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

log = logging.getLogger(__name__)


def _run(command: str, args: list[str]) -> None:
    from .run import RunCLI

    RunCLI(command, _underscored(args))


def _evaluate(command: str, args: list[str]) -> None:
    from jsonargparse import ArgumentParser
    from lightning.pytorch.utilities import rank_zero_only

    from .data import PairDataModule
    from .evaluating import evaluate, print_figures

    parser = ArgumentParser(prog=f"crossenc {command}", exit_on_error=False, description=COMMANDS[command][0])
    parser.add_argument("model", type=str, help=_MODEL)
    parser.add_class_arguments(PairDataModule, "data", skip=_OF_THE_MODEL | _OF_TRAINING)
    parser.set_defaults({"data.source": ""})
    parser.add_argument("--output", type=str, default="evaluation", help="Folder for the report.")
    parser.add_function_arguments(evaluate, skip={"model", "arguments", "output"})
    given = _parse(parser, args)
    figures = evaluate(arguments=given.pop("data"), **given)
    if getattr(rank_zero_only, "rank", 0) == 0:
        print_figures(figures, folded=False)
        print(f"\nreport: {given['output']}")


# Arguments of the data module that an evaluation does not ask for: the model's own, and those of training.
_OF_THE_MODEL = {"backbone", "max_length", "revision"}
_OF_TRAINING = {"symmetric", "twice", "transitive", "batch_size", "batch_by", "window", "on_mismatch"}
_MODEL = "An export's folder, a Hub id, or a .ckpt file."
# What is given by its place, of the commands that are functions; their other parameters are options.
_POSITIONAL = {
    "export": {"checkpoint": "A .ckpt file written by fit.", "output": "The folder to write."},
    "score": {
        "model": _MODEL,
        "pairs": "A csv, tsv, jsonl or parquet file, or - for jsonl from stdin.",
        "output": "The file to write, or - for jsonl to stdout.",
    },
    "rerank": {"model": _MODEL},
    "mine": {
        "model": _MODEL,
        "questions": "A csv, tsv, jsonl or parquet file of questions.",
        "output": "The file to write the pairs to; the groups go to a file beside it.",
    },
}


def _call(command: str, args: list[str]) -> None:
    """Call the package's function of the command's name with what the command line says.

    Options may be written with dashes, and those that are true or false without a value.
    """
    from jsonargparse import ArgumentParser

    function, positional = getattr(crossenc, command), _POSITIONAL[command]
    parser = ArgumentParser(prog=f"crossenc {command}", exit_on_error=False, description=COMMANDS[command][0])
    for name, text in positional.items():
        parser.add_argument(name, type=str, help=text)
    parser.add_function_arguments(function, skip=set(positional))
    if command == "rerank":
        parser.set_defaults({"output": "-"})
    flags = {f"--{name}" for name, about in signature(function).parameters.items() if about.default is False}
    found = function(**_parse(parser, args, flags))
    if command == "export":
        print(found)
    elif command == "mine":
        print(found.pairs, found.groups, sep="\n")


def _underscored(args: list[str]) -> list[str]:
    """The words with the names of options as the parameters are written: `--on_error=a-b` for `--on-error=a-b`."""
    return [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in args]


_VALUES = ("true", "false", "yes", "no", "on", "off")  # as jsonargparse takes them


def _parse(parser: ArgumentParser, args: list[str], flags: Collection[str] = ()) -> dict[str, Any]:
    """What the command line says. `flags` are the options that may stand alone, for true."""
    parser.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
    words = _underscored(args)
    words = [
        f"{word}=true" if word in flags and following.lower() not in _VALUES else word
        for word, following in zip(words, [*words, ""][1:], strict=True)
    ]
    given: dict[str, Any] = parser.parse_args(words).as_dict()
    del given["debug"]  # which `main` has seen to
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
    """The help of `crossenc` itself: every command with one line."""
    lines = "".join(f"  {name:<10}{text}\n" for name, (text, _) in COMMANDS.items())
    return (
        f"usage: python -m crossenc COMMAND [options]\n\n{lines}\n"
        "first run, without network:  python -m crossenc fit --config configs/quickstart.yaml\n"
        "options of a command:        python -m crossenc COMMAND --help"
    )


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 after one line on stderr when the input is bad.

    A run that a signal ended after it wrote its checkpoint returns 143 (SIGTERM) or 130 (SIGINT).
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
        if not {"-h", "--help"} & set(rest):
            _set_up_terminal()
            if by_trainer or name == "export":
                _quiet_lightning()
            if by_trainer:
                _watch_first(name)
        # With a Trainer it is Lightning's to end in order.
        with nullcontext() if by_trainer else _exit_at_sigterm():
            run(name, rest)
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or python complains at its end
        return 1
    except Exception as error:
        if debug or not _is_for_the_user(error):
            raise
        if isinstance(error, StoppedError):
            log.info(str(error))
        elif not (_is_helper() and (isinstance(error, LostProcessError) or _ends_soon())):
            print(f"crossenc {name}: error: {one_line(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, CrossencError) else 2
    except (KeyboardInterrupt, SystemExit) as stop:  # where there is nothing to keep
        if "lightning" in sys.modules:
            from lightning.pytorch.utilities.exceptions import SIGTERMException

            if isinstance(stop, SIGTERMException):  # of which python would make exit code 0
                print(f"crossenc {name}: ended by SIGTERM", file=sys.stderr)
                return 143
        if isinstance(stop, SystemExit) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        return 130  # Lightning makes a SystemExit of it
    return 0


@contextmanager
def _exit_at_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_FIRST = "CROSSENC_FIRST_PROCESS"


def _is_helper() -> bool:
    """Whether Lightning's first process started this one; when it is gone, it has told why."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ


def _watch_first(command: str) -> None:
    """End with the first process, if that is killed before all are joined: torch would wait for it half an hour."""
    if not _is_helper():
        os.environ[_FIRST] = str(os.getpid())  # for those that Lightning starts
        return

    def watch() -> None:
        while _first_lives():
            joined = getattr(sys.modules.get("torch.distributed"), "is_initialized", None)
            if joined and joined():
                return
            time.sleep(1)
        print(f"crossenc {command}: error: the first process of the run is gone, and this one with it", file=sys.stderr)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _first_lives() -> bool:
    return os.environ.get(_FIRST, str(os.getppid())) == str(os.getppid())


def _ends_soon(seconds: float = 15.0) -> bool:
    """Whether the first process ends within this time: then it has met the same error, and told it."""
    end = time.monotonic() + seconds
    while _first_lives() and time.monotonic() < end:
        time.sleep(0.1)
    return not _first_lives()


def _is_for_the_user(error: Exception) -> bool:
    """Whether an error is about the input: ours, the parser's, the Trainer's about its options, or of a file."""
    if isinstance(error, CrossencError | ArgumentError | OSError):
        return True
    if "lightning" not in sys.modules:  # whose errors there can be none of then
        return False
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    return isinstance(error, MisconfigurationException)


# Warnings of the libraries that tell a user of crossenc nothing, and why.
_OF_NO_USE = (
    ".*does not have many workers",  # tokens are cached and padding is cheap: none is the right number of them
    ".*LeafSpec.* is deprecated",  # torch's own pytree, called by Lightning 2.6 in the old way
    ".*is_gradient_checkpointing. is deprecated",  # peft calls transformers 5 by a name that it is renaming
    ".*loading a checkpoint outside the 'fit' stage",  # by its averaged weights, which are all that it is evaluated by
    ".*add the following callbacks",  # an evaluation needs none, and a run goes on with those that it is given
    "The dirpath has changed from",  # a checkpoint that is evaluated writes nothing
    "No seed found",  # where `--seed_everything true` finds no PL_GLOBAL_SEED it is 0, and stands in config.yaml
    "Precision .* is not supported by the model summary",  # whose sizes are those of 32 bits
    ".*WeightAveraging callback with a model that overrides",  # configure_model only shards: an average misses nothing
    ".*is smaller than the logging interval",  # a short run is no mistake
    ".*exists and is not empty",  # a run that goes on writes into its own folder; its metrics.csv was set aside before
)


def _set_up_terminal() -> None:
    """Say what matters, once: our own log on stderr, and of the libraries' logs and bars what a person needs."""
    if not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # as every file that is written
    # onnxruntime logs by the root's functions, which add a handler that prints where there is none.
    if not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.NullHandler())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("crossenc")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if os.environ.get("LOCAL_RANK", "0") == "0" else logging.WARNING)
    # Errors of these libraries reach the user as exceptions.
    for library in ("huggingface_hub", "datasets", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)
    # When two of them are imported later, they set their levels anew.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for message in _OF_NO_USE:
        warnings.filterwarnings("ignore", message=message)


def _quiet_lightning() -> None:
    """Without hardware lists, tips and seeds. Imported first, since Lightning sets its level when it is imported."""
    import lightning.pytorch  # noqa: F401

    for library in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.ERROR)
