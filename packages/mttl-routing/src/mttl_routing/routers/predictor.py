"""Each row to the expert whose task its prompt looks like; the task itself is not asked for.

Three kinds: the nearest of the experts' TF-IDF centroids, the nearest of their centroids of prompt
embeddings, or a logistic regression on either. The embeddings are the base's own, so no other
model is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mttl_experts import Expert
from mttl_routing.routers.embedding import (
    Embedding,
    Encoder,
    Example,
    embedding_of,
    examples_digest,
    taken,
    texts_of,
)
from mttl_routing.routers.kept import kept
from mttl_routing.routers.linear import Linear, logistic
from mttl_routing.routers.nearest import (
    Nearest,
    centroids_of,
    check_temperature,
    check_top_k,
    named,
    remembered,
    shares,
)
from mttl_routing.routers.protocol import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters.base_models import BaseModel
    from mttl_experts import ExpertLibrary
    from mttl_routing.routers.words import Words

HEADS = ("centroid", "logistic")


class Scorer(Protocol):
    """Scores experts by a prompt; the higher, the likelier that it is one of theirs."""

    names: tuple[str, ...]

    def scores(self, prompt: Prompt) -> Tensor:
        """(b, n) float32, one column for each of ``names``."""
        ...


class Classifier:
    """Logits of a logistic regression on prompts' embeddings."""

    def __init__(self, names: Sequence[str], linear: Linear, embedding: Embedding) -> None:
        """Keep what was fitted, and what makes the vectors that it was fitted on."""
        self.names = tuple(names)
        self.embedding = embedding
        self._linear = linear

    def scores(self, prompt: Prompt) -> Tensor:
        """(b, n) float32."""
        return self._linear(self.embedding.of(prompt))


class Predictor:
    """Gates by what a prompt looks like: a softmax over the ``top_k`` likeliest experts.

    Experts that nothing is known of, and those that are switched off, are not predicted; where all
    are, the row gets the base alone.

    Args:
        scorer: scores experts, by name.
        top_k: how many a row gets; 1 is the predicted one alone.
        temperature: of the softmax; it makes no difference to a single one.
    """

    def __init__(self, scorer: Scorer, *, top_k: int = 1, temperature: float = 1.0) -> None:
        """Keep what scores the experts."""
        self.scorer = scorer
        self.top_k = check_top_k(top_k)
        self.temperature = check_temperature(temperature)
        self._known = frozenset(scorer.names)

    @classmethod
    def fit(
        cls,
        experts: Iterable[Expert],
        examples: Mapping[str, Iterable[Example]],
        *,
        features: str | Embedding | Encoder = "words",
        head: str = "centroid",
        base_model: BaseModel | PreTrainedModel | None = None,
        library: ExpertLibrary | None = None,
        most: int | None = None,
        top_k: int = 1,
        temperature: float = 1.0,
    ) -> Predictor:
        """The predictor of some experts, from examples of what they were trained on.

        Args:
            experts: to choose among; those without examples are never predicted.
            examples: prompts of each expert, by its name: texts, or batches of token ids.
            features: ``words`` (TF-IDF), ``hidden`` or ``input`` (the base's own embeddings), or an
                encoder from texts to (n, d).
            head: ``centroid``, the nearest by cosine, or ``logistic``.
            base_model: makes the embeddings, and reads batches for ``words``.
            library: keeps what is fitted, beside the experts.
            most: of an expert's examples, how many count, in their order; None is all.
            top_k: experts a row gets.
            temperature: of the softmax over them.

        Raises:
            ValueError: an unknown name, or an expert with no examples under its name.
        """
        if head not in HEADS:
            raise ValueError(f"head is {head!r}; it takes {' or '.join(map(repr, HEADS))}")
        chosen = taken(examples, most)
        by_name = named(experts, chosen)
        scorer: Scorer
        if isinstance(features, str) and features == "words":
            scorer = _words(by_name, chosen, head, base_model, library)
        else:
            embedding = embedding_of(features, base_model)
            scorer = (_nearest if head == "centroid" else _classifier)(
                by_name, chosen, embedding, library
            )
        return cls(scorer, top_k=top_k, temperature=temperature)

    def decide(self, prompt: Prompt) -> Tensor:
        """(b, e), the same for all tokens of a row and in every layer."""
        scores = self.scorer.scores(prompt)
        places = {prompt.experts[column]: column for column in prompt.enabled}
        known = [i for i, n in enumerate(self.scorer.names) if n in places and n in self._known]
        columns = [places[self.scorer.names[index]] for index in known]
        return shares(scores[:, known], columns, len(prompt.experts), self.top_k, self.temperature)

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Forget the experts that went; a new one is refused, since it has no examples here."""
        self._known = remembered(self._known, self, added, removed)


def _words(
    experts: Mapping[str, Expert],
    examples: Mapping[str, Sequence[Example]],
    head: str,
    base_model: Any,
    library: ExpertLibrary | None,
) -> Words:
    from mttl_routing.routers.words import RECIPE, Words  # brings scikit-learn in

    tokenizer = getattr(base_model, "tokenizer", None)
    texts = [texts_of(some, tokenizer) for some in examples.values()]
    data = {name: examples_digest(some) for name, some in zip(examples, texts, strict=True)}
    recipe = RECIPE | {"head": head, "data": data}
    fitted = kept(library, list(experts.values()), recipe, lambda: Words.fit(texts, head))
    return Words(list(examples), fitted)


def _nearest(
    experts: Mapping[str, Expert],
    examples: Mapping[str, Sequence[Example]],
    embedding: Embedding,
    library: ExpertLibrary | None,
) -> Nearest:
    owners = {name: [expert] for name, expert in experts.items()}
    return Nearest(centroids_of(examples, embedding, owners, library), embedding)


def _classifier(
    experts: Mapping[str, Expert],
    examples: Mapping[str, Sequence[Example]],
    embedding: Embedding,
    library: ExpertLibrary | None,
) -> Classifier:
    def make() -> dict[str, Tensor]:
        vectors = [embedding.of_examples(some).cpu() for some in examples.values()]
        owners = np.repeat(np.arange(len(vectors)), [len(some) for some in vectors])
        fitted = logistic(torch.cat(vectors).numpy(), owners, len(vectors))
        return {"weight": fitted.weight, "bias": fitted.bias}

    data = {name: examples_digest(some) for name, some in examples.items()}
    recipe = {"kind": "prompt-classifier", "format": 1, "embedding": embedding.recipe, "data": data}
    where = None if embedding.recipe is None else library
    fitted = kept(where, list(experts.values()), recipe, make)
    return Classifier(list(examples), Linear(fitted["weight"], fitted["bias"]), embedding)
