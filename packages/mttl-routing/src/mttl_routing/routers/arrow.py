"""Arrow (https://arxiv.org/abs/2405.11157): each token to the experts that amplify it most.

Needs no data and no training: an expert's prototype at a layer is the input direction that its own
update amplifies most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mttl_experts import Expert, spectral_forms
from mttl_routing.routers.protocol import Layer, Rows

if TYPE_CHECKING:
    from mttl_experts import ExpertLibrary

# What prototypes are kept under in a library; another way to compute them is another recipe.
RECIPE = {"kind": "arrow-prototypes", "format": 1}


def arrow_prototypes(expert: Expert) -> dict[str, Tensor]:
    """First right singular vector of an expert's ΔW, by module path.

    Returns:
        (i,) float32 of unit norm for each module that the expert adapts; the sign means nothing.
    """
    return {module: form.v[:, 0].contiguous() for module, form in spectral_forms(expert).items()}


def prototypes_of(experts: Sequence[Expert]) -> dict[str, Mapping[str, Tensor]]:
    """:func:`arrow_prototypes` of each expert, by expert name."""
    return {expert.name: arrow_prototypes(expert) for expert in experts}


def prototypes_in_library(
    library: ExpertLibrary, experts: Sequence[Expert]
) -> dict[str, Mapping[str, Tensor]]:
    """:func:`prototypes_of`, kept in the library by the experts' digests and not computed twice.

    All that were missing are kept by one commit.
    """
    kept = library.artifacts.get_or_make_each(experts, RECIPE, arrow_prototypes)
    return {expert.name: each for expert, each in zip(experts, kept, strict=True)}


class Arrow:
    """Scores ⎹⟨x, v_e⟩⎸/T, keeps the ``top_k`` largest, and weighs them by a softmax over those.

    Experts that leave a layer alone have no prototype there and are not chosen in it.

    Args:
        prototypes: :func:`arrow_prototypes` of each expert, by expert name.
        top_k: experts a token gets; all of a layer's, where it has fewer.
        temperature: T; the higher, the more equal the weights.
    """

    def __init__(
        self,
        prototypes: Mapping[str, Mapping[str, Tensor]],
        *,
        top_k: int = 4,
        temperature: float = 1.0,
    ) -> None:
        """Keep the prototypes; they are stacked when a layer first asks."""
        if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; it takes a whole number from 1")
        if not temperature > 0.0:
            raise ValueError(f"temperature is {temperature!r}; it takes a number above 0")
        self.top_k = top_k
        self.temperature = float(temperature)
        self._prototypes = prototypes

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        """(t, e), at most ``top_k`` of each line above zero, their sum 1."""
        prototypes, columns = self._stack(layer, x.device)
        # In float32 whatever the model's dtype: bfloat16 scores choose wrongly for some tokens.
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        scores = (x @ prototypes.to(x.dtype).T).abs() / self.temperature  # (t, present e)
        top = scores.topk(min(self.top_k, len(columns)), dim=1)
        gates = scores.new_zeros(x.shape[0], len(layer.experts))
        return gates.scatter(1, columns[top.indices], top.values.softmax(dim=1))

    def _stack(self, layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
        """Prototypes of the experts in a layer, (present e, i), and their columns in its gates."""
        present = layer.present

        def stack() -> tuple[Tensor, Tensor]:
            rows = [self._prototypes[layer.experts[column]][layer.module] for column in present]
            return torch.stack(rows).to(device), torch.tensor(present, device=device)

        return layer.once((self, "prototypes", device), stack)
