"""The command ``merge``: many experts of a library into one, which the library keeps."""

from __future__ import annotations

from typing import Any

import click
from library_options import as_json, in_library, open_library, open_or_none, show

from mttl_experts.jobs import bar, key_values, known_errors, say, weights_of


@click.command()
@click.argument("method", metavar="METHOD")
@in_library
@click.option("--expert", "names", multiple=True, help="An expert; again for more. All if none.")
@click.option("--into", help="Library that gets the result; made if needed. [default: the same]")
@click.option("--name", help="What to call it. [default: the method and digits of its recipe]")
@click.option("--weights", help="NAME=W,NAME=W ...; the method's own if not given.")
@click.option("--rank", type=click.IntRange(min=1), help="Cut each module to this rank.")
@click.option("--scale", type=float, help="Multiplies the result. [default: the method's]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is drawn.")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="What the method takes besides, such as density=0.3 or inside=ties; again for more.",
)
@click.option("--strict", is_flag=True, help="Refuse other weights or tokenizer of one base.")
@as_json
def merge(
    method: str,
    library: str,
    names: tuple[str, ...],
    into: str | None,
    name: str | None,
    weights: str | None,
    options: tuple[str, ...],
    as_json: bool,
    **settings: Any,
) -> None:
    """Merge experts of LIBRARY by METHOD into one expert; '?' as METHOD lists the methods.

    Experts that are merges themselves are left out unless named. A merge that the library keeps
    already is not computed again. `export --format dense` writes the result into its base.
    """
    from mttl_experts import ExpertLibrary
    from mttl_routing import MERGES
    from mttl_routing import merge as merged_of

    if method not in MERGES:
        raise click.UsageError(f"METHOD {method!r} is not known; there are {', '.join(MERGES)}")
    given = key_values(options)
    with known_errors():
        wanted = list(names) or open_library(library).unmerged
        if not wanted:
            raise click.ClickException(f"{library} has no experts to merge; train some first")
        chosen = ExpertLibrary.get_expert_library(library, selection=wanted)
        if weights is not None:
            settings["weights"] = weights_of(weights, list(chosen))
        target = open_or_none(into or library)
        with bar(f"merging {len(chosen)} experts by {method}", stderr=as_json) as shown:
            try:
                result = merged_of(
                    chosen, method, name=name, kept_in=target, progress=shown.update,
                    **settings, **given,
                )  # fmt: skip
            except ValueError as error:  # an option that the method does not take
                raise click.UsageError(str(error)) from error
        target = target or ExpertLibrary(into or library, create=into is not None)
        target.add_expert(result)
    report = (result.expert_info.training_config or {})["report"]
    done = {
        "expert": result.name,
        "library": target.uri,
        "digest": result.digest,
        "recipe_digest": result.expert_info.recipe_digest,
        "experts": list(chosen),
        "energy_kept": report["energy_kept"],
    }

    def people() -> None:
        kept = report["energy_kept"]
        lost = "" if kept > 1 - 5e-7 else f", {100 * kept:.1f} % of its energy kept"
        say(f"{result.name}: {method} of {len(chosen)} experts{lost}, in {target.uri}")
        for expert, modules in report["missing_means_zero"].items():
            say(f"{expert} leaves {len(modules)} modules alone, which count as zero")

    show(done, as_json, people)
