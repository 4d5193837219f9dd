"""Bringing found experts into a library: first a plan, then commits; again, nothing."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mttl_experts.errors import ExpertExistsError, expert_not_found
from mttl_experts.expert import Expert
from mttl_experts.interop.folder import open_folder
from mttl_experts.interop.found import Found, FoundExpert
from mttl_experts.interop.older import is_older, older_experts
from mttl_experts.interop.peft import peft_experts
from mttl_experts.library import ExpertLibrary
from mttl_experts.selection import EXPERTS, Selection, check_expert_name
from mttl_storage import InvalidName, NotFound

Progress = Callable[[str, int, int | None], object]
COMMIT_BYTES = 256 << 20
"""About how many bytes of files go into one commit."""


def find_experts(
    source: str, token: str | None = None, exclude: str | Iterable[str] | None = None
) -> Found:
    """What a source holds, without reading any weights.

    Args:
        source: a folder, an address, or a hub id; PEFT adapters in it, or an older library.
        token: credentials of the storage, where it needs any.
        exclude: names of experts that are not even looked at, because they are damaged, say.

    Raises:
        NotFound: when nothing is there, or nothing that is known.
        Corrupt: naming the file that cannot be read.
    """
    folder = open_folder(source, token)
    if folder.library:
        raise InvalidName(
            f"{folder.address} is a library already, not a source to import from; copy it, or open "
            "it as it is"
        )
    excluded = Selection.of(None, None, exclude).excluded or frozenset()
    look = older_experts if is_older(folder) else peft_experts
    found = look(folder, excluded)
    if not found.experts and not found.excluded:
        some = ", ".join(list(folder.sizes)[:5]) or "nothing"
        raise NotFound(
            f"{folder.address} holds no PEFT adapter (adapter_config.json) and no older library "
            f"(.meta and .ckpt files); it has {some}"
        )
    return found


@dataclass
class ImportPlan:
    """What an import would do.

    Attributes:
        add: experts that are not there yet.
        there: names of those that are there already with these weights.
        removed: names of those that the library has removed; they are left as they are.
    """

    add: list[FoundExpert] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def choose(found: Sequence[Found], select: str | Iterable[str] | None = None) -> list[FoundExpert]:
    """The experts of sources, or those of them whose exact names are selected.

    Raises:
        ExpertNotFoundError: for a name that none of them has.
    """
    experts = [expert for one in found for expert in one.experts]
    chosen = Selection.of(None, select, None).names
    names = [expert.name for expert in experts]
    for name in sorted((chosen or frozenset()).difference(names)):
        raise expert_not_found("the sources", name, names)
    return [expert for expert in experts if chosen is None or expert.name in chosen]


def renamed(found: FoundExpert, name: str) -> FoundExpert:
    """The same expert under another name."""

    def read() -> Expert:
        expert = found.read()
        info = dataclasses.replace(expert.expert_info, expert_name=name)
        return dataclasses.replace(expert, expert_info=info)

    return dataclasses.replace(found, name=check_expert_name(name), read=read)


def plan_import(
    library: ExpertLibrary | None,
    experts: Iterable[FoundExpert],
    progress: Progress | None = None,
) -> ImportPlan:
    """What importing these experts would do. Only those whose names are taken are read.

    Args:
        library: to import into; None while there is none yet.
        experts: what was found.
        progress: told what is done, how far it is, and how far it goes.

    Raises:
        InvalidName: when a name cannot be used here, or two sources have the same.
        ExpertExistsError: when the library has another expert of a name.
    """
    wanted = sorted(experts, key=lambda found: found.name)
    for name, count in Counter(found.name for found in wanted).items():
        if count > 1:
            where = " and ".join(found.source for found in wanted if found.name == name)
            raise InvalidName(
                f"{where} each have an expert {name!r}; import one of them by itself under another "
                "name (--name)"
            )
        check_expert_name(name)
    if library is None:
        return ImportPlan(add=wanted)
    plan = ImportPlan()
    gone = library.repository.removed(EXPERTS)
    for done, found in enumerate(wanted):
        if found.name in library:
            if progress is not None:
                progress("comparing", done, len(wanted))
            _check_same(library, found)
            plan.there.append(found.name)
        elif found.deleted and EXPERTS + found.name in gone:
            plan.removed.append(found.name)
        else:
            plan.add.append(found)
    return plan


def _check_same(library: ExpertLibrary, found: FoundExpert) -> None:
    if found.read().digest != library.digest(found.name):
        raise ExpertExistsError(
            f"{library.uri} has another expert {found.name!r} than {found.source}; remove or "
            "rename that one, leave this one out (--exclude), or give it another name (--name)"
        )


def run_import(
    library: ExpertLibrary, plan: ImportPlan, progress: Progress | None = None
) -> list[str]:
    """Do what a plan says, in as few commits as memory allows; each is whole or not at all.

    An expert that was deleted in its source comes in and is removed at once, so that
    ``restore_expert`` brings it back here too.

    Returns:
        Names of the experts that were added.
    """
    done = 0
    for group in _groups(plan.add):
        sources = sorted({found.source for found in group})
        with library.batch(f"import {len(group)} experts from {', '.join(sources)}"):
            artifacts: set[tuple[str, str]] = set()
            for found in group:
                if progress is not None:
                    progress("", done, len(plan.add))
                _add(library, found, artifacts)
                done += 1
    if progress is not None:
        progress("", done, len(plan.add))
    return [found.name for found in plan.add]


def _add(library: ExpertLibrary, found: FoundExpert, artifacts: set[tuple[str, str]]) -> None:
    expert = found.read()
    kept = found.read_kept()
    digest = library.add_expert(expert)
    for part in kept:
        key = (digest, repr(part.recipe))
        if key not in artifacts:  # two equal experts have equal artifacts
            artifacts.add(key)
            library.artifacts.put(digest, part.recipe, part.value)
    if found.deleted:
        library.remove_expert(found.name)


def _groups(experts: Sequence[FoundExpert]) -> Iterable[list[FoundExpert]]:
    group: list[FoundExpert] = []
    size = 0
    for found in experts:
        if group and size + found.size > COMMIT_BYTES:
            yield group
            group, size = [], 0
        group.append(found)
        size += found.size
    if group:
        yield group
