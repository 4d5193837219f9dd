"""What was computed from experts, kept beside them: prototypes, spectral forms, merges, tables.

An artifact is keyed by the content it came from and by how it was made, never by a name. So a
replaced expert does not meet what was computed from its predecessor, and a recipe that was run once
need not be run again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mttl_experts.errors import UnsupportedAdapterError
from mttl_experts.expert import Expert
from mttl_experts.plain import canonical_json, plain, recipe_digest
from mttl_experts.tensors import LazyTensors, to_safetensors, unread
from mttl_storage import (
    Conflict,
    Corrupt,
    Denied,
    Item,
    ReadOnly,
    StorageFull,
    content_digest,
    in_parallel,
)

if TYPE_CHECKING:
    from mttl_experts.changing import LibraryWriter

Experts = Expert | str | Iterable[Expert | str]
Value = Any  # tensors by name, or plain data
PREFIX = "artifacts/"
TENSORS_FILE = "data.safetensors"
JSON_FILE = "data.json"
# Plain data up to this many bytes lies in the log, so that a table of scores is one read.
INLINE = 4096
# So many values are made before they are kept.
_TOGETHER = 100
# How often to put again what others were faster with, in part.
_ATTEMPTS = 3
_DIGEST = re.compile("[0-9a-f]{64}")
_NOTHING = content_digest({})  # shared by all experts without weights, so it names none of them


@dataclass(frozen=True)
class Artifact:
    """One entry of the list of artifacts.

    Attributes:
        item: its name in the repository.
        experts: digests of the experts it came from, sorted; none where it came from the base.
        recipe: how it was made, as plain data.
        size: bytes of its files.
    """

    item: str
    experts: tuple[str, ...]
    recipe: Any
    size: int


class Artifacts:
    """Values by (experts, recipe), in the library's own repository.

    Experts are given as ``Expert`` objects or as digests (``library.digest(name)``), one or
    several; names are refused, because a name may come to mean another expert while something is
    computed. Their order makes no difference; where it matters to the value, the recipe must hold
    it.

    A recipe is plain data that holds everything else that decides the value: the kind, options, a
    version, the base's fingerprint where the base takes part.
    """

    def __init__(self, library: LibraryWriter) -> None:
        """Keep the library whose repository holds the artifacts."""
        self._library = library

    def get(self, experts: Experts, recipe: Any) -> Value:
        """The value kept under this key, or None.

        Tensors come as a mapping that is read, verified and memory-mapped when first used;
        anything else as the plain data it was.
        """
        item = self._find(digests_of(experts), recipe)
        return None if item is None else self._value(item)

    def put(self, experts: Experts, recipe: Any, value: Value) -> None:
        """Keep a value; one that is there already under this key is replaced.

        Args:
            experts: what it was computed from.
            recipe: how, as plain data.
            value: tensors by name (at least one), or any plain data.
        """
        self._put(digests_of(experts), recipe, value)

    def put_each(self, values: Iterable[tuple[Experts, Value]], recipe: Any) -> None:
        """Keep several values of one recipe, by one commit; each as ``put`` does."""
        with self._one_commit(recipe):
            for experts, value in values:
                self.put(experts, recipe, value)

    def get_or_make(
        self,
        experts: Experts,
        recipe: Any,
        make: Callable[[], Value],
    ) -> Value:
        """The value kept under this key, made and kept first if there is none.

        Where the library cannot be written the value is still given. If another process kept one
        meanwhile, that one is given.
        """
        digests = digests_of(experts)
        kept = self.get(digests, recipe)
        if kept is not None:
            return kept
        value = make()
        try:
            self.put(digests, recipe, value)
        except (ReadOnly, Denied, StorageFull):
            return value
        except Conflict:
            self._library.refresh()
            kept = self.get(digests, recipe)
            return value if kept is None else kept
        return value

    def get_each(self, experts: Sequence[Experts], recipe: Any) -> list[Value]:
        """The values kept for each of ``experts`` under one recipe, None where there is none.

        Their files are fetched together, so that a distant library is asked once, not once each.
        """
        return self._get_each([digests_of(each) for each in experts], recipe)

    def get_or_make_each(
        self, experts: Sequence[Expert], recipe: Any, make: Callable[[Expert], Value]
    ) -> list[Value]:
        """The value of each expert, those that are missing made first and kept.

        No more than a hundred values are in memory at a time, and those are kept by one commit:
        tensors come back as :meth:`get` gives them. Where the library cannot be written, the
        values are still given.

        Args:
            experts: one value each.
            recipe: how all of them are made.
            make: computes the value of one expert, which it is given as :meth:`Expert.unread`.
        """
        digests = [digests_of(each) for each in experts]
        values = self._get_each(digests, recipe)
        own = zip(digests, values, experts, strict=True)
        missing = {digest: expert for (digest,), value, expert in own if value is None}
        made: dict[str, Value] = {}
        for start in range(0, len(missing), _TOGETHER):
            some = list(missing.items())[start : start + _TOGETHER]
            made |= self._kept({digest: make(expert.unread()) for digest, expert in some}, recipe)
        return [
            made[digest] if value is None else value
            for (digest,), value in zip(digests, values, strict=True)
        ]

    def for_each(self, recipe: Any) -> dict[str, Value]:
        """What each expert of the library has under one recipe, by expert name; others left out.

        Fetched together, as ``get_each`` does.
        """
        digests = {
            name: [expert.digest]
            for name, expert in self._library.items()
            if expert.expert_weights is not None
        }
        values = self._get_each(list(digests.values()), recipe)
        found = zip(digests, values, strict=True)
        return {name: value for name, value in found if value is not None}

    def item(self, experts: Experts, recipe: Any) -> Item:
        """The repository's item under this key, with the generation and time of its commit.

        Raises:
            NotFound: when there is none.
        """
        return self._library.repository.item(_item_name(digests_of(experts), recipe))

    def entries(self) -> list[Artifact]:
        """All artifacts of the repository, also those of experts that are gone, in one order."""
        found = self._library.repository.items(PREFIX)
        return [_entry(name, item) for name, item in found.items()]

    def _put(self, digests: list[str], recipe: Any, value: Value) -> None:
        recipe = plain(recipe, "recipe")
        name = _item_name(digests, recipe)
        info = {"format": 1, "experts": digests, "recipe": recipe}
        files: dict[str, bytes] = {}
        if isinstance(value, Mapping) and value and all(map(_is_tensor, value.values())):
            files[TENSORS_FILE] = to_safetensors(value)
        else:
            content = canonical_json(value, "artifact")
            if len(content) > INLINE:
                files[JSON_FILE] = content
            else:
                info["value"] = json.loads(content)
        writer = self._library.writer()
        if name in self._library.repository:
            writer.replace(name, files, info)
        else:
            writer.add(name, files, info)

    def _kept(self, made: dict[str, Value], recipe: Any) -> dict[str, Value]:
        """What was made, by expert digest: where it could be kept, as it lies in the library."""
        # The values are what was asked for; keeping them is a courtesy.
        with suppress(Conflict, ReadOnly, Denied, StorageFull):
            self._keep(made, recipe)
        kept = {digest: self.get([digest], recipe) for digest in made}
        return {d: kept[d] if isinstance(kept[d], LazyTensors) else v for d, v in made.items()}

    def _keep(self, made: Mapping[str, Value], recipe: Any) -> None:
        """Put what was made, by expert digest; what others put meanwhile is left as it is."""
        for attempt in range(_ATTEMPTS):
            if not made:
                return
            try:
                self.put_each(made.items(), recipe)
                return
            except Conflict:
                if attempt == _ATTEMPTS - 1:
                    raise
                self._library.refresh()
                made = {d: v for d, v in made.items() if self._find([d], recipe) is None}

    def _one_commit(self, recipe: Any) -> AbstractContextManager[object]:
        if self._library.in_batch:
            return nullcontext()
        kind = recipe.get("kind", "values") if isinstance(recipe, dict) else "values"
        return self._library.batch(f"keep {kind}")

    def _get_each(self, digests: Sequence[list[str]], recipe: Any) -> list[Value]:
        found = [self._find(each, recipe) for each in digests]
        values = [None if item is None else self._value(item) for item in found]
        tensors = [value for value in values if isinstance(value, LazyTensors)]
        in_parallel(lambda each: len(unread(each)), tensors)
        return values

    def _find(self, digests: list[str], recipe: Any) -> Item | None:
        name, repository = _item_name(digests, recipe), self._library.repository
        return repository.item(name) if name in repository else None

    def _value(self, item: Item) -> Value:
        if TENSORS_FILE in item.files:
            return self._library.tensors_of(item, TENSORS_FILE)
        if JSON_FILE not in item.files:
            return plain(item.info["value"])
        return json.loads(self._library.repository.read(item.name, JSON_FILE))


def digests_of(experts: Experts) -> list[str]:
    """Digests of experts, sorted, each as often as it was given; an error for a name."""
    if isinstance(experts, (Expert, str)):
        experts = [experts]
    digests = []
    for expert in experts:
        if isinstance(expert, Expert):
            if expert.expert_weights is None:
                raise UnsupportedAdapterError(
                    f"expert {expert.name!r} has no weights yet to compute from"
                )
            digests.append(expert.digest)
        elif expert == _NOTHING:
            raise ValueError(f"{expert!r} is the digest of an expert without weights")
        elif _DIGEST.fullmatch(expert):
            digests.append(expert)
        else:
            raise ValueError(
                f"{expert!r} is not the digest of an expert; give an Expert, or "
                f"library.digest({expert!r})"
            )
    return sorted(digests)


def _entry(name: str, item: Item) -> Artifact:
    experts, recipe = item.info.get("experts"), item.info.get("recipe")
    if not isinstance(experts, list) or recipe is None:
        raise Corrupt(f"info of artifact {name!r} cannot be read: {dict(item.info)!r}")
    return Artifact(name, tuple(experts), plain(recipe), item.size)


def _item_name(digests: list[str], recipe: Any) -> str:
    # 160 bits of each digest: short enough for every file system, too many to meet twice.
    return f"{PREFIX}{recipe_digest(digests)[:40]}/{recipe_digest(recipe)[:40]}"


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
