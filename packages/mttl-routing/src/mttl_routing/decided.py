"""What holds for each row of a batch from its prompt on, and how it travels with the row.

It lies in the cache object that the row's keys and values lie in, and goes where they go: through
beams, several returned sequences, a selection of rows. Nothing of it is kept on a module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mttl_routing.routers import Tasks

if TYPE_CHECKING:
    from collections.abc import Callable

_CACHES = ("past_key_values", "cache_params")  # how transformers' models call their caches


@dataclass(frozen=True, eq=False)
class Decided:
    """Tasks of some rows, and the gates that a router for whole sequences gave them.

    Attributes:
        experts: names of the columns of ``gates``.
        gates: (b, e); None where the router decides token by token.
        tasks: one for all rows, or one a row; None when nobody named any.
    """

    experts: tuple[str, ...]
    gates: Tensor | None = None
    tasks: Tasks = None

    @property
    def count(self) -> int | None:
        """Of how many rows it is; None where it holds for any number."""
        if self.gates is not None:
            return self.gates.shape[0]
        return len(self.tasks) if isinstance(self.tasks, tuple) else None

    def taken(self, rows: Tensor) -> Decided:
        """The same of other rows, given by their indices."""
        tasks = self.tasks
        if isinstance(tasks, tuple):
            tasks = tuple(tasks[row] for row in rows.tolist())
        gates = None if self.gates is None else self.gates[rows.to(self.gates.device)]
        return replace(self, gates=gates, tasks=tasks)

    def repeated(self, times: int) -> Decided:
        """Each row so many times, side by side, as transformers expands a batch."""
        if times == 1 or self.count is None:
            return self
        tasks = self.tasks
        if isinstance(tasks, tuple):
            tasks = tuple(task for task in tasks for _ in range(times))
        gates = None if self.gates is None else self.gates.repeat_interleave(times, dim=0)
        return replace(self, gates=gates, tasks=tasks)

    def in_columns(self, experts: tuple[str, ...]) -> Decided:
        """The same for a model whose experts have changed: new ones get nothing."""
        if self.experts == experts:
            return self
        gates = self.gates
        if gates is not None:
            kept = [name for name in self.experts if name in set(experts)]
            old = [self.experts.index(name) for name in kept]
            new = [experts.index(name) for name in kept]
            moved = gates.new_zeros(gates.shape[0], len(experts))
            moved[:, new] = gates[:, old]
            gates = moved
        return replace(self, experts=experts, gates=gates)


class _Carrying:
    """Mixed into the class of a cache that carries what was decided for its rows."""

    _decided: Decided | None = None

    def reorder_cache(self, beam_idx: Tensor) -> Any:
        self._change(lambda decided: decided.taken(beam_idx))
        return super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> Any:
        self._change(lambda decided: decided.repeated(repeats))
        return super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> Any:
        self._change(lambda decided: decided.taken(indices))
        return super().batch_select_indices(indices)  # type: ignore[misc]

    def crop(self, *args: Any, **kwargs: Any) -> Any:
        result = super().crop(*args, **kwargs)  # type: ignore[misc]
        if int(self.get_seq_length()) == 0:  # type: ignore[attr-defined]
            self._decided = None  # the next prompt is another one
        return result

    def reset(self) -> Any:
        self._decided = None
        return super().reset()  # type: ignore[misc]

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as the cache that it was made from, and what it carries."""
        return _unpickled, (type(self).__mro__[2],), self.__dict__

    def _change(self, change: Callable[[Decided], Decided]) -> None:
        if self._decided is not None:
            rows = self._decided
            self._decided = rows if rows.count is None else change(rows)


@cache
def _carrying(kind: Any) -> Any:
    return type(kind.__name__, (_Carrying, kind), {"__doc__": kind.__doc__})


def _unpickled(kind: type) -> Any:
    return object.__new__(_carrying(kind))


def put_in_cache(kept: Any, decided: Decided) -> None:
    """Let a cache of transformers carry what was decided for its rows."""
    if not isinstance(kept, _Carrying):
        kept.__class__ = _carrying(type(kept))  # type: ignore[arg-type]
    kept._decided = decided


def in_cache(kept: Any) -> Decided | None:
    """What a cache carries; None for one that carries nothing, and where there is no cache."""
    return kept._decided if isinstance(kept, _Carrying) else None


def cache_among(values: Any) -> Any:
    """The cache among a model's named inputs or its outputs; None where there is none."""
    if isinstance(values, tuple):  # outputs with return_dict=False
        return next((value for value in values if hasattr(value, "reorder_cache")), None)
    for name in _CACHES:
        found = values.get(name) if hasattr(values, "get") else None
        if found is not None and hasattr(found, "reorder_cache"):
            return found
    return None


def put_on_states(states: Tensor, decided: Decided) -> None:
    """Let an encoder's output carry what was decided, for the decoder that will read it."""
    states._mttl_decided = decided  # type: ignore[attr-defined]


def on_states(states: Any) -> Decided | None:
    """What an encoder's output carries."""
    return getattr(states, "_mttl_decided", None)
