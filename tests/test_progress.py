"""Progress of long work: a line every ten seconds, and a bar on a terminal."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from crossenc.progress import progress


def test_a_line_every_ten_seconds_tells_the_time_left(monkeypatch: pytest.MonkeyPatch, caplog):
    """By the speed of this run; what an earlier one did is shown."""
    ticks = iter([0, 4, 12, 15, 22])
    monkeypatch.setattr("crossenc.progress.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level("INFO"), progress("score pairs", 10_000, 4_000) as advance:
        for _ in range(4):
            advance(1_000)
    lines = ["score pairs: 6,000 of 10,000, 0:00:24 left", "score pairs: 8,000 of 10,000, 0:00:11 left"]
    assert caplog.messages == lines


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress("score pairs", 10, 4) as advance:
        advance(2)
    assert "score pairs" in screen.getvalue()
    assert " 6/10" in screen.getvalue()
