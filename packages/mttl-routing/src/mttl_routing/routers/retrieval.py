"""Retrieval: the experts whose examples a prompt is most like, and how its tokens share them.

LoraRetriever (https://arxiv.org/abs/2402.09997) represents an expert by the mean embedding of a few
of its training prompts, takes the k of highest cosine, and averages what they add. RAMoLE
(https://arxiv.org/abs/2406.16989) retrieves in the same way, and has a trained gate (RouterLoRA)
share each token among the retrieved. That gate is not here, since nothing but training defines it:
the shares are equal, or those of another router for tokens, asked about the retrieved alone. The
encoder that both papers train is not here either; an encoder of the user's own takes its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mttl_experts import Expert
from mttl_routing.routers.embedding import Embedding, Encoder, Example, embedding_of, taken
from mttl_routing.routers.nearest import Nearest, centroids_of, check_top_k, named, remembered
from mttl_routing.routers.protocol import FollowsExperts, Layer, Prompt, Router, Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters.base_models import BaseModel
    from mttl_experts import ExpertLibrary

# Sets of retrieved experts that a layer remembers, with what a router for tokens derived for each.
_REMEMBERED = 64


class Retrieval:
    """The ``top_k`` experts nearest to a row's prompt, in equal shares.

    Args:
        nearest: centroids of the experts, by name.
        top_k: experts that a row gets; all that can be chosen, where there are fewer.
    """

    def __init__(self, nearest: Nearest, *, top_k: int = 3) -> None:
        """Keep the centroids."""
        self.nearest = nearest
        self.top_k = check_top_k(top_k)
        self._known = frozenset(nearest.names)

    @classmethod
    def fit(
        cls,
        experts: Iterable[Expert],
        examples: Mapping[str, Iterable[Example]],
        *,
        features: str | Embedding | Encoder = "hidden",
        base_model: BaseModel | PreTrainedModel | None = None,
        library: ExpertLibrary | None = None,
        most: int | None = 20,
        top_k: int = 3,
        tokens: Router | None = None,
    ) -> Retrieval:
        """The router of some experts, from a few examples of what they were trained on.

        Args:
            experts: to choose among; those without examples are never retrieved.
            examples: prompts of each expert, by its name: texts, or batches of token ids.
            features: ``hidden`` or ``input`` (the base's own embeddings), or an encoder from texts
                to (n, d).
            base_model: makes the embeddings.
            library: keeps the experts' centroids, beside them.
            most: of an expert's examples, how many count, in their order; None is all.
            top_k: experts that a row gets.
            tokens: shares each token among its row's retrieved experts; None is equal shares.
        """
        chosen = taken(examples, most)
        owners = {name: [expert] for name, expert in named(experts, chosen).items()}
        embedding = embedding_of(features, base_model)
        nearest = Nearest(centroids_of(chosen, embedding, owners, library), embedding)
        if tokens is None:
            return cls(nearest, top_k=top_k)
        return RetrievalThenTokens(nearest, tokens, top_k=top_k)

    def decide(self, prompt: Prompt) -> Tensor:
        """(b, e), 1/k for each of a row's retrieved experts."""
        places = {prompt.experts[column]: column for column in prompt.enabled}
        known = [i for i, n in enumerate(self.nearest.names) if n in places and n in self._known]
        scores = self.nearest.scores(prompt)[:, known]
        gates = scores.new_zeros(len(scores), len(prompt.experts))
        if not known:
            return gates
        columns = torch.tensor([places[self.nearest.names[i]] for i in known], device=scores.device)
        best = scores.topk(min(self.top_k, len(known)), dim=1).indices
        return gates.scatter(1, columns[best], 1 / best.shape[1])

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Forget the experts that went; a new one is refused, since it has no examples here."""
        self._known = remembered(self._known, self, added, removed)


class RetrievalThenTokens(Retrieval):
    """The ``top_k`` experts nearest to a row's prompt, shared among its tokens by another router.

    Args:
        nearest: centroids of the experts, by name.
        tokens: asked at each layer as if there were no other experts than a row's retrieved ones.
        top_k: experts that are retrieved for a row.
    """

    def __init__(self, nearest: Nearest, tokens: Router, *, top_k: int = 3) -> None:
        """Keep the centroids and the router for tokens."""
        super().__init__(nearest, top_k=top_k)
        self.tokens = tokens

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        """(t, e), above zero for experts that were retrieved for a token's row alone."""
        if rows.decision is None:
            raise ValueError("retrieval routes the tokens of rows that it saw the prompts of; none")
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, shares in enumerate(rows.decision.tolist()):
            retrieved = tuple(column for column, share in enumerate(shares) if share > 0)
            groups.setdefault(retrieved, []).append(row)
        rows.spread(rows.decision[:, :0])  # its error, where the layer's input has other rows
        narrowed = layer.once((self, "narrowed"), lambda: _narrowing(layer))
        x = x.view(len(rows.decision), rows.tokens, -1)
        gates = x.new_zeros(*x.shape[:2], len(layer.experts), dtype=torch.float32)
        for retrieved, members in groups.items():
            some = narrowed(retrieved)
            if not some.present:  # none retrieved, or none that changes this layer
                continue
            part = self.tokens.gates(x[members].flatten(0, 1), some, _of(members, rows, some))
            part = part if isinstance(part, Tensor) else part.dense(len(layer.experts))
            gates[members] = part.view(len(members), rows.tokens, -1)
        return gates.flatten(0, 1)

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """As without tokens; their router is told as well."""
        super().follow(added, removed)
        if isinstance(self.tokens, FollowsExperts):
            self.tokens.follow(added, removed)


def _narrowing(layer: Layer) -> Callable[[tuple[int, ...]], Layer]:
    """Gives the layer as it is with all experts but some switched off."""

    @lru_cache(maxsize=_REMEMBERED)
    def narrowed(retrieved: tuple[int, ...]) -> Layer:
        others = frozenset(range(len(layer.experts))).difference(retrieved)
        return replace(layer, disabled=layer.disabled | others, _kept={})

    return narrowed


def _of(members: list[int], rows: Rows, layer: Layer) -> Rows:
    """What a router for tokens is told of some of the rows."""
    tasks = rows.tasks
    if isinstance(tasks, tuple):
        tasks = tuple(tasks[row] for row in members)
    decision = None if rows.decision is None else rows.decision[members]
    return Rows(len(members), rows.tokens, tasks, decision, (layer,))
