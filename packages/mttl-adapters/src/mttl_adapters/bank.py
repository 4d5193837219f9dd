"""Many low-rank experts of one layer, applied by one gate for each token.

Tensors in, tensors out: nothing here knows a model, a library or a router. Which experts a token
gets, and how much of each, is the caller's business and comes in as gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from types import ModuleType

import torch
from torch import Tensor

from mttl_adapters import crossover, kernels
from mttl_adapters.chosen import NONE, Chosen
from mttl_adapters.finite import is_finite
from mttl_adapters.kernels import rows
from mttl_adapters.kernels import torch as plain
from mttl_adapters.slabs import Resident, Run, Slab, TensorSlab, stacked

Factors = tuple[Tensor, Tensor, float]


@dataclass(frozen=True, eq=False)
class Bank:
    """Factors of ``e`` experts for one layer; their ranks may differ, and may be 0.

    An expert that leaves the layer alone is an expert of rank 0: it keeps its column in the gates
    and costs nothing. A bank never changes. :meth:`append`, :meth:`remove` and :meth:`replace`
    give another one that shares its memory, so whoever is computing with this one is not disturbed.
    All factors are finite, since what a token did not choose may be multiplied by 0 for it.

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
    ) -> Bank:
        """Bank of experts given as ``(a (r, i), b (o, r), scaling)``, in that order, in one slab.

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

    def to(self, device: torch.device | str) -> Bank:
        """The same bank on ``device``; itself where it is there already."""
        if self.device == torch.device(device):
            return self
        slabs = [TensorSlab(slab.a.to(device), slab.b.to(device)) for slab in self.slabs]
        return replace(self, slabs=tuple(slabs), resident=None)

    def learnable(self) -> Bank:
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

    def append(self, a: Tensor, b: Tensor, scaling: float) -> Bank:
        """This bank and one more expert, a (r, i) and b (o, r), which alone is copied."""
        run, slab = self._new(a, b)
        return replace(
            self,
            slabs=(*self.slabs, slab),
            runs=(*self.runs, run),
            scalings=(*self.scalings, float(scaling)),
        )

    def replace(self, index: int, a: Tensor, b: Tensor, scaling: float) -> Bank:
        """This bank with another expert at ``index``; that one alone is copied."""
        index = self._index(index)
        run, slab = self._new(a, b)
        runs, scalings = list(self.runs), list(self.scalings)
        runs[index], scalings[index] = run, float(scaling)
        return replace(
            self, slabs=(*self.slabs, slab), runs=tuple(runs), scalings=tuple(scalings)
        )._pruned()

    def remove(self, index: int) -> Bank:
        """This bank without the expert at ``index``; the later ones move up by one column."""
        index = self._index(index)
        return replace(
            self,
            runs=self.runs[:index] + self.runs[index + 1 :],
            scalings=self.scalings[:index] + self.scalings[index + 1 :],
        )._pruned()

    def apply(self, x: Tensor, gates: Tensor | Chosen) -> Tensor:
        """What the experts add to the layer's output: Σ_e g_e s_e B_e A_e x for each token.

        Costs what the chosen experts cost; where most are chosen, two dense products over all
        ranks. Differentiable in x, the gates, and the factors given to :meth:`from_factors`.

        Args:
            x: (t, i). Computed in the wider of its dtype and the bank's, so a bfloat16 input
                meets float32 factors in float32.
            gates: the experts chosen, or (t, e), where 0 leaves an expert out. Its gate then gets
                no gradient on the grouped path, as with any router that chooses.

        Returns:
            (t, o) in the wider of the two dtypes, for the caller to add before rounding.
        """
        self._check(x, gates)
        if self._groups(x, gates, self._compiled(x) is not None):
            return self.apply_grouped(x, gates)
        return self._dense(x, gates)

    def add_to(self, output: Tensor, x: Tensor, gates: Tensor | Chosen) -> Tensor:
        """A layer's output (t, o) with what :meth:`apply` gives added, rounded once to its dtype.

        Returns:
            ``output`` itself, changed in place, wherever nothing here wants a gradient.
        """
        self._check(x, gates)
        if output.shape != (x.shape[0], self.out_features):
            raise ValueError(
                f"got an output {tuple(output.shape)}; "
                f"this bank adds to ({x.shape[0]}, {self.out_features})"
            )
        if self._learns(gates, output, x) or (
            output.is_inference() and not torch.is_inference_mode_enabled()
        ):
            return (output + self.apply(x, gates)).to(output.dtype)
        cpu = self._compiled(x, output)
        if not self._groups(x, gates, cpu is not None):
            if output.dtype != torch.promote_types(x.dtype, self.dtype):
                return output.copy_(output + self.apply_dense(x, gates))
            return self._dense(x, gates, output)
        chosen = gates if isinstance(gates, Chosen) else Chosen.from_dense(gates)
        if cpu is not None:
            chosen = chosen.each()
            cpu.add_to(output, x, self, chosen.experts, chosen.weights)
            return output
        return self._add_grouped(output, x, chosen)

    def apply_dense(self, x: Tensor, gates: Tensor | Chosen) -> Tensor:
        """:meth:`apply` by two products over all ranks, the gates repeated for each rank."""
        self._check(x, gates)
        return self._dense(x, gates)

    def apply_grouped(self, x: Tensor, gates: Tensor | Chosen) -> Tensor:
        """:meth:`apply` by one pair of products for each expert that some token chose.

        The sums over experts are kept in float32 at least.
        """
        self._check(x, gates)
        chosen = gates if isinstance(gates, Chosen) else Chosen.from_dense(gates)
        cpu = self._compiled(x)
        if cpu is not None:
            return cpu.apply(x, self, chosen)  # type: ignore[no-any-return]
        out = x.new_zeros((x.shape[0], self.out_features), dtype=self._wide(x))
        return self._add_grouped(out, x, chosen).to(torch.promote_types(x.dtype, self.dtype))

    def apply_before(self, x: Tensor, gates: Tensor | Chosen) -> Tensor:
        """(Σ_e g_e s_e B_e)(Σ_e g_e A_e) x: factors averaged before they are multiplied.

        Not the mean of the experts' outputs: it adds the cross terms B_e A_f. Kept for comparison
        with numbers published for it; :meth:`apply` is the right one everywhere else. The experts
        must be of one rank, those of rank 0 aside.

        Shapes and dtypes are those of :meth:`apply`; gates may also be (t, q, e), apart for q equal
        slices of the input, which A reads, and of the output, which B writes.
        """
        gates = gates.dense(len(self)) if isinstance(gates, Chosen) else gates
        self._check(x, gates[:, 0] if gates.dim() == 3 else gates)
        heads = gates.shape[1] if gates.dim() == 3 else 1
        if self.in_features % heads or self.out_features % heads:
            raise ValueError(
                f"{heads} heads do not divide a layer of {self.in_features} features in "
                f"and {self.out_features} out; take a number that does"
            )
        present = [index for index, rank in enumerate(self.ranks) if rank > 0]
        ranks = {self.ranks[index] for index in present}
        if len(ranks) > 1:
            raise ValueError(
                f"combine='before' averages factors, so it wants experts of one rank; "
                f"these have ranks {sorted(ranks)!r}: use combine='after'"
            )
        dtype = torch.promote_types(x.dtype, self.dtype)
        if not present:
            return x.new_zeros((x.shape[0], self.out_features), dtype=dtype)
        scalings = gates.new_tensor([self.scalings[index] for index in present])
        return plain.before(x.to(dtype), self.a, self.b.T, gates[..., present], scalings)

    def _dense(self, x: Tensor, gates: Tensor | Chosen, out: Tensor | None = None) -> Tensor:
        if isinstance(gates, Chosen):
            gates = gates.dense(len(self))
        dtype = torch.promote_types(x.dtype, self.dtype)
        return plain.dense(x.to(dtype), self.a, self.b.T, self._per_rank(gates), out)

    def _add_grouped(self, out: Tensor, x: Tensor, chosen: Chosen) -> Tensor:
        """``out`` (t, o) with the sums of plain torch added, in place but for gradients."""
        if self.resident:
            self._read(chosen, self.resident)
        x = x.to(torch.promote_types(x.dtype, self.dtype))
        learns = self._learns(chosen, out, x)
        if self._in_rows and x.dtype == self.dtype and not learns:
            return rows.add_to(out, x, self._in_rows, chosen)
        with torch.set_grad_enabled(learns):
            wide = out.to(self._wide(x, out))
            sums = plain.grouped(x, self._rows, chosen, wide)
            return sums if wide is out else out.copy_(sums)

    def _learns(self, gates: Tensor | Chosen, *tensors: Tensor) -> bool:
        """Whether a gradient is wanted of anything here."""
        weights = gates.weights if isinstance(gates, Chosen) else gates
        return torch.is_grad_enabled() and (
            self.requires_grad or any(tensor.requires_grad for tensor in (weights, *tensors))
        )

    def _wide(self, *tensors: Tensor) -> torch.dtype:
        """What sums of products with these tensors are kept in."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    @cached_property
    def _in_rows(self) -> rows.Rows | None:
        """Where each expert's rows lie, if all lie in one slab."""
        if self.resident or len(self.slabs) != 1:
            return None
        slab = self.slabs[0]
        return rows.Rows.of(slab.a, slab.b, self.runs, self.scalings)

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

    def _pruned(self) -> Bank:
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

    def _compiled(self, *tensors: Tensor) -> ModuleType | None:
        """The compiled kernel, if it is to take these tensors and knows all dtypes and strides."""
        cpu = kernels.compiled(*tensors)
        return cpu if cpu and self.dtype in cpu.DTYPES and cpu.takes(*tensors) else None

    def _groups(self, x: Tensor, gates: Tensor | Chosen, compiled: bool) -> bool:
        """Whether taking the chosen experts alone is cheaper for these tokens."""
        # Counting gates waits for the device, so only where one choice each would pay.
        return self._grouped_pays(x.shape[0], x.shape[0], compiled) and self._grouped_pays(
            x.shape[0], _count(gates), compiled
        )

    def _grouped_pays(self, tokens: int, chosen: int, compiled: bool) -> bool:
        """The same for so many choices among all tokens."""
        if self.resident:
            return True
        if compiled and self.device.type == "cpu":
            return crossover.compiled_groups(tokens, len(self), chosen)
        if compiled:
            return crossover.device_groups(tokens, chosen, sum(self.ranks), len(self))
        return crossover.plain_groups(tokens, len(self), chosen, self._numbers)

    @cached_property
    def _numbers(self) -> int:
        """Numbers in all factors together."""
        return sum(self.ranks) * (self.in_features + self.out_features)

    def _read(self, chosen: Chosen, resident: Resident) -> None:
        """Mark the chosen experts as read."""
        experts = torch.unique(chosen.experts)
        experts = experts[experts >= 0]
        used = self.table[:, 3]
        fresh = int((used[experts] == 0).sum())
        used[experts] = resident.tick()
        if fresh:
            resident.grown(self, fresh)

    def _per_rank(self, gates: Tensor) -> Tensor:
        """(t, e) gates as (t, R), times the scalings."""
        scaled = gates * gates.new_tensor(self.scalings)
        if len(self) == 1:
            return scaled  # broadcasts over the ranks
        ranks = torch.tensor(self.ranks, device=gates.device)
        return scaled.repeat_interleave(ranks, dim=1, output_size=sum(self.ranks))

    def _check(self, x: Tensor, gates: Tensor | Chosen) -> None:
        if isinstance(gates, Chosen):
            if x.dim() != 2 or x.shape != (gates.n_tokens, self.in_features):
                raise ValueError(
                    f"got x {tuple(x.shape)} and {gates.n_tokens} tokens with chosen experts; "
                    f"this bank wants x (t, {self.in_features}) and t tokens"
                )
        elif x.shape != (gates.shape[0], self.in_features) or gates.shape[1:] != (len(self),):
            raise ValueError(
                f"got x {tuple(x.shape)} and gates {tuple(gates.shape)}; "
                f"this bank wants x (t, {self.in_features}) and gates (t, {len(self)})"
            )


def _count(gates: Tensor | Chosen) -> int:
    """Choices among all tokens; those of no expert count for a :class:`Chosen`, to save a look."""
    if isinstance(gates, Chosen):
        return gates.experts.numel() * gates.tokens
    return int(torch.count_nonzero(gates))


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


__all__ = ["NONE", "Bank", "Chosen", "Factors", "Resident", "Run", "Slab", "TensorSlab"]
