"""The library of experts: what it holds, by name, in one order, on any kind of storage.

Bytes, commits and their safety are ``mttl_storage``'s. Here an item's info in the log is an
``ExpertInfo``, and its files are a PEFT folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from mttl_experts.artifacts import Artifacts
from mttl_experts.compatible import check_targets
from mttl_experts.errors import ExpertExistsError, expert_not_found
from mttl_experts.expert import CONFIG_FILE, WEIGHTS_FILE, Expert, ExpertInfo, stored_expert
from mttl_experts.scores import Scores
from mttl_experts.tensors import LazyTensors, from_safetensors
from mttl_storage import (
    Batch,
    Conflict,
    Corrupt,
    InvalidName,
    Item,
    NotFound,
    Problem,
    ReadOnly,
    Repository,
    StorageError,
    check_name,
    parse_uri,
)
from mttl_storage import copy as copy_items

EXPERTS = "experts/"
# What update_info may change. The rest says how the weights came to be, and changes with them.
MUTABLE = ("expert_task_name", "extra", "licence", "metrics", "tags")


class ExpertLibrary:
    """Experts by name. Names are always in sorted order, whatever order they came in.

    A library reads one generation of its storage, the newest when it was opened. Its own changes
    move it on; ``refresh`` takes in those of others. Each change is one commit; ``batch`` makes one
    of many.
    """

    default_scheme: ClassVar[str] = "local"

    def __init__(
        self,
        repo_id: str,
        token: str | None = None,
        model_name: str | None = None,
        selection: str | Iterable[str] | None = None,
        exclude_selection: str | Iterable[str] | None = None,
        create: bool = False,
        *,
        read_only: bool | None = None,
    ) -> None:
        """Open a library, or part of it.

        Args:
            repo_id: address such as ``local://folder`` or ``virtual://name``; without a scheme it
                is a local folder.
            token: credentials of the storage, where it needs any.
            model_name: show only experts made for this base model.
            selection: show only these, a list or a comma string of exact names.
            exclude_selection: leave these out.
            create: make the library if there is none; one that is there is kept as it is.
            read_only: refuse changes. If not given, a library that shows a part refuses changes of
                experts; artifacts and scores are still kept.

        Raises:
            NotFound: when there is no library there and ``create`` is not set.
            ExpertNotFoundError: when a selected or excluded name is not there.
        """
        address = parse_uri(repo_id, self.default_scheme)
        self._model_name = model_name
        self._selection = _names(selection)
        self._exclude = _names(exclude_selection)
        self._read_only = self._is_filtered if read_only is None else read_only
        self._repository = Repository.open(
            str(address), token=token, create=create, read_only=bool(read_only)
        )
        self._batch: Batch | None = None
        # Facts as the open batch will leave them, by name; None for what it removes.
        self._staged: dict[str, ExpertInfo | None] = {}
        self.artifacts = Artifacts(self)
        self.scores = Scores(self.artifacts)
        there = self._all_names()
        for name in sorted({*(self._selection or ()), *(self._exclude or ())}.difference(there)):
            raise expert_not_found(self.uri, name, there)

    @classmethod
    def get_expert_library(
        cls,
        repo_id: str,
        token: str | None = None,
        model_name: str | None = None,
        selection: str | Iterable[str] | None = None,
        exclude_selection: str | Iterable[str] | None = None,
        create: bool = False,
        destination_id: str | None = None,
    ) -> ExpertLibrary:
        """Open a library as the constructor does; with ``destination_id``, copy it there.

        Returns:
            The library, or the copy: all of the destination, open for changes.
        """
        library = cls(repo_id, token, model_name, selection, exclude_selection, create)
        if destination_id is None:
            return library
        same = parse_uri(destination_id).scheme == parse_uri(repo_id, cls.default_scheme).scheme
        return library.copy_to(destination_id, token if same else None)

    # Reading

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

    def refresh(self) -> ExpertLibrary:
        """Take in what others committed meanwhile; gives back the library itself."""
        self._repository.refresh()
        return self

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

    def infos(self) -> dict[str, ExpertInfo]:
        """Facts of every expert, by name, from the log alone: no weights are read."""
        return {name: self._info(name, item) for name, item in self._items().items()}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of all tasks that experts were trained on, sorted."""
        return tuple(sorted({task for info in self.infos().values() for task in info.tasks}))

    def get_experts_for_task(self, task: str) -> list[Expert]:
        """Experts trained on a task of exactly this name, by name; there may be none."""
        return [expert for expert in self.values() if task in expert.expert_info.tasks]

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

    # Changing

    def add_expert(self, expert: Expert) -> str:
        """Add an expert under its own name; one that is there already, in every part, is left.

        Returns:
            Its digest.

        Raises:
            ExpertExistsError: when there is another of that name.
            IncompatibleExpertError: when its config attaches to nothing.
        """
        writer = self._expert_writer()
        name = check_expert_name(expert.name)
        check_targets(expert.expert_info)
        try:
            added = writer.add(EXPERTS + name, expert.files(), expert.expert_info.to_dict())
        except Conflict as error:
            why = "it has one of that name with other weights, config or facts"
            raise ExpertExistsError(
                f"cannot add expert {name!r} to {self.uri}: "
                f"{why if name in self._all_names() else error}; replace_expert changes one that "
                "is there, or choose another expert_name"
            ) from error
        return self._changed(added, expert)

    def replace_expert(self, expert: Expert, expected: str | None = None) -> str:
        """Put an expert, facts and weights, in the place of the one of its name.

        Args:
            expert: the new one.
            expected: digest that the old one must have.

        Returns:
            Its digest.

        Raises:
            ExpertNotFoundError: when there is none of that name.
            Conflict: when the old one is another, or another writer changed it since the generation
                that this library shows.
        """
        writer = self._expert_writer()
        self._facts(expert.name)
        check_targets(expert.expert_info)
        replaced = writer.replace(
            EXPERTS + expert.name, expert.files(), expert.expert_info.to_dict(), expected
        )
        return self._changed(replaced, expert)

    def remove_expert(self, name: str) -> None:
        """Take an expert out. Its files stay, and ``restore_expert`` brings it back."""
        writer = self._expert_writer()
        self._facts(name)
        writer.remove(EXPERTS + name)
        self._stage(name, None)

    def restore_expert(self, name: str) -> None:
        """Bring back an expert that was removed; nothing to do if it is there."""
        try:
            self._expert_writer().restore(EXPERTS + name)
        except NotFound as error:
            removed = [found.removeprefix(EXPERTS) for found in self._repository.removed(EXPERTS)]
            raise expert_not_found(f"what was removed from {self.uri}", name, removed) from error

    def rename_expert(self, old: str, new: str) -> None:
        """Give an expert another name. Its files, artifacts and scores stay as they are.

        Raises:
            ExpertExistsError: when there is one of the new name.
        """
        self._expert_writer()
        info = dataclasses.replace(self._facts(old), expert_name=check_expert_name(new))
        taken = self._staged.get(new, EXPERTS + new in self._repository)
        if taken and new != old:
            raise ExpertExistsError(
                f"cannot rename expert {old!r} to {new!r}: {self.uri} has one of that name; "
                "choose another"
            )
        with (
            nullcontext(self._batch)
            if self._batch is not None
            else self._repository.batch(f"rename expert {old} to {new}")
        ) as batch:
            batch.rename(EXPERTS + old, EXPERTS + new)
            batch.update_info(EXPERTS + new, info.to_dict())
        self._stage(old, None)
        self._stage(new, info)

    def update_info(self, name: str, **changes: Any) -> ExpertInfo:
        """Change facts that may change: task name, tags, metrics, licence, extra.

        Returns:
            All facts, as they are now.

        Raises:
            Conflict: when another writer changed them since the generation that this library shows.
        """
        for field in changes:
            if field not in MUTABLE:
                raise ValueError(_not_mutable(field))
        writer = self._expert_writer()
        info = dataclasses.replace(self._facts(name), **changes)
        writer.update_info(EXPERTS + name, info.to_dict())
        self._stage(name, info)
        return info

    def update_metrics(self, name: str, metrics: Mapping[str, Any]) -> ExpertInfo:
        """Add measured numbers to an expert's own, those of the same name being replaced."""
        return self.update_info(name, metrics={**self._facts(name).metrics, **metrics})

    @contextmanager
    def batch(self, message: str = "") -> Iterator[ExpertLibrary]:
        """Make one commit of all changes in the block; none at all if the block raises.

        Inside the block the library still shows what was there before, and a name that is taken is
        found out at the end.

        Args:
            message: kept in the history.
        """
        if self._batch is not None:
            raise RuntimeError(f"a batch is open on {self.uri} already; they do not nest")
        with self._repository.batch(message) as batch:
            self._batch = batch
            try:
                yield self
            finally:
                self._batch = None
                self._staged.clear()

    def copy_to(self, destination_id: str, token: str | None = None) -> ExpertLibrary:
        """Copy what it shows, with artifacts and scores, to another address; again, what changed.

        Returns:
            The library there, open for changes.
        """
        target = ExpertLibrary(destination_id, token, create=True)
        if target.uri == self.uri:
            raise InvalidName(f"{self.uri} cannot be copied to itself; give another destination")
        names = None
        if self._is_filtered:
            digests = {item.digest for item in self._items().values()}
            names = [EXPERTS + name for name in self]
            names += [e.item for e in self.artifacts.entries() if digests.issuperset(e.experts)]
        copy_items(self._repository, target.repository, names=names)
        return target.refresh()

    def __repr__(self) -> str:
        """Address, number of experts and generation."""
        return (
            f"{type(self).__name__}({self.uri!r}, {len(self)} experts, "
            f"generation {self.generation})"
        )

    # Used by artifacts

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

    # Inside

    @property
    def _is_filtered(self) -> bool:
        return any(part is not None for part in (self._model_name, self._selection, self._exclude))

    def _all_names(self) -> list[str]:
        return [name.removeprefix(EXPERTS) for name in self._repository if name.startswith(EXPERTS)]

    def _items(self) -> dict[str, Item]:
        """What is shown, by name, sorted."""
        found = self._repository.items(EXPERTS)
        shown = {name.removeprefix(EXPERTS): item for name, item in found.items()}
        return {name: item for name, item in shown.items() if self._shows(name, item)}

    def _shows(self, name: str, item: Item) -> bool:
        return (
            (self._selection is None or name in self._selection)
            and (self._exclude is None or name not in self._exclude)
            and (self._model_name is None or item.info.get("expert_model") == self._model_name)
        )

    def _find(self, name: str) -> Item | None:
        if EXPERTS + name not in self._repository:
            return None
        item = self._repository.item(EXPERTS + name)
        return item if self._shows(name, item) else None

    def _item(self, name: str) -> Item:
        item = self._find(name)
        if item is None:
            raise expert_not_found(self.uri, name, self.keys())
        return item

    def _facts(self, name: str) -> ExpertInfo:
        """Facts as they are, or as the open batch will leave them."""
        staged = self._staged.get(name)
        if staged is not None:
            return staged
        if name in self._staged:
            raise expert_not_found(f"{self.uri}, the open batch having removed it,", name, [])
        return self._info(name, self._item(name))

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

    def _stage(self, name: str, info: ExpertInfo | None) -> None:
        if self._batch is not None:
            self._staged[name] = info

    def _changed(self, outcome: Item | None, expert: Expert) -> str:
        """The digest, whether a commit or an open batch took the change."""
        self._stage(expert.name, expert.expert_info)
        return expert.digest if outcome is None else outcome.digest

    def _info(self, name: str, item: Item) -> ExpertInfo:
        try:
            return ExpertInfo.from_dict({**item.info, "expert_name": name})
        except (TypeError, ValueError) as error:
            raise Corrupt(
                f"info of expert {name!r} in {self.uri} cannot be read: {error}"
            ) from error

    def _expert(self, name: str, item: Item) -> Expert:
        weights = self.tensors_of(item, WEIGHTS_FILE) if WEIGHTS_FILE in item.files else None
        return stored_expert(self._info(name, item), weights, item.digest)

    def _expert_writer(self) -> Repository | Batch:
        if self._read_only:
            what = "a part of a library" if self._is_filtered else "a library"
            raise ReadOnly(
                f"{self.uri} was opened as {what} that is only read; open it with read_only=False "
                "to change it"
            )
        return self.writer()


class LocalExpertLibrary(ExpertLibrary):
    """Experts in a local folder: an id without a scheme is its path."""

    default_scheme = "local"


class VirtualLocalLibrary(ExpertLibrary):
    """Experts in this process's memory: an id without a scheme is its name."""

    default_scheme = "virtual"


def _names(selection: str | Iterable[str] | None) -> frozenset[str] | None:
    if selection is None:
        return None
    if isinstance(selection, str):
        return frozenset(part.strip() for part in selection.split(",") if part.strip())
    return frozenset(selection)


def check_expert_name(name: str) -> str:
    """The name itself, if an expert can have it in a library on any backend.

    Raises:
        InvalidName: saying what is wrong with it.
    """
    for sign in "/,":
        if sign in name:
            raise InvalidName(
                f"expert name {name!r} has a {sign!r} in it, which parts names in addresses and "
                "selections; choose another, such as " + repr(name.replace(sign, "_"))
            )
    check_name(EXPERTS + name)
    return name


def _not_mutable(field: str) -> str:
    if field == "expert_name":
        return "expert_name is changed by rename_expert, not by update_info"
    if field in {f.name for f in dataclasses.fields(ExpertInfo)}:
        return (
            f"{field} says how the weights came to be, so it changes only with them: use "
            f"replace_expert; update_info changes {', '.join(MUTABLE)}"
        )
    near = difflib.get_close_matches(field, MUTABLE, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"update_info changes {', '.join(MUTABLE)}"
    return f"an expert has no field {field!r}; {hint}"
