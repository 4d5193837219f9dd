"""The factors of a layer's experts: where they lie, and how experts come and go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from mttl_adapters.finite import is_finite
from mttl_adapters.slabs import Resident, Run, Slab, TensorSlab, stacked

Factors = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """Factors of ``e`` experts for one layer; their ranks may differ, and may be 0.

    An expert that leaves the layer alone is an expert of rank 0. Nothing here changes:
    :meth:`append`, :meth:`remove` and :meth:`replace` give another one that shares its memory, so
    whoever is computing with this one is not disturbed. All factors are finite.

    Attributes:
        slabs: memory with the experts' rows.
        runs: where each expert's rows lie, in the order of the gates' columns.
        scalings: s_e of every expert.
        in_features: size of the layer's input.
        out_features: size of the layer's output.
        dtype: of all factors.
        resident: told what is read, for slabs that are mapped from files.
    """

    slabs: tuple[Slab, ...]
    runs: tuple[Run, ...]
    scalings: tuple[float, ...]
    in_features: int
    out_features: int
    dtype: torch.dtype
    resident: Resident | None = None

    @classmethod
    def from_factors(
        cls,
        factors: Sequence[Factors],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Those given as ``(a (r, i), b (o, r), scaling)``, in that order, in one slab.

        Args:
            factors: at least one expert.
            dtype: what to keep the factors in; ``None`` is the widest dtype among them.
            device: where to keep them; ``None`` is where the first expert lies.
        """
        if not factors:
            raise ValueError("a bank needs at least one expert, got none")
        features = (factors[0][1].shape[0], factors[0][0].shape[1])
        for index, (a, b, _) in enumerate(factors):
            _check_factors(a, b, features, f"expert {index}")
        if dtype is None:
            dtype = factors[0][0].dtype
            for a, b, _ in factors:
                dtype = torch.promote_types(dtype, torch.promote_types(a.dtype, b.dtype))
        device = factors[0][0].device if device is None else device
        slab = TensorSlab(
            torch.cat([a.to(device, dtype) for a, _, _ in factors]),
            torch.cat([b.to(device, dtype).T for _, b, _ in factors]),
        )
        ranks = [a.shape[0] for a, _, _ in factors]
        starts = accumulate(ranks, initial=0)
        return cls(
            slabs=(slab,),
            runs=tuple(Run(0, start, rank) for start, rank in zip(starts, ranks, strict=False)),
            scalings=tuple(float(scaling) for _, _, scaling in factors),
            in_features=features[1],
            out_features=features[0],
            dtype=dtype,
        )

    def __len__(self) -> int:
        """How many experts it holds."""
        return len(self.runs)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Rank of every expert, in the order of the gates' columns."""
        return tuple(run.rank for run in self.runs)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each expert begins in the stacks."""
        return tuple(accumulate(self.ranks[:-1], initial=0))

    @cached_property
    def widest(self) -> int:
        """The largest rank."""
        return max(self.ranks, default=0)

    @cached_property
    def _numbers(self) -> int:
        """Numbers in all factors together."""
        return sum(self.ranks) * (self.in_features + self.out_features)

    @cached_property
    def a(self) -> Tensor:
        """(R, i), the rows of every expert's A below one another, R the sum of the ranks.

        The slab itself where the experts lie so; else a copy, made once.
        """
        if not any(self.ranks):
            return torch.empty(0, self.in_features, dtype=self.dtype, device=self.device)
        return stacked([slab.a for slab in self.slabs], self.runs)

    @cached_property
    def b(self) -> Tensor:
        """(o, R), the columns of every expert's B side by side, without the scaling; as :attr:`a`.

        Each expert's columns are one run of memory.
        """
        if not any(self.ranks):
            return torch.empty(self.out_features, 0, dtype=self.dtype, device=self.device)
        return stacked([slab.b for slab in self.slabs], self.runs).T

    @cached_property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.slabs[0].a.device if self.slabs else torch.device("cpu")

    @cached_property
    def requires_grad(self) -> bool:
        """Whether the factors want gradients."""
        return any(
            slab.a.requires_grad or slab.b.requires_grad
            for slab in self.slabs
            if isinstance(slab, TensorSlab)
        )

    @cached_property
    def table(self) -> Tensor:
        """(e, 5) int64, what the compiled kernel reads of each expert: ``Expert`` in ``cpu.c``."""
        runs = torch.tensor(self.runs, dtype=torch.int64).view(-1, 3)
        pointers = torch.tensor([slab.pointers for slab in self.slabs], dtype=torch.int64)
        widths = torch.tensor([self.in_features, self.out_features]) * self.dtype.itemsize
        with torch.inference_mode(False):  # ticks are written to it afterwards, too
            table = torch.zeros(len(self), 5, dtype=torch.int64)
        table[:, :2] = pointers[runs[:, 0]] + runs[:, 1:2] * widths
        table[:, 2] = runs[:, 2]
        table[:, 4] = torch.tensor(self.scalings, dtype=torch.float64).view(torch.int64)
        return table

    @cached_property
    def device_table(self) -> Tensor:
        """:attr:`table`, where the factors are: what the kernels of a GPU read of each expert."""
        with torch.inference_mode(False):
            return self.table.to(self.device)

    @cached_property
    def aligned(self) -> bool:
        """Whether every row of every factor begins at a multiple of 16 bytes."""
        sizes = (self.in_features * self.dtype.itemsize, self.out_features * self.dtype.itemsize)
        return not any(size % 16 for size in sizes) and not (self.table[:, :2] % 16).any()

    def to(self, device: torch.device | str) -> Self:
        """The same bank on ``device``; itself where it is there already."""
        if self.device == torch.device(device):
            return self
        slabs = [TensorSlab(slab.a.to(device), slab.b.to(device)) for slab in self.slabs]
        return replace(self, slabs=tuple(slabs), resident=None)

    def learnable(self) -> Self:
        """A copy of this bank whose factors learn: one slab of two leaves, float32 at least.

        The optimiser moves ``slabs[0].a`` and ``slabs[0].b`` in place.
        """
        dtype = torch.promote_types(self.dtype, torch.float32)
        a, b = (stack.detach().to(dtype, copy=True).contiguous() for stack in (self.a, self.b.T))
        runs = tuple(Run(0, *each) for each in zip(self.starts, self.ranks, strict=True))
        slab = TensorSlab(a.requires_grad_(), b.requires_grad_())
        bank = replace(self, slabs=(slab,), runs=runs, dtype=dtype, resident=None)
        with torch.enable_grad():  # a view made without gradients would let none through
            _ = bank.b
        return bank

    def factors(self) -> Iterator[Factors]:
        """Every expert's ``(a (r, i), b (o, r), scaling)``, as views of the slabs."""
        for expert in range(len(self)):
            a, b, scaling = self._rows(expert)
            yield a, b.T, scaling

    def append(self, a: Tensor, b: Tensor, scaling: float) -> Self:
        """This bank and one more expert, a (r, i) and b (o, r), which alone is copied."""
        run, slab = self._new(a, b)
        return replace(
            self,
            slabs=(*self.slabs, slab),
            runs=(*self.runs, run),
            scalings=(*self.scalings, float(scaling)),
        )

    def replace(self, index: int, a: Tensor, b: Tensor, scaling: float) -> Self:
        """This bank with another expert at ``index``; that one alone is copied."""
        index = self._index(index)
        run, slab = self._new(a, b)
        runs, scalings = list(self.runs), list(self.scalings)
        runs[index], scalings[index] = run, float(scaling)
        return replace(
            self, slabs=(*self.slabs, slab), runs=tuple(runs), scalings=tuple(scalings)
        )._pruned()

    def remove(self, index: int) -> Self:
        """This bank without the expert at ``index``; the later ones move up by one column."""
        index = self._index(index)
        return replace(
            self,
            runs=self.runs[:index] + self.runs[index + 1 :],
            scalings=self.scalings[:index] + self.scalings[index + 1 :],
        )._pruned()

    def _rows(self, expert: int) -> Factors:
        """An expert's A (r, i) and B by rows (r, o), as views."""
        slab, start, rank = self.runs[expert]
        rows = slice(start, start + rank)
        return self.slabs[slab].a[rows], self.slabs[slab].b[rows], self.scalings[expert]

    def _new(self, a: Tensor, b: Tensor) -> tuple[Run, TensorSlab]:
        _check_factors(a, b, (self.out_features, self.in_features), "the new expert")
        a = a.to(self.device, self.dtype, copy=not a.requires_grad).contiguous()
        slab = TensorSlab(a, b.T.to(self.device, self.dtype, copy=True).contiguous())
        return Run(len(self.slabs), 0, a.shape[0]), slab

    def _pruned(self) -> Self:
        """The same without the slabs that no expert lies in."""
        used = sorted({run.slab for run in self.runs})
        if len(used) == len(self.slabs):
            return self
        place = {old: new for new, old in enumerate(used)}
        return replace(
            self,
            slabs=tuple(self.slabs[old] for old in used),
            runs=tuple(run._replace(slab=place[run.slab]) for run in self.runs),
        )

    def _index(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"no expert {index}; this bank has {len(self)}")
        return index % len(self)


def _check_factors(a: Tensor, b: Tensor, features: tuple[int, int], who: str) -> None:
    if (
        a.dim() != 2
        or b.dim() != 2
        or a.shape[0] != b.shape[1]
        or ((b.shape[0], a.shape[1]) != features)
    ):
        raise ValueError(
            f"{who} has A {tuple(a.shape)} and B {tuple(b.shape)}; "
            f"this bank wants A (r, {features[1]}) and B ({features[0]}, r)"
        )
    for name, factor in (("A", a), ("B", b)):
        if not is_finite(factor):
            raise ValueError(f"{who} has a NaN or infinite number in {name}; leave it out")
