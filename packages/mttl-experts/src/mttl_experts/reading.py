"""Reading a library: names, facts and experts of one generation of its repository."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Self

from torch import Tensor

from mttl_experts.errors import expert_not_found
from mttl_experts.expert import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Expert,
    ExpertInfo,
    stored_expert,
    stored_info,
)
from mttl_experts.selection import EXPERTS, Selection
from mttl_experts.tensors import LazyTensors, from_safetensors
from mttl_storage import (
    Batch,
    Commit,
    Corrupt,
    Item,
    NotFound,
    Problem,
    Repository,
    StorageError,
    in_parallel,
)


class LibraryReader:
    """What can be asked of a library. Names are always sorted, whatever order they came in.

    It reads one generation of its storage; ``refresh`` takes in what others committed since.
    """

    def __init__(self, repository: Repository, selection: Selection, read_only: bool) -> None:
        """Show a part of a repository.

        Raises:
            ExpertNotFoundError: when a selected or excluded name is not there.
        """
        self._repository = repository
        self._selection = selection
        self._read_only = read_only
        self._batch: Batch | None = None
        there = self._all_names()
        for name in sorted(selection.named.difference(there)):
            raise expert_not_found(self.uri, name, there)

    @property
    def repository(self) -> Repository:
        """The storage below, with its history, verification and garbage collection."""
        return self._repository

    @property
    def uri(self) -> str:
        """Its address, without credentials."""
        return self._repository.uri

    @property
    def generation(self) -> int:
        """Number of the commit that it shows."""
        return self._repository.generation

    def refresh(self) -> Self:
        """Take in what others committed meanwhile; gives back the library itself."""
        self._repository.refresh()
        return self

    def history(self) -> list[Commit]:
        """All commits that led to what it shows, oldest first."""
        return self._repository.history()

    def keys(self) -> list[str]:
        """Names of its experts, sorted."""
        return list(self._items())

    def __iter__(self) -> Iterator[str]:
        """Names of its experts, sorted."""
        return iter(self.keys())

    def __len__(self) -> int:
        """How many experts it shows."""
        return len(self._items())

    def __contains__(self, name: object) -> bool:
        """Whether it shows an expert of exactly this name."""
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> Expert:
        """The same as ``get_expert``."""
        return self.get_expert(name)

    def get_expert(self, name: str) -> Expert:
        """One expert. Its weights are read, verified and memory-mapped when first used.

        They stay the weights of this generation, also if the expert is replaced meanwhile.

        Raises:
            ExpertNotFoundError: naming the nearest that there are.
        """
        return self._expert(name, self._item(name))

    def items(self) -> Iterator[tuple[str, Expert]]:
        """Name and expert, by name; the weights are read when first used."""
        for name, item in self._items().items():
            yield name, self._expert(name, item)

    def values(self) -> Iterator[Expert]:
        """The experts, by name."""
        for _, expert in self.items():
            yield expert

    def load(self, names: Iterable[str] | None = None) -> dict[str, Expert]:
        """Experts by name with their weights at hand: read, verified and mapped together.

        Args:
            names: of the experts; all that it shows by default.
        """
        shown = dict(self.items()) if names is None else {n: self[n] for n in sorted(set(names))}
        if self._repository.store.scheme != "virtual":  # whose files are in memory already
            kept = [EXPERTS + n for n, expert in shown.items() if expert.expert_weights is not None]
            in_parallel(lambda name: self._repository.path(name, WEIGHTS_FILE), kept)
        for expert in shown.values():  # one after the other: Python's part of it gains no threads
            len(expert.expert_weights or ())
        return shown

    def infos(self) -> dict[str, ExpertInfo]:
        """Facts of every expert, by name, from the log alone: no weights are read."""
        return {name: self.stored_info(name, item) for name, item in self._items().items()}

    @property
    def unmerged(self) -> list[str]:
        """Names of its experts that are not merges of others, sorted."""
        return [name for name, info in self.infos().items() if not info.is_merge]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks that experts were trained on, sorted."""
        return tuple(sorted({task for info in self.infos().values() for task in info.tasks}))

    def get_experts_for_task(self, task: str) -> list[Expert]:
        """Experts trained on a task of exactly this name, by name; there may be none."""
        return [expert for expert in self.values() if task in expert.expert_info.tasks]

    def made_by(self, recipe_digest: str) -> Expert | None:
        """The expert that a recipe made, among all of the library, shown or not; None without one.

        The first by name, where several are the same.
        """
        for item, found in self._repository.items(EXPERTS).items():
            if found.info.get("recipe_digest") == recipe_digest and WEIGHTS_FILE in found.files:
                return self._expert(item.removeprefix(EXPERTS), found)
        return None

    def digest(self, name: str) -> str:
        """Digest of an expert's weights and config, which is ``get_expert(name).digest``."""
        return self._item(name).digest

    def path(self, name: str) -> Path:
        """Folder on this machine with ``adapter_config.json`` and ``adapter_model.safetensors``.

        ``PeftModel.from_pretrained(base, library.path(name))`` loads it. Do not write to it.
        """
        if WEIGHTS_FILE not in self._item(name).files:
            raise ValueError(
                f"expert {name!r} in {self.uri} has no weights yet, so there is no folder to load; "
                "add them with replace_expert"
            )
        return self._repository.path(EXPERTS + name)

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> list[Problem]:
        """What is wrong: with any byte that the repository keeps, or with an expert shown here.

        Args:
            progress: called with files done, files in all, and a name.
        """
        problems = self._repository.verify(progress)
        damaged = {problem.where for problem in problems}
        for name, item in self._items().items():
            if item.name not in damaged:
                problems += [Problem(item.name, what) for what in self._faults(name, item)]
        return problems

    def __repr__(self) -> str:
        """Address, number of experts and generation."""
        return (
            f"{type(self).__name__}({self.uri!r}, {len(self)} experts, "
            f"generation {self.generation})"
        )

    # Used by artifacts and lineage

    def writer(self) -> Repository | Batch:
        """Where a change goes: the open batch, or a commit of its own."""
        return self._batch or self._repository

    def tensors_of(self, item: Item, file: str) -> LazyTensors:
        """Tensors of an item's file as it is now, also if it is changed before they are read."""
        repository = self._repository

        def read(source: Repository) -> dict[str, Tensor]:
            if source.store.scheme == "virtual":  # stays off the disk
                return from_safetensors(source.read(item.name, file))
            return from_safetensors(source.path(item.name, file))

        def fetch() -> dict[str, Tensor]:
            try:
                tensors = read(repository)
                if repository.item(item.name).digest == item.digest:
                    return tensors
            except NotFound:
                pass  # removed or renamed; its own generation has it
            return read(repository.at(item.generation))

        return LazyTensors(fetch)

    def stored_info(self, name: str, item: Item) -> ExpertInfo:
        """Facts of an expert as an item of any generation has them; Corrupt if they are none."""
        try:
            return stored_info({**item.info, "expert_name": name})
        except (TypeError, ValueError) as error:
            raise Corrupt(
                f"info of expert {name!r} in {self.uri} cannot be read: {error}"
            ) from error

    # Inside

    def _all_names(self) -> list[str]:
        return [name.removeprefix(EXPERTS) for name in self._repository if name.startswith(EXPERTS)]

    def _items(self) -> dict[str, Item]:
        """What is shown, by name, sorted."""
        found = self._repository.items(EXPERTS)
        shown = {name.removeprefix(EXPERTS): item for name, item in found.items()}
        return {name: item for name, item in shown.items() if self._selection.shows(name, item)}

    def _find(self, name: str) -> Item | None:
        if EXPERTS + name not in self._repository:
            return None
        item = self._repository.item(EXPERTS + name)
        return item if self._selection.shows(name, item) else None

    def _item(self, name: str) -> Item:
        item = self._find(name)
        if item is None:
            raise expert_not_found(self.uri, name, self.keys())
        return item

    def _faults(self, name: str, item: Item) -> Iterator[str]:
        """What is wrong with an expert whose bytes are as they were written."""
        missing = {CONFIG_FILE, WEIGHTS_FILE} - item.files.keys()
        if item.files and missing:
            yield f"it has no {min(missing)!r}, so it is no PEFT folder; replace the expert"
        try:
            expert = self._expert(name, item)
            if CONFIG_FILE in item.files:
                json.loads(self._repository.read(item.name, CONFIG_FILE))
            dict(expert.expert_weights or {})
        except (StorageError, ValueError) as error:
            yield str(error)

    def _expert(self, name: str, item: Item) -> Expert:
        weights = self.tensors_of(item, WEIGHTS_FILE) if WEIGHTS_FILE in item.files else None
        return stored_expert(self.stored_info(name, item), weights, item.digest)
