"""Look into a library of experts, and keep it: ``uv run apps/library --help``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click
from library_add import add
from library_changes import card, copy, gc, remove, rename, restore, tag
from library_export import export
from library_history import blame, diff, lineage, log
from library_import import import_experts
from library_merge import merge
from library_options import address, as_json, in_library, open_library
from library_search import search

from mttl_experts.jobs import bar, console, known_errors

if TYPE_CHECKING:
    from mttl_experts import ExpertInfo, ExpertLibrary


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
def main() -> None:
    """Look into a library of experts, and keep it: at local://, az:// and hf:// addresses.

    LIBRARY is local://mttldata/library if left out.
    """


@main.command("list")
@address
@as_json
def list_experts(library: str, as_json: bool) -> None:
    """List the experts of LIBRARY: task, kind, rank, base, metrics, size, date."""
    opened = open_library(library)
    with known_errors():
        rows = [_row(opened, name, info) for name, info in opened.infos().items()]
    if as_json:
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table(title=f"{len(rows)} experts in {opened.uri}", title_justify="left")
    for column in ("expert", "task", "kind", "base", "loss", "size", "made"):
        table.add_column(column, overflow="fold")
    for row in rows:
        loss = row["metrics"].get("validation_loss")
        table.add_row(
            row["expert_name"],
            ", ".join(row["tasks"]),
            f"{row['kind']} {row['rank'] or ''}",
            row["expert_model"],
            "" if loss is None else f"{loss:.3f}",
            f"{row['bytes'] / 1e6:.1f} MB",
            (row["created"] or "")[:10],
        )
    console().print(table)


@main.command()
@click.argument("expert")
@in_library
@as_json
def show(expert: str, library: str, as_json: bool) -> None:
    """Show all that LIBRARY knows of EXPERT."""
    opened = open_library(library)
    with known_errors():
        found = opened.get_expert(expert)
        digest = opened.digest(expert)
        facts = found.expert_info.to_dict() | {
            "digest": digest,
            "files": {
                name: {"size": entry.size, "sha256": entry.sha256}
                for name, entry in opened.repository.item(f"experts/{expert}").files.items()
            },
            "scores": [
                {"task": s.task, "metric": s.metric, "value": s.value, "n": s.n, "how": s.recipe}
                for s in opened.scores.table()
                if digest in s.experts
            ],
        }
    if as_json:
        click.echo(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    console().print_json(json.dumps(facts, ensure_ascii=False))


@main.command()
@address
@as_json
def verify(library: str, as_json: bool) -> None:
    """Read every byte of LIBRARY, and say what is not as it was written."""
    opened = open_library(library)
    with known_errors(), bar("verifying", stderr=as_json) as shown:
        problems = opened.verify(lambda done, total, _: shown.update("", done, total))
    if as_json:
        found = [{"where": p.where, "what": p.what} for p in problems]
        click.echo(json.dumps({"library": opened.uri, "problems": found}, indent=1))
    elif problems:
        for problem in problems:
            click.echo(f"{problem.where}: {problem.what}")
    else:
        click.echo(f"{opened.uri}: {len(opened)} experts, generation {opened.generation}, all well")
    if problems:
        raise SystemExit(1)


def _row(library: ExpertLibrary, name: str, info: ExpertInfo) -> dict[str, Any]:
    config = info.expert_config or {}
    files = library.repository.item(f"experts/{name}").files
    return {
        "expert_name": name,
        "tasks": list(info.tasks),
        "kind": str(config.get("peft_type", "")).lower(),
        "rank": config.get("r"),
        "expert_model": info.expert_model or "",
        "metrics": dict(info.metrics),
        "bytes": sum(entry.size for entry in files.values()),
        "digest": library.digest(name),
        "created": info.created,
    }


for command in (
    *(add, blame, card, copy, diff, export, gc, import_experts),
    *(lineage, log, merge, remove, rename, restore, search, tag),
):
    main.add_command(command)


if __name__ == "__main__":
    main(prog_name="apps/library")
