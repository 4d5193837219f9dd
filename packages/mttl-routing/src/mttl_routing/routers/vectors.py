"""Routers that compare a token with one vector an expert: what Arrow, centroids and gates share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen
from mttl_adapters.scores import Keys, top_k
from mttl_experts import Expert
from mttl_routing.routers.choice import Choice
from mttl_routing.routers.protocol import Layer, Rows
from mttl_routing.routers.stacked import Stacked, Vectors

Best = tuple[Tensor, Tensor, Tensor | None]


class VectorRouter:
    """Scores ⟨x, v_e⟩ times a number of the token's own, and makes a :class:`Choice` among them.

    Experts that leave a layer alone have no vector there and are not chosen in it. Layers that
    read one input, as q, k and v do, are scored together.

    Args:
        vectors: of each expert, by expert name: (i,) by module path.
        choice: how scores become gates.
    """

    absolute = False
    """Whether the size of a score counts, whatever its sign."""

    def __init__(self, vectors: Mapping[str, Vectors], choice: Choice | None = None) -> None:
        """Stack the vectors."""
        self.choice = Choice() if choice is None else choice
        self._stacked = Stacked(vectors, self.key)

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Chosen:
        """(t, k) experts, the best first, and their weights."""
        found: dict[str, Best] = rows.once((self, "best"), dict)
        if layer.module not in found:
            alike = [other for other in rows.layers if other.module not in found]
            found.update(self._best(x, alike or [layer]))
        best, indices, scores = found[layer.module]
        return self.choice.among(best, indices, self._columns(layer, x.device), scores)

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Take up the vectors of new experts, and forget those of others."""
        new = {expert.name: self.vectors_of(expert.unread()) for expert in added}
        self._stacked = self._stacked.changed(new, removed)

    def vectors_of(self, expert: Expert) -> Vectors:
        """Vectors of an expert that joins later.

        Raises:
            ValueError: this router cannot make them from the expert alone.
        """
        raise ValueError(
            f"{type(self).__name__} needs data of expert {expert.name!r} before it can route to "
            "it; make the routed model anew, with its batches"
        )

    def key(self, vector: Tensor) -> Tensor:
        """(i,), what tokens are compared with; the vector itself unless a router says otherwise."""
        return vector

    def scale(self, x: Tensor) -> Tensor | None:
        """(t, 1), above 0, what a token's scores are multiplied by; None is 1."""
        return None

    def _columns(self, layer: Layer, device: torch.device) -> Tensor | None:
        """Which expert each of a layer's keys is of; None where they are all, in their order."""
        if len(layer.present) == len(layer.experts):
            return None
        return layer.once(
            (self, "columns", device),
            lambda: torch.tensor(layer.present, dtype=torch.int64, device=device),
        )

    def _best(self, x: Tensor, layers: Sequence[Layer]) -> dict[str, Best]:
        """Best scores, their indices, and all scores where the choice needs them, by module."""
        # In float32 whatever the model's dtype: bfloat16 scores choose wrongly for some tokens.
        scale = self.scale(x.to(torch.promote_types(x.dtype, torch.float32)))
        found: dict[str, Best] = {}
        some = [layer for layer in layers if layer.present]
        for layer in layers:
            if not layer.present:
                none = x.new_zeros(len(x), 0, dtype=torch.float32)
                found[layer.module] = (none, none.long(), none)
        if not some:
            return found
        modules = tuple(layer.module for layer in some)
        keys = some[0].once((self, modules, x.device), lambda: self._keys(some, x))
        if len(some) > 1:  # each was scored by itself until it was known that they go together
            for layer in some:
                layer.forget((self, (layer.module,), x.device))
        if self.choice.needs_all:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            everything: Sequence[Tensor | None] = torch.split(
                wide @ keys.stack.to(wide.dtype).T, list(keys.sizes), dim=1
            )
        else:
            everything = [None] * len(some)
        best = top_k(x, keys, self.choice.top_k, absolute=self.absolute)
        for layer, (values, indices), scores in zip(some, best, everything, strict=True):
            if scores is not None and self.absolute:
                scores = scores.abs()
            if scale is not None:
                values = values * scale
                scores = None if scores is None else scores * scale
            found[layer.module] = (values, indices, scores)
        return found

    def _keys(self, layers: Sequence[Layer], x: Tensor) -> Keys:
        return Keys(
            [
                self._stacked.rows(
                    layer.module, [layer.experts[column] for column in layer.present]
                ).to(x.device)
                for layer in layers
            ]
        )
