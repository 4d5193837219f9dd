"""The command ``search``: experts by words, by likeness to an expert, by loss on examples."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from library_options import as_json, in_library, open_library, table

from mttl_experts.jobs import bar, known_errors, say

if TYPE_CHECKING:
    from mttl_adapters import BaseModel
    from mttl_data import Row
    from mttl_experts import Expert, ExpertLibrary, Match


@click.command(context_settings={"show_default": True})
@click.argument("text", default="")
@click.option(
    "--like",
    metavar="EXPERT|FOLDER|FILE.jsonl",
    help="Instead of words: an expert of the library; a PEFT folder or hub id; or examples, a JSON "
    'object with "source" and "target" on each line.',
)
@click.option(
    "--embeddings",
    metavar="MODEL",
    help="Compare TEXT by meaning, with the vectors of this model: folder or hub id of an encoder.",
)
@in_library
@click.option("--limit", default=10, type=click.IntRange(min=1), help="Most experts to show.")
@click.option("--model", help="Base for examples. [default: the one that the experts are for]")
@click.option("--batch-size", default=16, type=click.IntRange(min=1), help="Examples at once.")
@click.option("--recompute", is_flag=True, help="Measure again what the library has losses of.")
@as_json
def search(
    text: str,
    like: str | None,
    embeddings: str | None,
    library: str,
    limit: int,
    model: str | None,
    batch_size: int,
    recompute: bool,
    as_json: bool,
) -> None:
    """Find experts in a library by TEXT, or by what they are like.

    Words are looked up in names, tasks, tags and cards, or compared with these by meaning
    (--embeddings). Likeness is that of the weights: copies of an expert come first, under whatever
    factors. Examples rank experts by their loss on them.
    """
    if bool(text.strip()) == (like is not None):
        raise click.UsageError("search for either TEXT or --like EXPERT|FOLDER|FILE.jsonl")
    if embeddings is not None and like is not None:
        raise click.UsageError("--embeddings compares TEXT; leave it out with --like")
    opened = open_library(library, read_only=False)  # so that indexes and losses are kept
    with known_errors():
        if like is None:
            matches = opened.search.text(text, limit, embeddings=embeddings)
            columns: tuple[str, ...] = ("score",)
        elif like.endswith(".jsonl"):
            matches = _by_loss(opened, Path(like), limit, model, batch_size, recompute, as_json)
            columns = ("loss", "below base")
        else:
            matches = _like(opened, like, limit, as_json)
            columns = ("cosine", "size", "copy")
    left_out = {} if like is None else opened.search.left_out
    asked = text if like is None else like
    if as_json:
        found = [_facts(opened, match, columns[0]) for match in matches]
        report = {"library": opened.uri, "found": found, "left_out": left_out}
        click.echo(json.dumps(report, indent=1, ensure_ascii=False))
        return
    _show(opened, asked, matches, columns)
    for name, reason in list(left_out.items())[:5]:
        say(f"left out: {name}: {reason}")
    if len(left_out) > 5:
        say(f"left out: {len(left_out) - 5} more")


def _like(library: ExpertLibrary, like: str, limit: int, as_json: bool) -> list[Match]:
    """By weights: of the library's own expert, or else of an adapter from elsewhere."""
    itself = like not in library
    wanted = _elsewhere(library, like) if itself else library.get_expert(like)
    with bar("indexing", stderr=as_json) as shown:
        try:
            return library.search.like(wanted, limit, itself=itself, progress=shown.update)
        except ValueError as error:  # it changes nothing, or holds NaN
            raise click.ClickException(str(error)) from error


def _elsewhere(library: ExpertLibrary, source: str) -> Expert:
    from mttl_experts.errors import expert_not_found
    from mttl_experts.interop.importing import find_experts

    if not Path(source).is_dir() and "/" not in source:
        raise expert_not_found(library.uri, source, library.keys())
    found = find_experts(source).experts
    if len(found) != 1:
        some = ", ".join(each.name for each in found[:5])
        raise click.ClickException(f"{source!r} holds {len(found)} adapters, name one: {some}")
    return found[0].read()


def _by_loss(
    library: ExpertLibrary,
    path: Path,
    limit: int,
    model: str | None,
    batch_size: int,
    again: bool,
    as_json: bool,
) -> list[Match]:
    """By loss on examples, of the base with each expert in turn."""
    rows = _rows(path)
    from mttl_adapters import AdapterError, mean_loss
    from mttl_data import Batches, DataError, PromptWriter, context_length, truncation
    from mttl_routing import apply_expert

    with known_errors(AdapterError, DataError):
        base = _base(library, model, as_json)
        examples = PromptWriter(base.tokenizer, max_length=context_length(base.model)).examples(
            rows
        )
        cut = truncation(examples)
        if cut.rows:
            say(f"of {len(examples)}, {cut}", stderr=as_json)
        pad = base.tokenizer.pad_token_id
        batches = list(Batches(examples, batch_size, pad_id=pad, shuffle=False))

        def loss(expert: Expert | None) -> float:
            if expert is None:
                return mean_loss(base.model, batches)
            with apply_expert(base, expert) as routed:
                return mean_loss(routed.model, batches)

        tokens = json.dumps([[each.input_ids, each.labels] for each in examples])
        recipe = {
            "examples": hashlib.sha256(tokens.encode()).hexdigest(),
            "base": base.fingerprint,
            "dtype": str(base.model.dtype),
        }
        with bar(f"loss on {len(rows)} examples", stderr=as_json) as shown:
            return library.search.by_loss(
                loss, recipe, len(rows), limit, again=again, progress=shown.update
            )


def _rows(path: Path) -> list[Row]:
    """Rows of a file of examples; what cannot be read ends the command, naming the line."""
    from mttl_data import Row

    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"examples {str(path)!r} cannot be read: {error}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise click.ClickException(
                f"{path}, line {number}, is not JSON: {error.msg} at column {error.colno}"
            ) from None
        texts = [row.get(key) for key in ("source", "target")] if isinstance(row, dict) else []
        if len(texts) != 2 or not all(isinstance(each, str) for each in texts):
            raise click.ClickException(
                f'{path}, line {number}, is no object with texts "source" and "target"'
            )
        rows.append(Row(texts[0], texts[1], "examples"))
    if not rows:
        raise click.ClickException(f"{path} has no examples; give one JSON object a line")
    return rows


def _base(library: ExpertLibrary, model: str | None, as_json: bool) -> BaseModel:
    from mttl_adapters import load_base_model

    names = {info.expert_model for info in library.infos().values() if info.expert_model}
    if model is None and len(names) > 1:
        raise click.ClickException(
            f"the experts of {library.uri} are for {len(names)} bases; choose one with --model: "
            + ", ".join(sorted(names))
        )
    with bar("base model", stderr=as_json) as shown:
        return load_base_model(model or next(iter(names), "embedded"), progress=shown.update)


def _facts(library: ExpertLibrary, match: Match, measure: str) -> dict[str, Any]:
    """One match, for programs."""
    facts: dict[str, Any] = {
        "expert_name": match.name,
        "tasks": list(library.get_expert(match.name).expert_info.tasks),
        "digest": library.digest(match.name),
        measure: -match.score if measure == "loss" else match.score,
    }
    if match.likeness is not None:
        facts |= {"size": match.likeness.size, "copy": match.likeness.copy}
    if match.gain is not None:
        facts["below_base"] = match.gain
    return facts


def _show(
    library: ExpertLibrary, asked: str, matches: list[Match], columns: tuple[str, ...]
) -> None:
    """The table for people."""
    if not matches:
        say(f"nothing in {library.uri} ({len(library)} experts) is like {asked!r}")
        return
    rows = []
    for match in matches:
        tasks = ", ".join(library.get_expert(match.name).expert_info.tasks)
        cells = [f"{-match.score if columns[0] == 'loss' else match.score:.4f}"]
        if match.likeness is not None:
            cells += [f"{match.likeness.size:.3g}", match.likeness.copy or ""]
        if match.gain is not None:
            cells.append(f"{match.gain:+.4f}")
        rows.append((match.name, tasks, *cells))
    table(f"like {asked!r} in {library.uri}", ("expert", "task", *columns), rows)
