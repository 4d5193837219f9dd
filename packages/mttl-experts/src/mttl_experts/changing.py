"""Changing a library: each change is one commit, and a batch makes one of many."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

from mttl_experts.artifacts import Artifacts
from mttl_experts.bases import KnownBases
from mttl_experts.collecting import made_from_gone, remove_for_good
from mttl_experts.compatible import check_targets, check_weights
from mttl_experts.errors import ExpertExistsError, IncompatibleExpertError, expert_not_found
from mttl_experts.expert import Expert, ExpertInfo
from mttl_experts.reading import LibraryReader
from mttl_experts.scores import Scores
from mttl_experts.search import Search
from mttl_experts.selection import EXPERTS, Selection, check_expert_name
from mttl_storage import Batch, Conflict, Item, ReadOnly, Repository

# What update_info may change. The rest says how the weights came to be, and changes with them.
MUTABLE = ("expert_task_name", "extra", "licence", "metrics", "tags")


class LibraryWriter(LibraryReader):
    """A library that takes, replaces, renames and gives up experts."""

    def __init__(self, repository: Repository, selection: Selection, read_only: bool) -> None:
        """Show a part of a repository, to be changed unless it is only read."""
        super().__init__(repository, selection, read_only)
        # Facts as the open batch will leave them, by name; None for what it removes.
        self._staged: dict[str, ExpertInfo | None] = {}
        self._bases: tuple[int, KnownBases] | None = None  # with the generation
        self.artifacts = Artifacts(self)
        self.scores = Scores(self.artifacts)
        self.search = Search(self)

    def add_expert(self, expert: Expert, *, strict: bool = False) -> str:
        """Add an expert under its own name; one that is there already, in every part, is left.

        A library may hold experts for several bases. One for a base that others name too, of other
        weights (its fingerprint), tokenizer or template than all of these, is a warning.

        Args:
            expert: the new one.
            strict: refuse it where there would be a warning.

        Returns:
            Its digest.

        Raises:
            ExpertExistsError: when there is another of that name.
            IncompatibleExpertError: when it cannot work: it would attach to nothing, its weights do
                not fit its config, or it is for another base than those shown; also, naming two
                experts and both digests, where it would warn and is strict.
        """
        writer = self._expert_writer()
        name = check_expert_name(expert.name)
        self._check(expert, strict)
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

    def replace_expert(
        self, expert: Expert, expected: str | None = None, *, strict: bool = False
    ) -> str:
        """Put an expert, facts and weights, in the place of the one of its name.

        Args:
            expert: the new one.
            expected: digest that the old one must have.
            strict: as for ``add_expert``.

        Returns:
            Its digest.

        Raises:
            ExpertNotFoundError: when there is none of that name.
            Conflict: when the old one is another, or another writer changed it since the generation
                that this library shows.
        """
        writer = self._expert_writer()
        self._facts(expert.name)
        self._check(expert, strict)
        replaced = writer.replace(
            EXPERTS + expert.name, expert.files(), expert.expert_info.to_dict(), expected
        )
        return self._changed(replaced, expert)

    def remove_expert(self, name: str, hard: bool = False) -> None:
        """Take an expert out. Its files stay, and ``restore_expert`` brings it back.

        Args:
            name: of the expert. Artifacts and scores made from it are found again when it is back.
            hard: for good: it cannot be restored, artifacts and scores made from it go with it, and
                the next ``gc`` deletes the files once its grace is over.
        """
        writer = self._expert_writer()
        self._facts(name)
        there = self._find(name)
        if not hard or there is None:
            writer.remove(EXPERTS + name)
        else:
            with self._one_commit(f"remove expert {name} for good") as batch:
                gone = [there, *made_from_gone(self._repository, without=there.name)]
                for item in gone:
                    remove_for_good(batch, item)
        self._stage(name, None)

    def restore_expert(self, name: str) -> None:
        """Bring back an expert that was removed; nothing to do if it is there.

        Raises:
            ExpertNotFoundError: when none of that name was removed, or it was for good.
        """
        writer = self._expert_writer()
        removed = self._repository.removed(EXPERTS)
        if EXPERTS + name not in removed and EXPERTS + name not in self._repository:
            names = [found.removeprefix(EXPERTS) for found in removed]
            raise expert_not_found(f"what was removed from {self.uri}", name, names)
        writer.restore(EXPERTS + name)

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
        with self._one_commit(f"rename expert {old} to {new}") as batch:
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

    def tag(self, name: str, *tags: str) -> ExpertInfo:
        """Add tags to an expert's own; gives back all its facts."""
        own = self._facts(name).tags
        return self.update_info(name, tags=tuple(dict.fromkeys([*own, *tags])))

    def untag(self, name: str, *tags: str) -> ExpertInfo:
        """Take tags off an expert; those that it does not have make no difference."""
        own = self._facts(name).tags
        return self.update_info(name, tags=tuple(tag for tag in own if tag not in tags))

    @property
    def in_batch(self) -> bool:
        """Whether changes go to an open batch."""
        return self._batch is not None

    @contextmanager
    def batch(self, message: str = "") -> Iterator[Self]:
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
                self._bases = None

    def _facts(self, name: str) -> ExpertInfo:
        """Facts as they are, or as the open batch will leave them."""
        staged = self._staged.get(name)
        if staged is not None:
            return staged
        if name in self._staged:
            raise expert_not_found(f"{self.uri}, the open batch having removed it,", name, [])
        return self.stored_info(name, self._item(name))

    def _one_commit(self, message: str) -> AbstractContextManager[Batch]:
        """The open batch, or one for what comes."""
        return self._repository.batch(message) if self._batch is None else nullcontext(self._batch)

    def _check(self, expert: Expert, strict: bool) -> None:
        shown, made_for = self._selection.model_name, expert.expert_info.expert_model
        if shown is not None and made_for != shown:
            raise IncompatibleExpertError(
                f"expert {expert.name!r} was made for base model {made_for!r}, and {self.uri} was "
                f"opened with model_name={shown!r}; open it without to add this one"
            )
        check_targets(expert.expert_info)
        check_weights(expert)
        self._known_bases().check(expert.expert_info, self.uri, strict=strict)

    def _known_bases(self) -> KnownBases:
        """What all experts say of their bases, as the open batch will leave it."""
        if self._bases is None or self._bases[0] != self.generation:
            items = self._repository.items(EXPERTS)
            facts = ((name.removeprefix(EXPERTS), item.info) for name, item in items.items())
            self._bases = (self.generation, KnownBases(facts))
            for name, info in self._staged.items():
                self._bases[1].put(name, None if info is None else info.to_dict())
        return self._bases[1]

    def _stage(self, name: str, info: ExpertInfo | None) -> None:
        if self._batch is not None:
            self._staged[name] = info
            if self._bases is not None:
                self._bases[1].put(name, None if info is None else info.to_dict())

    def _changed(self, outcome: Item | None, expert: Expert) -> str:
        """The digest, whether a commit or an open batch took the change."""
        self._stage(expert.name, expert.expert_info)
        return expert.digest if outcome is None else outcome.digest

    def _expert_writer(self) -> Repository | Batch:
        if self._read_only:
            what = "a part of a library" if self._selection.is_part else "a library"
            raise ReadOnly(
                f"{self.uri} was opened as {what} that is only read; open it with read_only=False "
                "to change it"
            )
        return self.writer()


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
