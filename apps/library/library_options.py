"""What the commands of ``apps/library`` share: their common options, and how they show things."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import click

from mttl_experts.jobs import console, known_errors

if TYPE_CHECKING:
    from mttl_experts import Expert, ExpertLibrary

LIBRARY = "local://mttldata/library"

address = click.argument("library", default=LIBRARY)
in_library = click.option(
    "--library", default=LIBRARY, show_default=True, help="Address of the library."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
yes = click.option("--yes", is_flag=True, help="Do not ask.")


def open_library(library: str, read_only: bool = True) -> ExpertLibrary:
    """The library at an address; a missing one ends the command in one line.

    To read, plain PEFT adapters that lie there are one as well.
    """
    from mttl_experts import ExpertLibrary

    with known_errors():
        if read_only:
            return ExpertLibrary.get_expert_library(library, read_only=True)
        return ExpertLibrary(library)


def open_or_none(library: str) -> ExpertLibrary | None:
    """The library at an address to be changed; None while there is none, and none is made."""
    from mttl_experts import ExpertLibrary
    from mttl_storage import NotFound

    try:
        return ExpertLibrary(library)
    except NotFound:
        return None


def expert_of(library: ExpertLibrary, name: str) -> Expert:
    """An expert by name, or one of an older generation as ``NAME@GENERATION``."""
    before, at, generation = name.rpartition("@")
    if at and name not in library and generation.isdecimal():
        return library.at(int(generation))[before]
    return library[name]


def show(data: Any, as_json: bool, people: Callable[[], object]) -> None:
    """Print data as JSON for programs, or call what prints it for people."""
    if as_json:
        click.echo(json.dumps(data, indent=1, ensure_ascii=False))
    else:
        people()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table for people."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(title), title_justify="left")
    for column in columns:
        shown.add_column(column, overflow="fold")
    for row in rows:
        shown.add_row(*(Text(str(cell)) for cell in row))
    console().print(shown)


def confirm(question: str, yes: bool) -> None:
    """Ask, unless told not to; anything but yes ends the command."""
    if not yes:
        click.confirm(question, abort=True, err=True)
