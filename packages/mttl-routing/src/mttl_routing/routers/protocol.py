"""What a router is: from the tokens at one layer to a gate for each expert.

Any object with a ``gates`` method is one; the names in ``ROUTERS`` build those of this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from mttl_adapters.bank import Bank


@dataclass(frozen=True, eq=False)
class Layer:
    """One adapted layer of a routed model, as a router sees it.

    Attributes:
        module: its path in the base model.
        experts: names of all experts of the routed model, in the order of the gates' columns, which
            is the same in every layer.
        bank: their factors here (``bank.factors()``); an expert that leaves this layer alone has
            rank 0 in it.
    """

    module: str
    experts: tuple[str, ...]
    bank: Bank

    @property
    def present(self) -> tuple[int, ...]:
        """Columns of the experts that change this layer."""
        return tuple(index for index, rank in enumerate(self.bank.ranks) if rank > 0)


@dataclass(frozen=True)
class Rows:
    """Where the tokens of one call come from: ``tokens`` follow one another in each row.

    Attributes:
        count: rows of the batch; None where the layer's input has no batch axis.
        tokens: tokens of each row; of the whole input where there is no batch axis.
        tasks: one task name for all rows, or one a row, where None is no task; None when the caller
            named no tasks.
    """

    count: int | None
    tokens: int
    tasks: str | tuple[str | None, ...] | None = None

    def spread(self, per_row: Tensor) -> Tensor:
        """(b, e), one line a row, as (t, e), one line a token."""
        if self.count is None or per_row.shape[0] != self.count:
            rows = "no batch axis" if self.count is None else f"{self.count} rows"
            raise ValueError(
                f"decisions for {per_row.shape[0]} rows cannot be given to the tokens of a layer "
                f"whose input has {rows}"
            )
        return per_row.repeat_interleave(self.tokens, dim=0)


@runtime_checkable
class Router(Protocol):
    """Decides for each token what share of each expert it gets."""

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        """Gates of the tokens at one layer; the layer adds Σ_e g_e s_e B_e A_e x to its output.

        Called at every forward pass, with and without a KV cache, for every adapted layer; so a
        decision may rest on a token's ``x`` and on its row, never on how many tokens came along.

        Args:
            x: (t, i), the layer's input in the model's dtype, padding included, row after row.
            layer: which layer this is, and its experts.
            rows: which row each token is in, and the rows' tasks.

        Returns:
            (t, e) float32 on the device of ``x``, one column for each of ``layer.experts``; an
            expert with gate 0 is not computed where that saves time.
        """
        ...
