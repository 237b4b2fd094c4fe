"""Progress of loops outside the Trainer, with the time left: a bar on a terminal, else a log line every ten seconds."""

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
    """Show the progress of `what`, such as "score pairs"; yields a function to call with the number just finished.

    The `done` of an earlier run are shown, but not counted in the speed.
    """
    if not sys.stderr.isatty():
        yield _log_lines(what, total, done)
        return
    from rich import progress as rich
    from rich.console import Console

    columns = ("{task.description}", rich.BarColumn(), rich.MofNCompleteColumn(), rich.TimeElapsedColumn())
    with rich.Progress(*columns, "left", rich.TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)


def _log_lines(what: str, total: int, done: int) -> Callable[[int], None]:
    start = logged_at = time.monotonic()
    already_done = done

    def advance(count: int) -> None:
        nonlocal done, logged_at
        done += count
        now = time.monotonic()
        if now - logged_at >= SECONDS_BETWEEN_LINES:
            logged_at = now
            left = (now - start) / (done - already_done) * (total - done)
            log.info("%s: %s of %s, %s left", what, f"{done:,}", f"{total:,}", timedelta(seconds=round(left)))

    return advance
