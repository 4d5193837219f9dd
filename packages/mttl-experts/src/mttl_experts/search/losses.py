"""Losses of experts on one set of examples, each measured once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

from mttl_experts.expert import Expert
from mttl_experts.scores import Score
from mttl_experts.search.index import COMMIT_SECONDS
from mttl_storage import Conflict, Denied, ReadOnly, StorageFull

if TYPE_CHECKING:
    from mttl_experts.changing import LibraryWriter

_KEY = ("examples", "loss")


class Losses:
    """Losses on one set of examples, read from the library's scores and added to them."""

    def __init__(self, library: LibraryWriter, examples: dict[str, Any], n: int) -> None:
        """Keep losses under all that decides them beside the expert, and how many examples."""
        self._library, self._examples, self._n = library, examples, n
        self._made: list[tuple[list[Expert], Score]] = []
        self._last = time.monotonic()

    def of(
        self, expert: Expert | None, loss: Callable[[Expert | None], float], again: bool
    ) -> float:
        """The loss of an expert, or of the base alone for None; measured if it is not kept.

        Raises:
            FloatingPointError: it is NaN or infinite.
        """
        experts = [] if expert is None else [expert]
        kept = None if again else self._library.scores.get(experts, *_KEY, self._examples)
        if kept is not None:
            return kept.value
        value = float(loss(expert))
        if not math.isfinite(value):
            raise FloatingPointError(f"its loss is {value}, so it has no place among the others")
        self._made.append((experts, Score(*_KEY, value, self._n, self._examples)))
        if time.monotonic() - self._last > COMMIT_SECONDS:
            self.keep()
        return value

    def keep(self) -> None:
        """Keep what was measured since the last time, in one commit."""
        with suppress(Conflict, Denied, ReadOnly, StorageFull):  # as for any score
            if self._made:
                free = self._library.writer() is self._library.repository  # no batch is open
                with self._library.batch("losses on examples") if free else nullcontext():
                    for experts, score in self._made:
                        self._library.scores.put(experts, score)
        self._made, self._last = [], time.monotonic()
