"""Progress for people: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Elsewhere than on a terminal: seconds of work before a line is worth it, and between two lines.
_QUIET_SECONDS = 2.0
_LINE_SECONDS = 15.0
_PLAIN_WIDTH = 110


@cache
def console() -> Console:
    """The terminal, or what stands in for it, where lines may be long enough for a table."""
    if os.isatty(1):
        return Console()
    return Console(width=_PLAIN_WIDTH, highlight=False)


def say(text: object) -> None:
    """Print one line for people as it is: no markup is read in it, and it is not broken."""
    console().print(str(text), markup=False, highlight=False, soft_wrap=True)


class Bar:
    """How far one piece of work has come."""

    def __init__(self, what: str, total: int | None, progress: Progress | None) -> None:
        """On a terminal with rich's bars, elsewhere without."""
        self._what, self._total, self._progress = what, total, progress
        self._task = progress.add_task(what, total=total) if progress else None
        self._start = self._last = time.monotonic()

    def update(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """Say that ``done`` steps are done; also of how many, or of what, where that changed."""
        if what not in (None, self._what) and not done:  # another stage, with a time of its own
            self._start = time.monotonic()
            if self._progress and self._task is not None:
                self._progress.reset(self._task, total=total)
        self._what, self._total = what or self._what, total or self._total
        if self._progress and self._task is not None:
            self._progress.update(
                self._task, completed=done, total=self._total, description=self._what
            )
            return
        now = time.monotonic()
        if done and now - self._last > _LINE_SECONDS:
            left = ""
            if self._total:
                seconds = (now - self._start) / done * (self._total - done)
                left = f"/{self._total}, about {seconds:.0f} s left"
            console().print(f"{self._what}: {done}{left}")
            self._last = now

    def close(self) -> None:
        """Say what it took, where that is worth a line."""
        spent = time.monotonic() - self._start
        if spent > _QUIET_SECONDS:
            console().print(f"{self._what}: {spent:.0f} s")


@contextmanager
def bar(what: str, total: int | None = None) -> Iterator[Bar]:
    """Show how far a piece of work has come; call ``update`` on what it yields.

    Args:
        what: the work, as in "training spell_backward".
        total: steps in all, if that is known.
    """
    if not console().is_terminal:
        shown = Bar(what, total, None)
        yield shown
        shown.close()
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console(),
        transient=True,
    ) as progress:
        shown = Bar(what, total, progress)
        yield shown
    shown.close()
