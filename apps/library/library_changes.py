"""Commands that change a library: tag, remove, restore, rename, copy, gc, card."""

from __future__ import annotations

from dataclasses import asdict

import click
from library_options import address, as_json, confirm, in_library, open_library, show, yes

from mttl_experts.jobs import bar, known_errors, say

WEEK = 7.0


@click.command()
@click.argument("expert")
@click.argument("tags", nargs=-1)
@in_library
@click.option("--remove", is_flag=True, help="Take the tags off.")
@as_json
def tag(expert: str, tags: tuple[str, ...], library: str, remove: bool, as_json: bool) -> None:
    """Add TAGS to EXPERT; without any, show those that it has."""
    opened = open_library(library, read_only=not tags)
    with known_errors():
        if tags:
            own = (opened.untag if remove else opened.tag)(expert, *tags).tags
        else:
            own = opened.get_expert(expert).expert_info.tags
    show(list(own), as_json, lambda: say(" ".join(own) or f"{expert} has no tags"))


@click.command()
@click.argument("experts", nargs=-1, required=True)
@in_library
@click.option("--hard", is_flag=True, help="For good, with artifacts and scores made from them.")
@yes
@as_json
def remove(experts: tuple[str, ...], library: str, hard: bool, yes: bool, as_json: bool) -> None:
    """Remove EXPERTS, by one commit. `restore` brings them back unless it was --hard."""
    opened = open_library(library, read_only=False)
    with known_errors():
        for name in experts:
            opened.digest(name)  # all of them are there, before anything is asked
        what = f"{len(experts)} experts" if len(experts) > 1 else experts[0]
        end = "for good; they cannot be restored" if hard else "`restore` brings them back"
        confirm(f"Remove {what} from {opened.uri} ({end})?", yes)
        with opened.batch(f"remove {', '.join(experts)}"):
            for name in dict.fromkeys(experts):
                opened.remove_expert(name, hard=hard)
    done = {"removed": list(experts), "hard": hard, "generation": opened.generation}
    show(done, as_json, lambda: say(f"removed {', '.join(experts)}"))


@click.command()
@click.argument("experts", nargs=-1, required=True)
@in_library
@as_json
def restore(experts: tuple[str, ...], library: str, as_json: bool) -> None:
    """Bring back EXPERTS that were removed."""
    opened = open_library(library, read_only=False)
    with known_errors(), opened.batch(f"restore {', '.join(experts)}"):
        for name in experts:
            opened.restore_expert(name)
    done = {"restored": list(experts), "generation": opened.generation}
    show(done, as_json, lambda: say(f"restored {', '.join(experts)}"))


@click.command()
@click.argument("old")
@click.argument("new")
@in_library
@as_json
def rename(old: str, new: str, library: str, as_json: bool) -> None:
    """Give the expert OLD the name NEW; artifacts and scores stay with it."""
    opened = open_library(library, read_only=False)
    with known_errors():
        opened.rename_expert(old, new)
    done = {"old": old, "new": new, "generation": opened.generation}
    show(done, as_json, lambda: say(f"{old} is {new} now"))


@click.command()
@click.argument("source")
@click.argument("destination")
@click.option("--selection", help="Only these experts (comma list). [default: all]")
@click.option("--update", is_flag=True, help="Keep experts that were changed in DESTINATION.")
@as_json
def copy(source: str, destination: str, selection: str | None, update: bool, as_json: bool) -> None:
    """Copy the library SOURCE to DESTINATION with artifacts and scores; again, what changed.

    Experts that differ in DESTINATION are replaced, and with --update they are an error instead.
    """
    from mttl_experts import ExpertLibrary

    with known_errors(), bar(f"copying to {destination}", stderr=as_json):
        opened = ExpertLibrary(source, selection=selection, read_only=True)
        if update:
            copied = ExpertLibrary(destination, create=True)
            copied.update_from(opened)
        else:
            copied = opened.copy_to(destination)
    done = {"source": opened.uri, "destination": copied.uri, "experts": len(copied)}
    show(done, as_json, lambda: say(f"{copied.uri}: {len(copied)} experts"))


@click.command()
@address
@click.option(
    "--grace",
    "days",
    default=WEEK,
    show_default=True,
    type=click.FloatRange(min=0),
    help="Days for which what nothing needs is kept; 0 only where nobody else reads or writes.",
)
@yes
@as_json
def gc(library: str, days: float, yes: bool, as_json: bool) -> None:
    """Delete what was removed or replaced in LIBRARY longer ago than --grace, for good."""
    opened = open_library(library, read_only=False)
    with known_errors():
        confirm(f"Delete what {opened.uri} has not needed for {days:g} days?", yes)
        found = opened.gc(days * 86400.0)

    def people() -> None:
        say(f"{found.items} items, {found.files} files, {found.bytes / 1e6:.1f} MB deleted")
        if found.note:
            say(found.note)

    show(asdict(found), as_json, people)


@click.command()
@address
@click.option("--write", is_flag=True, help="Put it into the library as README.md.")
def card(library: str, write: bool) -> None:
    """Print the README of LIBRARY as the hub wants it: front matter, experts, how to load one."""
    opened = open_library(library, read_only=not write)
    with known_errors():
        text = opened.write_card() if write else opened.card()
    if write:
        say(f"README.md of {opened.uri} is written")
    else:
        click.echo(text, nl=False)
