"""Commands that tell where experts and scores came from: log, lineage, diff, blame."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from library_options import as_json, expert_of, in_library, open_library, show, table

from mttl_experts.jobs import known_errors, say

if TYPE_CHECKING:
    from mttl_experts import Edge, ExpertDifference, Lineage, Node, Score


@click.command()
@click.argument("expert", required=False)
@in_library
@click.option("-n", "count", default=20, show_default=True, help="Most changes to show.")
@as_json
def log(expert: str | None, library: str, count: int, as_json: bool) -> None:
    """Show the changes of EXPERT, or all commits of the library, newest first."""
    opened = open_library(library)
    with known_errors():
        if expert is None:
            rows = [asdict(commit) for commit in reversed(opened.history())][:count]
            for row in rows:
                row["changes"] = [f"{c['kind']} {c['name']}" for c in row["changes"]]
        else:
            rows = [asdict(event) for event in opened.log(expert, facts=True)[:count]]

    def people() -> None:
        for row in rows:
            say(f"{row['generation']:>6}  {row['time'][:19]}  {_change(row)}")

    show(rows, as_json, people)


@click.command()
@click.argument("expert")
@in_library
@as_json
def lineage(expert: str, library: str, as_json: bool) -> None:
    """Show what EXPERT was made of (data, base, experts) and what was made of it."""
    opened = open_library(library)
    with known_errors():
        found = opened.lineage(expert)

    def people() -> None:
        say(found.node)
        for line in _tree(found, found.node, up=True):
            say(line)
        for line in _tree(found, found.node, up=False):
            say(line)

    show(found.to_dict(), as_json, people)


@click.command()
@click.argument("one")
@click.argument("other")
@in_library
@as_json
def diff(one: str, other: str, library: str, as_json: bool) -> None:
    """Show what differs in OTHER from ONE: facts, and the distance and angles of each module's ΔW.

    Each is the name of an expert, or NAME@GENERATION for what it was then.
    """
    opened = open_library(library)
    with known_errors():
        found = opened.diff(expert_of(opened, one), expert_of(opened, other))
    show(
        asdict(found) | {"distance": found.distance}, as_json, lambda: _show_diff(found, one, other)
    )


@click.command()
@click.argument("score", required=False, default="")
@in_library
@click.option("--expert", help="Only scores of models with this expert.")
@as_json
def blame(score: str, library: str, expert: str | None, as_json: bool) -> None:
    """Show where scores came from: which experts, as they are now, and which commit.

    SCORE is a task, or the first digits of a score's digest; all scores if left out.
    """
    opened = open_library(library)
    with known_errors():
        scores = [s for s in opened.scores.table() if _is_meant(s, score)]
        if expert is not None:
            digest = expert_of(opened, expert).digest
            scores = [s for s in scores if digest in s.experts]
        if score and not scores:
            raise click.ClickException(
                f"{opened.uri} has no score of a task {score!r}, nor one whose digest begins so; "
                "`blame` alone shows all"
            )
        found = [opened.blame(each) for each in scores]
    rows = [
        asdict(each) | {"digest": each.score.digest, "experts": [n._asdict() for n in each.experts]}
        for each in found
    ]

    def people() -> None:
        cells = [
            (
                each.score.digest[:10],
                each.score.task,
                each.score.metric,
                f"{each.score.value:.3f}",
                each.score.n,
                ", ".join(map(_short, each.experts)) or "the base alone",
                " ".join(f"{key} {value}" for key, value in each.method.items() if value),
                each.generation,
            )
            for each in found
        ]
        columns = ("score", "task", "metric", "value", "rows", "experts", "method", "commit")
        table(f"{len(found)} scores in {opened.uri}", columns, cells)

    show(rows, as_json, people)


def _is_meant(score: Score, wanted: str) -> bool:
    return score.task == wanted or score.digest.startswith(wanted)


def _short(node: Node) -> str:
    return node.name if node.state == "here" else f"{node.name} ({node.state})"


def _change(row: dict[str, Any]) -> str:
    if "changes" in row:
        first = ", ".join(row["changes"][:3])
        return f"{row['message']}: {first}{' ...' if len(row['changes']) > 3 else ''}"
    what = f"{row['kind']} {row['name']}"
    if row["source"]:
        what = f"rename {row['source']} to {row['name']}"
    facts = "; ".join(f"{path} {old!r} -> {new!r}" for path, (old, new) in row["facts"].items())
    digest = f" {row['digest'][:12]}" if row["digest"] else ""
    return f"{what}{digest}{': ' if facts else ''}{facts}"


def _tree(found: Lineage, node: Node, up: bool, depth: int = 1) -> list[str]:
    lines = []
    edges: list[Edge] = found.made_of(node) if up else found.made_from(node)
    for edge in edges:
        other = edge.source if up else edge.target
        lines.append(f"{'   ' * depth}{'<-' if up else '->'} {edge.how}: {other}")
        if depth < 10:
            lines += _tree(found, other, up, depth + 1)
    return lines


def _show_diff(found: ExpertDifference, one: str, other: str) -> None:
    if found.same_weights:
        say("weights and config are equal, byte for byte")
    if found.facts:
        facts = [(path, *map(repr, values)) for path, values in found.facts.items()]
        table("facts that differ", ("fact", one, other), facts)
    if found.not_compared:
        say(f"modules are not compared: {found.not_compared}")
    elif not found.same_weights:
        rows = [
            (
                path,
                f"{m.norms[0]:.4g}",
                f"{m.norms[1]:.4g}",
                f"{m.distance:.4g}",
                "" if m.cosine is None else f"{m.cosine:.3f}",
                " ".join(f"{angle:.0f}" for angle in m.input_angles[:8]),
                " ".join(f"{angle:.0f}" for angle in m.output_angles[:8]),
            )
            for path, m in found.modules.items()
        ]
        columns = ("module", "‖ΔW‖", "‖ΔW‖'", "distance", "cosine", "input °", "output °")
        table(f"distance of ΔW over all modules: {found.distance:.4g}", columns, rows)
