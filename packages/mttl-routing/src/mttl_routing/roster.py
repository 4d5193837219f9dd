"""The experts of a routed model at one moment: whose columns there are, and their factors by layer.

A roster never changes. Each change makes another that shares what stayed as it was, so that a
forward under way in another thread goes on with the one that it began with.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from mttl_adapters.bank import Bank
from mttl_adapters.joining import appended, moved, padded
from mttl_experts import Expert
from mttl_routing.routers import Layer


@dataclass(frozen=True, eq=False)
class Roster:
    """Experts in the order of the gates' columns.

    Attributes:
        experts: the experts themselves.
        banks: their factors by module path.
        disabled: names of those that are switched off.
    """

    experts: tuple[Expert, ...]
    banks: Mapping[str, Bank]
    disabled: frozenset[str] = frozenset()
    _without: dict[frozenset[str], Roster] = field(default_factory=dict, repr=False)
    _together: dict[tuple[torch.device, tuple[str, ...]], tuple[Layer, ...]] = field(
        default_factory=dict, repr=False
    )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the experts."""
        return tuple(expert.name for expert in self.experts)

    @cached_property
    def columns(self) -> frozenset[int]:
        """Columns of the experts that are switched off."""
        return frozenset(n for n, name in enumerate(self.names) if name in self.disabled)

    @cached_property
    def layers(self) -> dict[str, Layer]:
        """Each adapted layer as routers see it; one that met another device is put in its place."""
        return {
            path: Layer(path, self.names, bank, self.columns) for path, bank in self.banks.items()
        }

    def layer(self, path: str, device: torch.device) -> Layer:
        """One of the layers, with its factors on a device."""
        layer = self.layers[path]
        if layer.bank.device != device:
            layer = Layer(path, layer.experts, layer.bank.to(device), layer.disabled)
            self.layers[path] = layer
        return layer

    def together(self, paths: tuple[str, ...], device: torch.device) -> tuple[Layer, ...]:
        """Those of some layers that are adapted, with their factors on a device."""
        key = device, paths
        if key not in self._together:
            self._together[key] = tuple(
                self.layer(path, device) for path in paths if path in self.banks
            )
        return self._together[key]

    def without(self, names: frozenset[str]) -> Roster:
        """The same with some more experts switched off; asked twice, the same object."""
        if names <= self.disabled:
            return self
        if names not in self._without:
            switched = Roster(self.experts, self.banks, self.disabled | names)
            self._without.setdefault(names, switched)
        return self._without[names]

    def switched(self, disabled: frozenset[str]) -> Roster:
        """The same with exactly these experts switched off."""
        return Roster(self.experts, self.banks, disabled)

    def added(self, expert: Expert, own: Mapping[str, Bank]) -> Roster:
        """The same with one more expert, in a column at the end; ``own`` are banks of it alone."""
        count = len(self.experts)
        banks = {
            path: appended(self.banks[path], own[path])
            if path in self.banks and path in own
            else padded(self.banks[path], 0, 1)
            if path in self.banks
            else padded(own[path], count, 0)
            for path in sorted({*self.banks, *own})
        }
        return Roster((*self.experts, expert), banks, self.disabled)

    def replaced(self, expert: Expert, own: Mapping[str, Bank]) -> Roster:
        """The same with another expert in the place of that of its name; as :meth:`added`."""
        column, last = self.names.index(expert.name), len(self.experts)
        added = self.added(expert, own)
        banks = {path: moved(bank, last, column) for path, bank in added.banks.items()}
        experts = (*self.experts[:column], expert, *self.experts[column + 1 :])
        return Roster(experts, _used(banks), self.disabled)

    def removed(self, name: str) -> Roster:
        """The same without one expert; a layer that nobody else changes goes with it."""
        column = self.names.index(name)
        banks = {path: bank.remove(column) for path, bank in self.banks.items()}
        experts = self.experts[:column] + self.experts[column + 1 :]
        return Roster(experts, _used(banks), self.disabled - {name})

    def known(self, names: Iterable[str]) -> frozenset[str]:
        """The names, if all are of experts here.

        Raises:
            ValueError: naming one that is not, and those like it.
        """
        names = frozenset(names)
        for name in sorted(names - set(self.names)):
            near = difflib.get_close_matches(name, self.names, n=3)
            known = ", ".join(map(repr, near or self.names[:5]))
            hint = f"did you mean {known}?" if near else f"there are {known}"
            raise ValueError(f"this routed model has no expert {name!r}; {hint}")
        return names


def _used(banks: Mapping[str, Bank]) -> dict[str, Bank]:
    """Without the layers that no expert changes any more."""
    return {path: bank for path, bank in banks.items() if any(bank.ranks)}
