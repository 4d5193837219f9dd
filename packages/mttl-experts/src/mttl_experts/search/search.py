"""Searching one library: by words, by likeness to an expert, by loss on examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mttl_experts.errors import ExpertError, UnsupportedAdapterError
from mttl_experts.expert import Expert
from mttl_experts.search.embeddings import Embedder, EmbeddingIndex
from mttl_experts.search.index import Progress, SketchIndex, sketched
from mttl_experts.search.likeness import Likeness, Query
from mttl_experts.search.losses import Losses
from mttl_experts.search.text import TextIndex
from mttl_experts.spectral import LoraFactors, lora_modules
from mttl_storage import Corrupt, NotFound, in_parallel

if TYPE_CHECKING:
    from mttl_experts.changing import LibraryWriter

LIMIT = 10
CANDIDATES = 50
"""Experts that are compared exactly, out of those that a library has."""


@dataclass(frozen=True)
class Match:
    """One expert that was found.

    Attributes:
        name: its name.
        score: how well it fits, more being better: from 0 to 1 for words, the cosine of ΔW for an
            expert, minus the loss for examples.
        likeness: what it is to the expert asked for.
        gain: how much lower its loss on the examples is than that of the base alone.
    """

    name: str
    score: float
    likeness: Likeness | None = None
    gain: float | None = None


class Search:
    """Finds experts among those that a library shows. ``library.search`` is one.

    Indexes are made when first needed and kept: of words in this object, of weights, meanings and
    losses among the library's artifacts and scores, so that a second search is fast and an expert
    that comes in adds its own part alone. None outlives what it was made of.
    """

    def __init__(self, library: LibraryWriter) -> None:
        """Search this library, as it is at the time of each search."""
        self._library = library
        self._index = SketchIndex(library)
        self._generation: int | None = None
        self._experts: dict[str, Expert] = {}
        self._by_digest: dict[str, list[str]] = {}
        self._modules: dict[str, dict[str, LoraFactors]] = {}  # by digest; mapped, not read
        self._texts: TextIndex | None = None
        self._embedders: dict[str, Embedder] = {}  # by the name of their model
        self._vectors: dict[str, EmbeddingIndex] = {}
        self._indexed = False
        self.left_out: dict[str, str] = {}
        """Experts that the last search by weights or by loss could not compare, and why."""

    def __getstate__(self) -> dict[str, Any]:
        """The library alone; indexes are made again."""
        return {"library": self._library}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """A search of that library."""
        self.__init__(state["library"])  # type: ignore[misc]

    def __call__(self, wanted: str | Expert, limit: int = LIMIT) -> list[Match]:
        """The experts that fit some words best, or that are most like an expert."""
        if isinstance(wanted, Expert):
            return self.like(wanted, limit)
        return self.text(wanted, limit)

    def text(self, query: str, limit: int = LIMIT, *, embeddings: str | None = None) -> list[Match]:
        """The experts whose name, tasks, tags, card and the like fit some words best.

        Those that have nothing in common with the query are left out.

        Args:
            query: the words.
            limit: most to be given.
            embeddings: compare meanings instead of words, by the vectors of this model: the folder
                or hub id of an encoder. The score is then a cosine, and none is left out. Vectors
                are kept among the artifacts.

        Raises:
            EmbeddingError: the model cannot be loaded, or transformers is not installed.
        """
        self._look()
        if embeddings is not None:
            nearest = self._meanings(embeddings).nearest(query, limit)
            return [Match(name, score) for name, score in nearest]
        if self._texts is None:
            infos = {name: expert.expert_info for name, expert in self._experts.items()}
            self._texts = TextIndex(infos)
        return [Match(name, score) for name, score in self._texts.nearest(query, limit)]

    def like(
        self,
        expert: str | Expert,
        limit: int = LIMIT,
        *,
        candidates: int = CANDIDATES,
        itself: bool = False,
        progress: Progress | None = None,
    ) -> list[Match]:
        """The experts whose ΔW is nearest to that of an expert; copies, also scaled ones, first.

        Sketches choose the candidates, among which every copy is under whatever factors; exact
        inner products rank them.

        Args:
            expert: name of one of the library's, or any expert.
            limit: most to be given.
            candidates: how many to compare exactly, if that is more.
            itself: whether the library's own entry of that name with these weights may be given.
            progress: told how many sketches are made, of how many that are missing.

        Raises:
            UnsupportedAdapterError: the expert has no weights, or is no plain LoRA.
            ValueError: it changes nothing, so nothing is like it, or holds NaN.
        """
        if isinstance(expert, str):
            expert = self._library.get_expert(expert)
        if expert.expert_weights is None:
            raise UnsupportedAdapterError(
                f"expert {expert.name!r} has no weights yet, so none is like it"
            )
        self._look()
        self._update(progress)
        row, norm = self._index.row(expert.digest) or sketched(expert)
        if norm == 0:
            raise ValueError(
                f"expert {expert.name!r} changes nothing (its ΔW is 0), so none is like it"
            )
        query = Query(lora_modules(expert), norm)
        norms = dict(self._index.nearest(row, max(candidates, limit + 1)))
        likenesses: dict[str, Likeness] = {}

        def compare(digest: str) -> None:
            try:
                likenesses[digest] = query.likeness(self._factors(digest), norms[digest])
            except _DAMAGED as error:  # since its sketch was made
                self._leave_out(digest, str(error))

        in_parallel(compare, norms)  # reading, hashing and products, each without the interpreter
        self.left_out = dict(sorted(self.left_out.items()))
        found = [
            Match(name, likeness.cosine, likeness)
            for digest, likeness in likenesses.items()
            for name in self._by_digest[digest]
            if itself or (name, digest) != (expert.name, expert.digest)
        ]
        found.sort(key=lambda match: (_rank(match.likeness), -match.score, match.name))
        return found[:limit]

    def by_loss(
        self,
        loss: Callable[[Expert | None], float],
        examples: Mapping[str, Any],
        n: int,
        limit: int = LIMIT,
        *,
        again: bool = False,
        progress: Progress | None = None,
    ) -> list[Match]:
        """The experts with the lowest loss on some examples.

        Each is measured once: losses are kept among the scores, of task ``examples``, and an
        interrupted search goes on where it was.

        Args:
            loss: gives the mean loss of the base with an expert, or alone for None.
            examples: all that decides the loss beside the expert, as plain data: digest of the
                examples, fingerprint of the base, its number format, how prompts are written.
            n: how many examples there are.
            limit: most to be given.
            again: measure also what is kept.
            progress: told how many are measured, of how many, and which is next.
        """
        self._look()
        losses = Losses(self._library, dict(examples), n)
        self.left_out = {}
        found: dict[str, float] = {}
        asked = {d: self._experts[names[0]] for d, names in self._by_digest.items()}
        try:
            base = losses.of(None, loss, again)
            for number, (digest, expert) in enumerate(asked.items()):
                if progress is not None:
                    progress(expert.name, number, len(asked))
                try:
                    found[digest] = losses.of(expert, loss, again)
                except (ExpertError, FloatingPointError, *_DAMAGED) as error:
                    self._leave_out(digest, str(error))
        finally:
            losses.keep()
        matches = [
            Match(name, -value, gain=base - value)
            for digest, value in found.items()
            for name in self._by_digest[digest]
        ]
        return sorted(matches, key=lambda match: (-match.score, match.name))[:limit]

    def _meanings(self, model: str) -> EmbeddingIndex:
        """Vectors of what the library shows now, by one model."""
        if model not in self._embedders:
            self._embedders[model] = Embedder(model)
        if model not in self._vectors:
            infos = {name: expert.expert_info for name, expert in self._experts.items()}
            index = EmbeddingIndex(infos, self._embedders[model], self._library.artifacts)
            self._look()  # keeping vectors moved the library on
            self._vectors[model] = index
        return self._vectors[model]

    def _look(self) -> None:
        """Take in what the library shows now."""
        if self._generation == self._library.generation:
            return
        self._experts = dict(self._library.items())
        self._by_digest = {}
        for name, expert in self._experts.items():
            if expert.expert_weights is not None:
                self._by_digest.setdefault(expert.digest, []).append(name)
        self._generation = self._library.generation
        self._texts, self._vectors, self._indexed = None, {}, False
        self._modules = {d: m for d, m in self._modules.items() if d in self._by_digest}

    def _factors(self, digest: str) -> dict[str, LoraFactors]:
        """LoRA factors of one expert, read once."""
        found = self._modules.get(digest)
        if found is None:
            expert = self._experts[self._by_digest[digest][0]]
            found = self._modules[digest] = lora_modules(expert)
        return found

    def _update(self, progress: Progress | None) -> None:
        """Bring the sketches up to what the library shows."""
        while not self._indexed:
            experts = {d: self._experts[names[0]] for d, names in self._by_digest.items()}
            self._index.update(experts, progress)
            self._indexed = True
            self._look()  # keeping sketches moved the library on, and others may have changed it
        self.left_out = {}
        for digest, reason in self._index.refusals(self._by_digest).items():
            self._leave_out(digest, reason)

    def _leave_out(self, digest: str, reason: str) -> None:
        self.left_out |= dict.fromkeys(self._by_digest[digest], reason)


# An expert's files that are not what was written, or are gone.
_DAMAGED = (Corrupt, NotFound)


def _rank(likeness: Likeness | None) -> int:
    return {"same": 0, "scaled": 1}.get(likeness.copy or "", 2) if likeness else 2
