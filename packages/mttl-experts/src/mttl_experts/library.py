"""The library of experts: what it holds, by name, in one order, on any kind of storage.

Bytes, commits and their safety are ``mttl_storage``'s. Here an item's info in the log is an
``ExpertInfo``, and its files are a PEFT folder. ``reading`` and ``changing`` have what one library
does; here are its addresses, and what goes from one library to another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar, Self

from mttl_experts.card import card, pages, write_card
from mttl_experts.changing import LibraryWriter
from mttl_experts.collecting import GRACE, collect
from mttl_experts.difference import ExpertDifference, difference
from mttl_experts.expert import Expert
from mttl_experts.lineage import Lineage, Recipe, lineage, recipe_of
from mttl_experts.logs import Blame, Event, blame, log
from mttl_experts.scores import Score
from mttl_experts.selection import EXPERTS, Selection
from mttl_experts.updating import take_in
from mttl_storage import Collected, InvalidName, NotFound, Repository, parse_uri
from mttl_storage import copy as copy_items


class ExpertLibrary(LibraryWriter):
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
            repo_id: address such as ``local://folder``, ``virtual://name``,
                ``az://account/container/path`` or ``hf://user/repo``; without a scheme it belongs
                to the class's own storage, a local folder here.
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
        chosen = Selection.of(model_name, selection, exclude_selection)
        repository = Repository.open(
            str(parse_uri(repo_id, self.default_scheme)),
            token=token,
            create=create,
            read_only=bool(read_only),
            pages=pages,
        )
        super().__init__(repository, chosen, chosen.is_part if read_only is None else read_only)

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
        *,
        read_only: bool | None = None,
    ) -> ExpertLibrary:
        """Open a library as the constructor does; with ``destination_id``, copy it there.

        Where there is no library but plain PEFT adapters, those are shown as they lie, read-only.

        Returns:
            The library, or the copy: all of the destination, open for changes.
        """
        try:
            library = cls(
                repo_id,
                token,
                model_name,
                selection,
                exclude_selection,
                create,
                read_only=read_only,
            )
        except NotFound:
            from mttl_experts.interop.plain_library import PlainExpertLibrary

            library = PlainExpertLibrary(
                repo_id,
                token,
                model_name,
                selection,
                exclude_selection,
                default_scheme=cls.default_scheme,
            )
        if destination_id is None:
            return library
        same = parse_uri(destination_id).scheme == parse_uri(repo_id, cls.default_scheme).scheme
        return library.copy_to(destination_id, token if same else None)

    def copy_to(self, destination_id: str, token: str | None = None) -> ExpertLibrary:
        """Copy what it shows, with artifacts and scores, to another address; again, what changed.

        Returns:
            The library there, open for changes.
        """
        target = ExpertLibrary(destination_id, token, create=True)
        if target.uri == self.uri:
            raise InvalidName(f"{self.uri} cannot be copied to itself; give another destination")
        names = None
        if self._selection.is_part:
            digests = {item.digest for item in self._items().values()}
            names = [EXPERTS + name for name in self]
            names += [e.item for e in self.artifacts.entries() if digests.issuperset(e.experts)]
        copy_items(self._repository, target.repository, names=names)
        return target.refresh()

    def update_from(
        self,
        other: ExpertLibrary | str,
        *,
        replace: bool = False,
        strict: bool = False,
        token: str | None = None,
    ) -> list[str]:
        """Take in what another library has and this one has not, with artifacts and scores.

        An expert that is here as the other library once had it is brought forward. Facts of equal
        weights are taken where they are newer there. What was removed here stays removed.

        Args:
            other: a library, of which what it shows is taken, or an address.
            replace: put theirs also in the place of experts that differ here.
            strict: as for ``add_expert``; nothing is taken then.
            token: credentials of the address.

        Returns:
            Names of the experts that are new or changed, sorted.

        Raises:
            ExpertExistsError: naming experts that differ here; nothing is taken then.
        """
        self._expert_writer()
        if self.in_batch:
            raise RuntimeError(f"a batch is open on {self.uri}; update_from makes its own commits")
        source = ExpertLibrary(other, token, read_only=True) if isinstance(other, str) else other
        return take_in(source, self, replace, strict)

    # Past and lineage, from the log alone

    def at(self, generation: int) -> Self:
        """The library as it was at a generation, to be read."""
        past = self._repository.at(generation)
        there = {name.removeprefix(EXPERTS) for name in past}
        chosen = dataclasses.replace(
            self._selection,
            names=self._selection.names and self._selection.names & there,
            excluded=self._selection.excluded and self._selection.excluded & there,
        )
        view = object.__new__(type(self))
        LibraryWriter.__init__(view, past, chosen, read_only=True)
        return view

    def log(self, name: str, facts: bool = False) -> list[Event]:
        """Changes of one expert through all its names, newest first; of a removed one too.

        Args:
            name: as it is called now, or was last.
            facts: say which facts each change changed.
        """
        return log(self, name, facts)

    def lineage(self, name: str) -> Lineage:
        """The graph data -> expert -> merge -> model around one expert, in both directions."""
        return lineage(self, name)

    def recipe(self, name: str) -> Recipe:
        """What decides what an expert is: config, data, base, parents, tools."""
        return recipe_of(self.stored_info(name, self._item(name)))

    def diff(self, one: str | Expert, other: str | Expert) -> ExpertDifference:
        """What differs between two experts: facts, and each module's distance and angles of ΔW.

        Args:
            one: name, or an expert at hand, such as ``library.at(3)["e1"]``.
            other: likewise.
        """
        return difference(*(self[e] if isinstance(e, str) else e for e in (one, other)))

    def blame(self, score: Score | str) -> Blame:
        """Where a score came from: its commit, and the experts as they stand now.

        Args:
            score: one of ``library.scores.table()``, or the first digits of its digest.
        """
        return blame(self, score)

    # Upkeep

    def gc(self, grace: float = GRACE) -> Collected:
        """Delete what nothing has needed for ``grace`` seconds, which is gone for good.

        That is the files of experts removed or replaced, and artifacts and scores made from such.

        Args:
            grace: seconds for which readers of older generations and writers in flight are safe;
                pass less only where there are none.
        """
        self._expert_writer()
        return collect(self._repository, grace)

    def card(self) -> str:
        """A README for the library, with the front matter that the hub reads."""
        return card(self)

    def write_card(self) -> str:
        """Put the card into the library as README.md; gives back its text.

        On the hub every change brings it along, so there it is only needed for what others changed.

        What was written below the card's last line by hand is kept.

        Raises:
            CardError: when there is a README.md that no card began.
        """
        self._expert_writer()
        return write_card(self)


class LocalExpertLibrary(ExpertLibrary):
    """Experts in a local folder: an id without a scheme is its path."""

    default_scheme = "local"


class VirtualLocalLibrary(ExpertLibrary):
    """Experts in this process's memory: an id without a scheme is its name."""

    default_scheme = "virtual"


class BlobExpertLibrary(ExpertLibrary):
    """Experts in Azure Blob Storage: an id without a scheme is ``account/container/path``."""

    default_scheme = "az"


class HFExpertLibrary(ExpertLibrary):
    """Experts on the Hugging Face Hub: an id without a scheme is ``user/repo``."""

    default_scheme = "hf"
