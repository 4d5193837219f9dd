"""Which experts of a library are shown, and which names they may have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from mttl_storage import InvalidName, Item, check_name

EXPERTS = "experts/"


@dataclass(frozen=True)
class Selection:
    """A part of a library, or all of it.

    Attributes:
        model_name: base model of the experts shown; None for any.
        names: exact names of those shown; None for all.
        excluded: exact names of those left out.
    """

    model_name: str | None = None
    names: frozenset[str] | None = None
    excluded: frozenset[str] | None = None

    @classmethod
    def of(
        cls,
        model_name: str | None,
        selection: str | Iterable[str] | None,
        exclude_selection: str | Iterable[str] | None,
    ) -> Self:
        """From lists, or comma strings."""
        return cls(model_name, _names(selection), _names(exclude_selection))

    @property
    def is_part(self) -> bool:
        """Whether anything may be left out."""
        return any(part is not None for part in (self.model_name, self.names, self.excluded))

    @property
    def named(self) -> frozenset[str]:
        """All names in it."""
        return (self.names or frozenset()) | (self.excluded or frozenset())

    def shows(self, name: str, item: Item) -> bool:
        """Whether an expert belongs to it."""
        return (
            (self.names is None or name in self.names)
            and (self.excluded is None or name not in self.excluded)
            and (self.model_name is None or item.info.get("expert_model") == self.model_name)
        )


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
