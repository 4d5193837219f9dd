"""Vectors of many experts, those of one module below one another in one tensor.

Hundreds of experts have a vector for each of hundreds of modules: as tensors of their own they
would take a time and a memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mttl_adapters.fixed_keys import Fixed
from mttl_experts import IncompatibleExpertError, unread

Vectors = Mapping[str, Tensor]


class _Stack(NamedTuple):
    names: tuple[str | None, ...]  # None is an expert that is gone
    rows: Fixed  # (n, i)

    def without(self, gone: frozenset[str]) -> _Stack:
        """The same, its rows copied only once more than half of them are of experts gone."""
        if gone.isdisjoint(self.names):
            return self
        names = tuple(None if name in gone else name for name in self.names)
        kept = [row for row, name in enumerate(names) if name is not None]
        if 2 * len(kept) >= len(names):
            return _Stack(names, self.rows)
        return _Stack(tuple(names[row] for row in kept), Fixed(self.rows.copied()[kept]))


class Stacked:
    """One vector (i,) for each module of each expert; :meth:`changed` gives another of these.

    Args:
        vectors: by expert name and module path; those that a library keeps are read expert by
            expert, and let go of.
        key: what to keep of a vector, given in float32.
    """

    def __init__(self, vectors: Mapping[str, Vectors], key: Callable[[Tensor], Tensor]) -> None:
        """Copy them.

        Raises:
            IncompatibleExpertError: a module's vectors differ in size.
        """
        self._key = key
        rooms: dict[str, tuple[list[str], Tensor]] = {}
        for name, lazy in vectors.items():
            for module, vector in unread(lazy).items():
                if module not in rooms:
                    rooms[module] = ([], torch.empty(len(vectors), len(vector)))
                names, rows = rooms[module]
                if len(vector) != rows.shape[1]:
                    raise IncompatibleExpertError(
                        f"module {module!r} has {rows.shape[1]} in features in expert "
                        f"{names[0]!r} and {len(vector)} in expert {name!r}; take experts of one "
                        "base"
                    )
                rows[len(names)] = key(vector.float())
                names.append(name)
        of_all = tuple(vectors)
        self._stacks: dict[str, _Stack] = {
            module: _Stack(of_all, Fixed(rows))
            if len(names) == len(of_all)
            else _Stack(tuple(names), Fixed(rows[: len(names)].clone()))
            for module, (names, rows) in rooms.items()
        }

    def rows(self, module: str, names: Sequence[str]) -> Fixed:
        """(n, i), the vectors of these experts in this order: the stack itself, or a copy.

        A copy that holds all experts replaces the stack, so that none is kept beside it.
        """
        stack = self._stacks[module]
        if stack.names == tuple(names):
            return stack.rows
        place = {name: row for row, name in enumerate(stack.names) if name is not None}
        rows = Fixed(stack.rows.copied()[[place[name] for name in names]])
        if len(names) == len(place):
            self._stacks[module] = _Stack(tuple(names), rows)
        return rows

    def changed(self, added: Mapping[str, Vectors], removed: Iterable[str]) -> Stacked:
        """The same with the vectors of some more experts, and none of others.

        The vectors of more experts alone are copied, most of the time.
        """
        other = object.__new__(Stacked)
        gone = frozenset(removed)
        other._key = self._key
        other._stacks = {module: stack.without(gone) for module, stack in self._stacks.items()}
        for name, vectors in added.items():
            for module, vector in unread(vectors).items():
                row = self._key(vector.float()).unsqueeze(0)
                stack = other._stacks.get(module)
                other._stacks[module] = (
                    _Stack((name,), Fixed(row))
                    if stack is None
                    else _Stack((*stack.names, name), stack.rows.extended(row))
                )
        return other
