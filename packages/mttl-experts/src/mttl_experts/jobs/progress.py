"""Progress for people: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

Progress = Callable[[str, int, int | None], object]
"""Told what is done ("" for the work as asked), how far it is, and how far it goes if known."""

# Elsewhere than on a terminal: seconds of work before a line is worth it, and between two lines.
_QUIET_SECONDS = 2.0
_LINE_SECONDS = 15.0
_PLAIN_WIDTH = 110


@cache
def console(stderr: bool = False) -> Console:
    """The terminal, or what stands in for it, where lines may be long enough for a table."""
    if os.isatty(2 if stderr else 1):
        return Console(stderr=stderr)
    return Console(stderr=stderr, width=_PLAIN_WIDTH, highlight=False)


def say(text: object, stderr: bool = False) -> None:
    """Print one line for people as it is: no markup is read in it, and it is not broken."""
    console(stderr).print(str(text), markup=False, highlight=False, soft_wrap=True)


class Bar:
    """How far one piece of work has come."""

    def __init__(
        self, what: str, total: int | None, progress: RichProgress | None, stderr: bool = False
    ) -> None:
        """On a terminal with rich's bars, elsewhere without."""
        self._what, self._total, self._progress = what, total, progress
        self._stderr = stderr
        self._stage = ""
        self._task = progress.add_task(what, total=total) if progress else None
        self._start = self._last = time.monotonic()

    def update(self, stage: str, done: int, total: int | None = None) -> None:
        """Say how far it is: a :data:`Progress`, to be handed to whoever does the work."""
        if stage != self._stage and not done:  # a stage with a time of its own
            self._start = time.monotonic()
            if self._progress and self._task is not None:
                self._progress.reset(self._task, total=total)
        self._stage, self._total = stage, total or self._total
        if self._progress and self._task is not None:
            self._progress.update(
                self._task, completed=done, total=self._total, description=str(self)
            )
            return
        now = time.monotonic()
        if done and now - self._last > _LINE_SECONDS:
            left = ""
            if self._total:
                seconds = (now - self._start) / done * (self._total - done)
                left = f"/{self._total}, about {seconds:.0f} s left"
            say(f"{self}: {done}{left}", self._stderr)
            self._last = now

    def __str__(self) -> str:
        """The work, and the stage that it is in."""
        return f"{self._what}: {self._stage}" if self._stage else self._what


@contextmanager
def bar(what: str, total: int | None = None, stderr: bool = False) -> Iterator[Bar]:
    """Show how far a piece of work has come; hand the ``update`` of what it yields to the work.

    Nothing but progress is shown, on a terminal as a bar; elsewhere in lines of their own, and the
    last says what it took if that is worth a line.

    Args:
        what: the work, as in "training spell_backward".
        total: steps in all, if that is known.
        stderr: show it there, where what the command prints is for programs.
    """
    start = time.monotonic()
    if console(stderr).is_terminal:
        with RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console(stderr),
            transient=True,
        ) as progress:
            yield Bar(what, total, progress, stderr)
    else:
        yield Bar(what, total, None, stderr)
    spent = time.monotonic() - start
    if spent > _QUIET_SECONDS:
        say(f"{what}: {spent:.0f} s", stderr)
