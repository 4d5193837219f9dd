"""The command ``add``: one adapter into a library, or in the place of an expert there."""

from __future__ import annotations

import dataclasses

import click
from library_options import as_json, in_library, show

from mttl_experts.jobs import bar, known_errors, say


@click.command()
@click.argument("source")
@in_library
@click.option("--name", help="What to call it. [default: its folder's name]")
@click.option("--task", "tasks", multiple=True, help="Task it was trained on; again for more.")
@click.option("--replace", is_flag=True, help="Put it in the place of the expert of that name.")
@click.option("--strict", is_flag=True, help="Refuse what is for other weights of a known base.")
@as_json
def add(
    source: str,
    library: str,
    name: str | None,
    tasks: tuple[str, ...],
    replace: bool,
    strict: bool,
    as_json: bool,
) -> None:
    """Add the adapter at SOURCE, a PEFT folder or hub id, to LIBRARY, made if there is none.

    One that is there already, byte for byte, is left. `import` takes in many at once.
    """
    from mttl_experts import ExpertLibrary
    from mttl_experts.interop import find_experts, renamed

    with known_errors():
        found = find_experts(source).experts
        if len(found) != 1:
            names = ", ".join(each.name for each in found[:5]) or "none"
            raise click.ClickException(
                f"{source} holds {len(found)} experts ({names}), and add takes one; name its own "
                "folder, or use import"
            )
        with bar("reading", stderr=as_json):
            expert = (found[0] if name is None else renamed(found[0], name)).read()
        if tasks:
            facts = dataclasses.replace(expert.expert_info, expert_task_name=tasks)
            expert = dataclasses.replace(expert, expert_info=facts)
        opened = ExpertLibrary(library, create=True)
        before = opened.generation
        there = expert.name in opened
        if replace and there:
            digest = opened.replace_expert(expert, strict=strict)
        else:
            digest = opened.add_expert(expert, strict=strict)
    done = {
        "expert": expert.name,
        "library": opened.uri,
        "digest": digest,
        "generation": opened.generation,
        "changed": opened.generation > before,
    }

    def people() -> None:
        what = "is there already, the same"
        if done["changed"]:
            what = "replaced" if there else "added"
        say(f"{expert.name} {what}: {opened.uri}, generation {opened.generation}")

    show(done, as_json, people)
