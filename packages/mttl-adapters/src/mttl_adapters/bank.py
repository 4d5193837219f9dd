"""Many low-rank experts of one layer, applied by one gate for each token.

Tensors in, tensors out: nothing here knows a model, a library or a router. Which experts a token
gets, and how much of each, is the caller's business and comes in as gates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from mttl_adapters import crossover, kernels
from mttl_adapters.chosen import Chosen
from mttl_adapters.kernels import rows
from mttl_adapters.kernels import torch as plain
from mttl_adapters.layer_factors import LayerFactors
from mttl_adapters.slabs import Resident


@dataclass(frozen=True, eq=False)
class Bank(LayerFactors):
    """Experts of one layer, of any mix of ranks, applied together.

    One of rank 0 keeps its column in the gates and costs nothing. What a token did not choose may
    be multiplied by 0 for it, which is why all factors are finite.
    """

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
    def _in_rows(self) -> list[rows.Rows]:
        """Where each expert's rows lie, slab by slab; nowhere that is known of, in mapped files."""
        if self.resident:
            return []
        return [
            rows.Rows.of(number, slab.a, slab.b, self.runs, self.scalings)
            for number, slab in enumerate(self.slabs)
        ]

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
