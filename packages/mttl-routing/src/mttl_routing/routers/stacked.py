"""Vectors of many experts, those of one module below one another in one tensor.

Hundreds of experts have a vector for each of hundreds of modules: as tensors of their own they
would take a time and a memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mttl_adapters.scores import Fixed
from mttl_experts import IncompatibleExpertError, unread

Vectors = Mapping[str, Tensor]


class _Stack(NamedTuple):
    names: tuple[str, ...]
    rows: Fixed  # (n, i)


class Stacked:
    """One vector (i,) for each module of each expert. It never changes; :meth:`changed` does.

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
        self._later: dict[str, Vectors] = {}
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
        """(n, i), the vectors of these experts in this order: the stack itself, or a copy."""
        stack = self._stacks.get(module)
        if stack is not None and stack.names == tuple(names) and not self._later:
            return stack.rows
        place = {} if stack is None else {name: row for row, name in enumerate(stack.names)}
        rows = torch.empty(0) if stack is None else stack.rows.copied()
        return Fixed(
            torch.stack(
                [
                    self._key(self._later[name][module].float())
                    if name in self._later
                    else rows[place[name]]
                    for name in names
                ]
            )
        )

    def changed(self, added: Mapping[str, Vectors], removed: Iterable[str]) -> Stacked:
        """The same with the vectors of some more experts, and none of others."""
        other = object.__new__(Stacked)
        other._key, other._stacks = self._key, self._stacks
        gone = set(removed)
        other._later = {n: v for n, v in self._later.items() if n not in gone} | dict(added)
        return other
