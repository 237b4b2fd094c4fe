"""Progress of loops outside the Trainer, with the time left: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how far `what` (such as "score pairs") has come; gives the function to call with how many more are done.

    Those that an earlier run has `done` do not count for the speed.
    """
    if not sys.stderr.isatty():
        yield _lines(what, total, done)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    with rich.Progress(*columns, "left", rich.TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _lines(what: str, total: int, done: int) -> Callable[[int], None]:
    start = written = time.monotonic()
    before = done

    def advance(count: int) -> None:
        nonlocal done, written
        done += count
        now = time.monotonic()
        if now - written >= SECONDS_BETWEEN_LINES and done > before:
            written = now
            left = (now - start) / (done - before) * (total - done)
            log.info("%s: %s of %s, %s left", what, f"{done:,}", f"{total:,}", timedelta(seconds=round(left)))

    return advance
