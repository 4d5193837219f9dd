"""The command ``import``: PEFT adapters and older libraries into a library."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click
from library_options import open_or_none

from mttl_experts.jobs import bar, console, known_errors, say

if TYPE_CHECKING:
    from mttl_experts.interop import ImportPlan


@click.command("import")
@click.argument("sources", nargs=-1, required=True)
@click.option("--into", "library", required=True, help="Address of the library; made if needed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--name", help="What to call the expert, where the sources hold just one.")
@click.option("--select", help="Import these alone: names parted by commas.")
@click.option("--exclude", help="Leave these out: names parted by commas.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs; does not ask.")
def import_experts(
    sources: tuple[str, ...],
    library: str,
    yes: bool,
    name: str | None,
    select: str | None,
    exclude: str | None,
    as_json: bool,
) -> None:
    """Import SOURCES: PEFT folders, hub ids (user/repo/folder@revision), older libraries.

    A folder or hub repository may hold one adapter or many. Doing it again changes nothing.
    """
    from mttl_experts import ExpertLibrary
    from mttl_experts.interop import (
        choose,
        find_experts,
        plan_import,
        renamed,
        run_import,
    )

    with known_errors():
        found = [find_experts(source, exclude=exclude) for source in sources]
        _check_excluded(exclude, [name for one in found for name in one.excluded])
        experts = choose(found, select)
        if name is not None:
            if len(experts) != 1:
                raise click.ClickException(
                    f"--name {name!r} names one expert, and the sources hold {len(experts)}; "
                    "--select one of them, or import them under their own names"
                )
            experts = [renamed(experts[0], name)]
        left_out = [f"{one.folder.address}: {line}" for one in found for line in one.left_out]
        target = open_or_none(library)
        with bar("comparing", stderr=as_json) as shown:
            plan = plan_import(target, experts, shown.update)
        if not as_json:
            _show(plan, left_out, target.uri if target is not None else library)
        if plan.add and not (yes or as_json):
            click.confirm(f"Import {_count(len(plan.add))}?", abort=True)
        added: list[str] = []
        if plan.add:
            target = target or ExpertLibrary(library, create=True)
            with bar("importing", len(plan.add), stderr=as_json) as shown:
                added = run_import(target, plan, shown.update)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "library": target.uri if target is not None else library,
                    "added": added,
                    "there": plan.there,
                    "removed": plan.removed,
                    "left_out": left_out,
                },
                indent=1,
                ensure_ascii=False,
            )
        )
    elif added and target is not None:
        say(f"{target.uri}: {_count(len(target))}, generation {target.generation}")


def _check_excluded(exclude: str | None, met: list[str]) -> None:
    for name in (exclude or "").split(","):
        if name.strip() and name.strip() not in met:
            raise click.ClickException(f"--exclude {name.strip()!r}: no source has such an expert")


def _show(plan: ImportPlan, left_out: list[str], uri: str) -> None:
    from rich.table import Table

    if plan.add:
        table = Table(title=f"{_count(len(plan.add))} to import into {uri}", title_justify="left")
        for column in ("expert", "what it is", "size", "from"):
            table.add_column(column, overflow="fold")
        for each in plan.add:
            kind = each.kind + (", deleted there: to be removed here" if each.deleted else "")
            table.add_row(each.name, kind, f"{each.size / 1e6:.1f} MB", each.source)
        console().print(table)
    if plan.there:
        say(f"there already, the same: {', '.join(plan.there)}")
    if plan.removed:
        say(f"deleted there and removed here: {', '.join(plan.removed)}")
    for line in left_out:
        say(f"left out: {line}")
    if not plan.add:
        say(f"nothing to import into {uri}")


def _count(number: int) -> str:
    return f"{number} expert{'' if number == 1 else 's'}"
