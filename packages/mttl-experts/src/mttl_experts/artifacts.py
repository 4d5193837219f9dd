"""What was computed from experts, kept beside them: prototypes, spectral forms, merges, tables.

An artifact is keyed by the content it came from and by how it was made, never by a name. So a
replaced expert does not meet what was computed from its predecessor, and a recipe that was run once
need not be run again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mttl_experts.errors import UnsupportedAdapterError
from mttl_experts.expert import Expert
from mttl_experts.plain import canonical_json, plain, recipe_digest
from mttl_experts.tensors import to_safetensors
from mttl_storage import Conflict, Corrupt, Denied, Item, ReadOnly, StorageFull
from mttl_storage.items import content_digest

if TYPE_CHECKING:
    from mttl_experts.reading import LibraryReader

Experts = Expert | str | Iterable[Expert | str]
Value = Any  # tensors by name, or plain data
PREFIX = "artifacts/"
TENSORS_FILE = "data.safetensors"
JSON_FILE = "data.json"
# Plain data up to this many bytes lies in the log, so that a table of scores is one read.
INLINE = 4096
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

    def __init__(self, library: LibraryReader) -> None:
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
        digests = digests_of(experts)
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

    def for_each(self, recipe: Any) -> dict[str, Value]:
        """What each expert of the library has under one recipe, by expert name; others left out."""
        found = {}
        for name, expert in self._library.items():
            value = None if expert.expert_weights is None else self.get(expert, recipe)
            if value is not None:
                found[name] = value
        return found

    def entries(self) -> list[Artifact]:
        """All artifacts of the repository, also those of experts that are gone, in one order."""
        found = self._library.repository.items(PREFIX)
        return [_entry(name, item) for name, item in found.items()]

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
