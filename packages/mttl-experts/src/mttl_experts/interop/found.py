"""What a source holds: experts that can be read, and files that were left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mttl_experts.expert import Expert
from mttl_experts.interop.folder import Folder


@dataclass(frozen=True)
class Kept:
    """Something computed from an expert that goes into the library with it, as an artifact."""

    recipe: dict[str, Any]
    value: Any


@dataclass(frozen=True)
class FoundExpert:
    """An expert in a source, whose weights are not read yet.

    Attributes:
        name: what it is called there.
        kind: format and kind of adapter, for people.
        source: address of the folder.
        size: bytes of its files there.
        read: gives the expert; it checks the weights.
        read_kept: gives what belongs to it.
        deleted: whether it was deleted there, and could be brought back.
    """

    name: str
    kind: str
    source: str
    size: int
    read: Callable[[], Expert]
    read_kept: Callable[[], list[Kept]] = list
    deleted: bool = False


@dataclass
class Found:
    """All that was found in one source.

    Attributes:
        folder: where.
        experts: by the order of their names.
        left_out: a line for each file or group of files that is not imported, and why.
        excluded: names of experts that were not looked at, as asked.
    """

    folder: Folder
    experts: list[FoundExpert] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)


def provenance(folder: Folder, form: str, **more: Any) -> Mapping[str, Any]:
    """What ``ExpertInfo.extra`` says of where an expert came from; no path of this machine."""
    where = {"source": folder.address} if folder.distant else {}
    return {"imported": {"format": form, **where, **more}}
