"""Make task collections, and show what is in them: ``uv run apps/dataset --help``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mttl_experts.jobs import bar, console, known_errors, write_json

if TYPE_CHECKING:
    from mttl_data import DatasetLibrary, TaskInfo

LIBRARY = "local://mttldata/datasets"

library_option = click.option(
    "--library",
    "--dataset_library_id",
    "--dataset-library-id",
    default=LIBRARY,
    help="Address of the dataset library.",
)
json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write what is shown to this file as JSON.",
)
replace_option = click.option(
    "--replace", is_flag=True, help="Put new rows in place of others under the same task name."
)


@click.group(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
def main() -> None:
    """Make task collections, and show what is in them."""


@main.command()
@library_option
@click.option("--task", "tasks", multiple=True, help="Make this task alone; may be repeated.")
@click.option("--seed", default=42, help="Another seed gives other rows.")
@click.option("--train", default=400, type=click.IntRange(min=0), help="Training rows a task.")
@click.option("--validation", default=32, type=click.IntRange(min=0), help="Validation rows.")
@click.option("--test", default=100, type=click.IntRange(min=0), help="Test rows a task.")
@replace_option
@json_option
def starter(
    library: str,
    tasks: Sequence[str],
    seed: int,
    train: int,
    validation: int,
    test: int,
    replace: bool,
    json_path: Path | None,
) -> None:
    """Generate the starter mixture: short tasks of reasoning-gym with their own scorers."""
    with data_errors():
        from mttl_data import make_starter
        from mttl_data.starter import starter_names

        names = starter_names(tasks or None)  # before anything is made
        sizes = {"train": train, "validation": validation, "test": test}
        target = open_library(library, create=True)
        with bar("starter") as shown:
            infos = make_starter(
                target,
                names,
                sizes=sizes,
                seed=seed,
                replace=replace,
                progress=shown.update,
            )
        report(target, infos, json_path)


@main.command()
@library_option
@click.option(
    "--source",
    type=click.Path(),
    help="Parquet or jsonl file, or a folder of them. [default: the hub's chiayewken/flan-v2]",
)
@click.option("--task", "tasks", multiple=True, help="Take this task alone; may be repeated.")
@click.option("--limit", default=10_000, type=click.IntRange(min=1), help="Most rows of a task.")
@click.option("--seed", default=42, help="Seed of the shuffle.")
@click.option(
    "--include-task-source",
    "--include_task_source",
    multiple=True,
    help="Take rows of this collection (P3, Flan2021, CoT, NIv2) alone; may be repeated.",
)
@click.option(
    "--include-template-type",
    "--include_template_type",
    multiple=True,
    help="Take rows of this template type (such as zs_noopt) alone; may be repeated.",
)
@click.option(
    "--keep-split",
    is_flag=True,
    help="Keep the splits of a source that was flat before; otherwise rows are split anew.",
)
@replace_option
@json_option
def flan(
    library: str,
    source: str | None,
    tasks: Sequence[str],
    limit: int,
    seed: int,
    include_task_source: Sequence[str],
    include_template_type: Sequence[str],
    keep_split: bool,
    replace: bool,
    json_path: Path | None,
) -> None:
    """Make the FLAN flat set from the hub, or from a local copy."""
    if not console().is_terminal:  # else datasets shows its own bars while it downloads
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    with data_errors():
        from mttl_data import EVALUATION_OVERLAP, make_flan
        from mttl_data.flan_sources import open_source

        rows = open_source(source)  # before anything is made
        target = open_library(library, create=True)
        with bar("flan") as shown:
            infos = make_flan(
                target,
                rows,
                tasks or None,
                limit=limit,
                seed=seed,
                include_task_source=include_task_source,
                include_template_type=include_template_type,
                keep_split=keep_split,
                replace=replace,
                progress=shown.update,
            )
        report(target, infos, json_path)
        overlap = sorted(EVALUATION_OVERLAP & {info.task for info in infos})
        if overlap:
            click.echo(
                f"{len(overlap)} of these overlap the evaluation suite and are kept here: "
                f"{', '.join(overlap)}"
            )


@main.command()
@library_option
@click.option("--task", "tasks", multiple=True, help="Show this task alone; may be repeated.")
@click.option("--samples", default=1, type=click.IntRange(min=0), help="Rows shown of each task.")
@json_option
def show(library: str, tasks: Sequence[str], samples: int, json_path: Path | None) -> None:
    """List tasks, splits and sizes, and show a sample.

    Without --task the sample is of the first task.
    """
    with data_errors():
        target = open_library(library)
        infos = [target.info(task) for task in tasks or target.tasks()]
        shown = infos if tasks else infos[:1]
        report(target, infos, json_path)
        for info in shown:
            split = "test" if "test" in info.sizes else next(iter(info.sizes))
            for number, row in enumerate(target.rows(info.task, split)[:samples]):
                click.secho(f"\n{info.task}, {split} row {number}", bold=True)
                click.echo(f"{row.source}\n--> {row.target}")


def data_errors() -> AbstractContextManager[None]:
    """One clear line for what users can cause."""
    from mttl_data import DataError

    return known_errors(DataError)


def open_library(uri: str, create: bool = False) -> DatasetLibrary:
    """The library at an address; one that is missing says how to make it."""
    from mttl_data import DatasetLibrary
    from mttl_storage import NotFound

    try:
        return DatasetLibrary(uri, create=create)
    except NotFound as error:
        raise click.ClickException(
            f"there is no dataset library at {uri!r}; check the address, or make one with: "
            f"uv run apps/dataset starter --library {uri}"
        ) from error


def report(library: DatasetLibrary, infos: Sequence[TaskInfo], json_path: Path | None) -> None:
    """A table for people, and the same as JSON where that is asked for."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=f"{library.uri} ({len(infos)} tasks)")
    table.add_column("task", overflow="fold")
    for split in ("train", "validation", "test"):
        table.add_column(split, justify="right")
    table.add_column("metric")
    table.add_column("source", overflow="fold")
    for info in infos:
        sizes = [str(info.sizes.get(split, 0)) for split in ("train", "validation", "test")]
        table.add_row(info.task, *sizes, info.metric, info.source)
    console().print(table)
    if json_path is not None:
        content = {
            "library": library.uri,
            "generation": library.repository.generation,
            "tasks": [
                {
                    "task": info.task,
                    "sizes": dict(info.sizes),
                    "metric": info.metric,
                    "source": info.source,
                    "columns": list(info.columns),
                    "digest": info.digest,
                    "recipe": dict(info.recipe),
                }
                for info in infos
            ],
        }
        write_json(json_path, content)


if __name__ == "__main__":
    main(prog_name="apps/dataset")
