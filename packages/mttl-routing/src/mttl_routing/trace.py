"""What a routed model chose: the weight of each expert for each token in each layer, to look at.

Recorded inside ``with routed.trace() as trace:`` alone; kept as the routers gave it, and spread
out to one line a weight when it is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen

if TYPE_CHECKING:
    from mttl_routing.call import Call, Gates
    from mttl_routing.routers import Layer, Rows

COLUMNS = ("call", "row", "position", "layer", "expert", "weight")


@dataclass(frozen=True, eq=False)
class _Record:
    call: int
    layer: str
    experts: tuple[str, ...]
    chosen: Chosen  # one line a token
    tokens: int  # of each row
    start: int  # position of the first
    mask: Tensor | None  # (rows, tokens)


@dataclass(eq=False)
class Trace:
    """Weights as they were applied, padding left out.

    ``len(trace)`` is how many there are. Each is a line with these columns:

    - ``call``: which forward, counted from 0;
    - ``row``: of the batch; in a beam search that of the beam;
    - ``position``: of the token in its row, what lay in the cache and padding counted;
    - ``layer``: path of the module; ``expert``: name; ``weight``: not 0.
    """

    _records: list[_Record] = field(default_factory=list, repr=False)
    _calls: int = field(default=0, repr=False)
    _last: Any = field(default=None, repr=False)

    def record(self, call: Call, layer: Layer, rows: Rows, gates: Gates) -> None:
        """Keep the gates of one layer; called by the layer."""
        if call is not self._last:
            self._last, self._calls = call, self._calls + 1
        if isinstance(gates, Tensor) and gates.dim() == 3:  # of several heads
            gates = gates.mean(dim=1)
        chosen = gates if isinstance(gates, Chosen) else Chosen.from_dense(gates)
        chosen = chosen.each()
        kept = Chosen(chosen.experts.detach().cpu(), chosen.weights.detach().float().cpu())
        fits = call.mask is not None and tuple(call.mask.shape) == (rows.count, rows.tokens)
        mask = call.mask.cpu() if fits and call.mask is not None else None
        self._records.append(
            _Record(
                self._calls - 1, layer.module, layer.experts, kept, rows.tokens, call.start, mask
            )
        )

    def __len__(self) -> int:
        """How many weights there are."""
        return sum(len(lines) for _, lines, _ in self._lines())

    def table(self) -> dict[str, list[Any]]:
        """All lines, as a list for each column."""
        found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for record, lines, places in self._lines():
            tokens, weights = lines.tolist(), record.chosen.weights.flatten()[places].tolist()
            experts = record.chosen.experts.flatten()[places].tolist()
            found["call"] += [record.call] * len(tokens)
            found["row"] += [token // record.tokens for token in tokens]
            found["position"] += [record.start + token % record.tokens for token in tokens]
            found["layer"] += [record.layer] * len(tokens)
            found["expert"] += [record.experts[expert] for expert in experts]
            found["weight"] += weights
        return found

    def shares(self) -> dict[str, dict[str, float]]:
        """Mean weight of each expert over the tokens of each layer, by layer and expert name."""
        return self._means(lambda weights: weights)

    def best(self) -> dict[str, dict[str, float]]:
        """Share of each layer's tokens whose highest weight each expert has, by layer and name.

        Experts of equal weight share the token; one that none is sent to is nobody's.
        """

        def won(weights: Tensor) -> Tensor:
            first = (weights == weights.amax(1, keepdim=True)) & (weights > 0)
            return first / first.sum(1, keepdim=True).clamp_min(1)

        return self._means(won)

    def save(self, path: str | PathLike[str]) -> None:
        """Write all lines to a parquet file; needs pyarrow, as in ``mttl-routing[trace]``."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(
                "saving a trace as parquet needs pyarrow; install mttl-routing[trace]"
            ) from error
        kinds = ("int32", "int32", "int32", "string", "string", "float32")
        schema = pyarrow.schema(
            [
                (name, pyarrow.type_for_alias(kind))
                for name, kind in zip(COLUMNS, kinds, strict=True)
            ]
        )
        parquet.write_table(pyarrow.table(self.table(), schema=schema), path)

    def _means(self, of: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
        """Means over each layer's tokens of a function (t, e) of the weights (t, e)."""
        sums: dict[str, dict[str, float]] = {}
        tokens: dict[str, int] = {}
        for record in self._records:
            dense = record.chosen.dense(len(record.experts)).double()
            if record.mask is not None:
                dense = dense[record.mask.flatten()]
            tokens[record.layer] = tokens.get(record.layer, 0) + dense.shape[0]
            layer = sums.setdefault(record.layer, {})
            for name, value in zip(record.experts, of(dense).sum(dim=0).tolist(), strict=True):
                layer[name] = layer.get(name, 0.0) + value
        return {
            layer: {name: value / max(1, tokens[layer]) for name, value in of_layer.items()}
            for layer, of_layer in sums.items()
        }

    def _lines(self) -> Iterator[tuple[_Record, Tensor, Tensor]]:
        """Each record with its weights' tokens, and their places among all of the record's."""
        for record in self._records:
            kept = (record.chosen.experts >= 0) & (record.chosen.weights != 0)
            if record.mask is not None:
                kept &= record.mask.flatten().unsqueeze(1)
            places = torch.nonzero(kept.flatten()).flatten()
            yield record, places // kept.shape[1], places
