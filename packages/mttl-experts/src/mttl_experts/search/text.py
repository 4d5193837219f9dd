"""Experts by words: TF-IDF over what a library knows of each, with room for spelling.

Whole words count wherever they stand. The three-letter pieces of names, tasks and tags count as
well, so that ``arithmetic`` finds ``arith_v2`` and a typing error does not end the search.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mttl_experts.expert import ExpertInfo

# What pieces add to the cosine of the words, and the share of the query's pieces that a name
# without any of its words must have.
PIECES_WEIGHT = 0.5
PIECES_SHARE = 0.3
_WORD = re.compile(r"[^\W_]+")
# Words of one text, camelCase and letters next to digits being several.
_INSIDE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])")


class TextIndex:
    """TF-IDF of experts' facts; it is a function of these alone."""

    def __init__(self, infos: Mapping[str, ExpertInfo]) -> None:
        """Index the facts of experts by name."""
        self.names = list(infos)
        self._words = _Postings([_words_of(info) for info in infos.values()])
        self._pieces = _Postings([_pieces_of(_labels(info)) for info in infos.values()])

    def nearest(self, query: str, limit: int) -> list[tuple[str, float]]:
        """Names that fit best and how well, from 1 down; those with nothing in common left out."""
        words = self._words.cosines(Counter(_words(query)))
        pieces = self._pieces.shares(_pieces_of([query]))
        scores = (words + PIECES_WEIGHT * pieces) / (1 + PIECES_WEIGHT)
        scores[(words <= 0) & (pieces < PIECES_SHARE)] = 0
        # Stable, so that equal ones stay in the order of their names.
        order = scores.sort(descending=True, stable=True)
        best = zip(order.indices[:limit].tolist(), order.values[:limit].tolist(), strict=True)
        return [(self.names[row], score) for row, score in best if score > 0]


class _Postings:
    """The documents that each term is in, with the weight that it has there."""

    def __init__(self, documents: Sequence[Mapping[str, int]]) -> None:
        """Weigh the terms of documents, given how often each has each of them."""
        self._count = len(documents)
        self._terms: dict[str, int] = {}
        numbers: list[int] = []
        rows: list[int] = []
        counts: list[int] = []
        for row, document in enumerate(documents):
            numbers += [self._terms.setdefault(term, len(self._terms)) for term in document]
            rows += [row] * len(document)
            counts += document.values()
        terms = torch.tensor(numbers, dtype=torch.long)
        by_term = terms.argsort(stable=True)
        frequency = terms.bincount(minlength=len(self._terms))
        self._ends = [0, *frequency.cumsum(0).tolist()]
        self._idf = torch.log((1 + self._count) / (1 + frequency)) + 1
        self._rows = torch.tensor(rows, dtype=torch.long)[by_term]
        weights = (1 + torch.tensor(counts, dtype=torch.float).log()[by_term]) * self._idf[
            terms[by_term]
        ]
        norms = torch.zeros(self._count).index_add_(0, self._rows, weights**2).sqrt()
        self._weights = weights / norms[self._rows]

    def cosines(self, query: Mapping[str, int]) -> Tensor:
        """(documents,) cosine of each with the query, whose unknown terms count as rare ones."""
        scores = torch.zeros(self._count)
        total = 0.0
        for term, count in query.items():
            weight = (1 + math.log(count)) * self._rarity(term)
            total += weight**2
            places = self._places(term)
            scores.index_add_(0, self._rows[places], weight * self._weights[places])
        return scores / math.sqrt(total) if total else scores

    def shares(self, query: Iterable[str]) -> Tensor:
        """(documents,) share of the query's terms that each has, rare terms counting more."""
        scores = torch.zeros(self._count)
        total = 0.0
        for term in query:
            weight = self._rarity(term)
            total += weight
            scores[self._rows[self._places(term)]] += weight
        return scores / total if total else scores

    def _places(self, term: str) -> slice:
        number = self._terms.get(term)
        if number is None:
            return slice(0, 0)
        return slice(self._ends[number], self._ends[number + 1])

    def _rarity(self, term: str) -> float:
        number = self._terms.get(term)
        return math.log(1 + self._count) + 1 if number is None else float(self._idf[number])


def description(info: ExpertInfo) -> str:
    """All that an expert is described by, the names in words, for those who read or embed it."""
    labels = {label: " ".join(_WORD.findall(label)) for label in _labels(info)}
    return "\n".join(labels.get(text, text) for _, text in _texts(info) if text)


def _labels(info: ExpertInfo) -> tuple[str, ...]:
    return (info.expert_name, *info.tasks, *info.tags)


def _texts(info: ExpertInfo) -> Iterator[tuple[int, str]]:
    """What an expert is described by, and how much a word there counts."""
    for label in _labels(info):
        yield 3, label
    for key in ("dataset", "dataset_id"):
        if isinstance(dataset := (info.training_config or {}).get(key), str):
            yield 1, dataset
    for text in (info.parent_node, *info.parents, info.expert_model):
        yield 1, text or ""
    for text in info.extra.values():  # a card or a description, if somebody wrote one
        if isinstance(text, str):
            yield 1, text


def _words_of(info: ExpertInfo) -> Counter[str]:
    counts: Counter[str] = Counter()
    for weight, text in _texts(info):
        for word in _words(text):
            counts[word] += weight
    return counts


def _pieces_of(labels: Iterable[str]) -> Counter[str]:
    return Counter(piece for label in labels for word in _words(label) for piece in _pieces(word))


@lru_cache(maxsize=1 << 16)
def _words(text: str) -> tuple[str, ...]:
    """Its words in lower case; of one that has parts, the parts as well as the whole."""
    found: list[str] = []
    for word in _WORD.findall(text):
        parts = _INSIDE.split(word)
        found += [part.casefold() for part in parts]
        if len(parts) > 1:
            found.append(word.casefold())
    return tuple(found)


@lru_cache(maxsize=1 << 16)
def _pieces(word: str) -> tuple[str, ...]:
    """Three letters each, the ends of the word being letters too."""
    padded = f" {word} "
    return tuple(padded[at : at + 3] for at in range(len(padded) - 2))
