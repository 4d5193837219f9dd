"""Arrow (https://arxiv.org/abs/2405.11157): each token to the experts that amplify it most.

Needs no data and no training: an expert's prototype at a layer is the input direction that its own
update amplifies most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mttl_experts import Expert
from mttl_routing.routers.prototypes import arrow_prototypes
from mttl_routing.routers.vectors import VectorRouter

if TYPE_CHECKING:
    from mttl_experts import ExpertLibrary

# What prototypes are kept under in a library; another way to compute them is another recipe.
RECIPE = {"kind": "arrow-prototypes", "format": 2}


def prototypes_of(
    experts: Sequence[Expert], library: ExpertLibrary | None = None
) -> dict[str, Mapping[str, Tensor]]:
    """:func:`arrow_prototypes` of each expert, by expert name.

    Of a library, they are kept in it by the experts' digests and not computed twice; all that were
    missing are kept by one commit.
    """
    if library is None:
        return {expert.name: arrow_prototypes(expert.unread()) for expert in experts}
    kept = library.artifacts.get_or_make_each(experts, RECIPE, arrow_prototypes)
    return {expert.name: each for expert, each in zip(experts, kept, strict=True)}


class Arrow(VectorRouter):
    """Scores ⎹⟨x, v_e⟩⎸, v_e being the prototype of expert e at the layer.

    Args:
        vectors: :func:`arrow_prototypes` of each expert, by expert name.
        choice: how scores become gates.
    """

    absolute = True

    def vectors_of(self, expert: Expert) -> Mapping[str, Tensor]:
        """Prototypes of an expert that joins later."""
        return arrow_prototypes(expert)
