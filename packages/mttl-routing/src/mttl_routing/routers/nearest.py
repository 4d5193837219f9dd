"""How near a prompt is to what an expert or a task is known by, the mean of its examples."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mttl_experts import Expert
from mttl_routing.routers.embedding import Embedding, Example, examples_digest
from mttl_routing.routers.kept import kept_each
from mttl_routing.routers.protocol import Prompt

if TYPE_CHECKING:
    from mttl_experts import ExpertLibrary


class Nearest:
    """Cosines of prompts with centroids.

    Args:
        centroids: (d,) of each name.
        embedding: makes vectors of prompts, as it made those that the centroids are the means of.
    """

    def __init__(self, centroids: Mapping[str, Tensor], embedding: Embedding) -> None:
        """Stack the centroids."""
        self.names = tuple(sorted(centroids))
        self.embedding = embedding
        self._centroids = torch.stack([centroids[name].float() for name in self.names])

    def scores(self, prompt: Prompt) -> Tensor:
        """(b, n) float32, from -1 to 1."""
        vectors = self.embedding.of(prompt)
        centroids = self._centroids.to(vectors.device)
        return normalize(vectors, dim=-1) @ normalize(centroids, dim=-1).T


def named(experts: Iterable[Expert], names: Iterable[str]) -> dict[str, Expert]:
    """The expert of each name, in the order of the names.

    Raises:
        ValueError: for a name that no expert has.
    """
    by_name = {expert.name: expert for expert in experts}
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1) or sorted(by_name)[:3]
            raise ValueError(
                f"{name!r} is named, and no expert has that name; there are "
                f"{', '.join(map(repr, near))}{' ...' if len(by_name) > len(near) else ''}"
            )
    return {name: by_name[name] for name in names}


def remembered(
    names: frozenset[str], router: object, added: Sequence[Expert], removed: Sequence[str]
) -> frozenset[str]:
    """Names that a router has examples of, after experts went; a new one is refused.

    Raises:
        ValueError: an expert came, also in the place of another, and nothing is known of it.
    """
    if added:
        raise ValueError(
            f"a {type(router).__name__} needs examples of expert {added[0].name!r} before it can "
            "route to it; make the routed model anew, with its examples"
        )
    return names.difference(removed)


def centroids_of(
    examples: Mapping[str, Sequence[Example]],
    embedding: Embedding,
    experts: Mapping[str, Sequence[Expert]],
    library: ExpertLibrary | None = None,
) -> dict[str, Tensor]:
    """Mean vector of the examples of each name, (d,) float32.

    Args:
        examples: of each expert or task.
        embedding: makes the vectors.
        experts: that each name stands for; its centroid is kept beside them.
        library: keeps the centroids, where the embedding says how it makes them.
    """
    names = sorted(examples)
    recipe = {"kind": "prompt-centroid", "format": 1, "embedding": embedding.recipe}
    keys = [(experts[n], recipe | {"data": examples_digest(examples[n])}) for n in names]

    def make(index: int) -> dict[str, Tensor]:
        return {"centroid": embedding.of_examples(examples[names[index]]).mean(0).cpu()}

    values = kept_each(None if embedding.recipe is None else library, keys, make)
    return {name: value["centroid"] for name, value in zip(names, values, strict=True)}


def shares(
    scores: Tensor, columns: Sequence[int], n_columns: int, top_k: int, temperature: float
) -> Tensor:
    """(b, n_columns) softmax over the ``top_k`` best of each line, at their columns; 0 elsewhere.

    Args:
        scores: (b, n).
        columns: n of them, one for each score; with none, every line is 0.
        n_columns: of the result.
        top_k: how many to keep; all, where there are fewer.
        temperature: what scores are divided by before the softmax.
    """
    gates = scores.new_zeros(scores.shape[0], n_columns)
    if not columns:
        return gates
    top = scores.topk(min(top_k, len(columns)), dim=1)
    places = torch.tensor(columns, device=scores.device)[top.indices]
    return gates.scatter(1, places, (top.values / temperature).softmax(dim=1))


def check_top_k(top_k: int) -> int:
    """``top_k``, if it is a count from 1."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k is {top_k!r}; it takes a whole number from 1")
    return top_k


def check_temperature(temperature: float) -> float:
    """``temperature`` as a float, if it is above 0."""
    if not temperature > 0.0:
        raise ValueError(f"temperature is {temperature!r}; it takes a number above 0")
    return float(temperature)
