"""The README of a library: front matter that the hub reads, a table of experts, how to load one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from mttl_experts.changing import LibraryWriter
from mttl_experts.errors import ExpertError
from mttl_experts.expert import ExpertInfo
from mttl_experts.scores import Score
from mttl_experts.selection import EXPERTS, Selection
from mttl_storage import Conflict, Repository

FILE = "README.md"
END = "<!-- end of the card; what follows is kept -->"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


class CardError(ExpertError, Conflict):
    """The library has a README that is not a card's."""


def card(library: LibraryWriter) -> str:
    """Text of the README of what a library shows."""
    infos = library.infos()
    bases = sorted({i.expert_model for i in infos.values() if i.expert_model})
    name = library.uri.rpartition("/")[2]
    count = "1 expert" if len(infos) == 1 else f"{len(infos)} experts"
    lines = [
        *_front_matter(infos.values(), bases),
        f"# {_text(name)}",
        "",
        f"{count}: adapters for {', '.join(map(_code, bases)) or 'a base model that none names'}, "
        "kept by mttl in one versioned library.",
        "",
        *_table(library, infos),
        "",
        "## Load one",
        "",
        *_example(library, infos),
        "",
        END,
    ]
    return "\n".join(lines) + "\n"


def write_card(library: LibraryWriter) -> str:
    """Put the card into a library as README.md; see ``ExpertLibrary.write_card``."""
    there, text = _there_and_wanted(library)
    if text != there:
        library.repository.store.pipe_file(FILE, text.encode())
    return text


def pages(repository: Repository) -> dict[str, bytes]:
    """The card, to go with a commit of a library on the hub; nothing if it is right as it is.

    A README that is not a card's is left alone.

    Args:
        repository: as the commit leaves it.
    """
    if repository.store.shown_folder != EXPERTS:  # such as a data set's
        return {}
    try:
        there, text = _there_and_wanted(LibraryWriter(repository, Selection(), read_only=True))
    except CardError:
        return {}
    return {} if text == there else {FILE: text.encode()}


def _there_and_wanted(library: LibraryWriter) -> tuple[str | None, str]:
    try:
        there = bytes(library.repository.store.cat_file(FILE)).decode()
    except FileNotFoundError:
        return None, card(library)
    if END not in there:
        raise CardError(
            f"{library.uri} has a {FILE} that is not a card's; put the line {END!r} above what of "
            "it should stay below the card, or delete it"
        )
    return there, card(library) + there.partition(END)[2].removeprefix("\n")


def _front_matter(infos: Iterable[ExpertInfo], bases: list[str]) -> list[str]:
    infos = list(infos)
    ids = [base for base in bases if _HUB_ID.fullmatch(base)]
    licences = sorted({info.licence for info in infos if info.licence})
    kinds = {str((i.expert_config or {}).get("peft_type") or "").lower() for i in infos} - {""}
    tags = ["mttl", "adapters", *sorted(kinds | {tag for info in infos for tag in info.tags})]
    lines = ["---", "library_name: peft"]
    if ids:
        lines += ["base_model:", *(f"- {json.dumps(base)}" for base in ids)]
        lines.append("base_model_relation: adapter")
    if licences:
        lines.append(f"license: {json.dumps(licences[0] if len(licences) == 1 else 'other')}")
    return [*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)), "---", ""]


def _table(library: LibraryWriter, infos: dict[str, ExpertInfo]) -> list[str]:
    scores: dict[str, list[Score]] = {}
    for score in library.scores.table():
        if len(score.experts) == 1:
            scores.setdefault(score.experts[0], []).append(score)
    lines = [
        "| expert | task | kind | rank | base | score | size | date |",
        "|---|---|---|---:|---|---|---:|---|",
    ]
    for name, info in infos.items():
        item, config = library.repository.item(f"experts/{name}"), info.expert_config or {}
        cells = [
            _code(name),
            _text(", ".join(info.tasks)),
            _text(str(config.get("peft_type") or "").lower()),
            _text(str(config.get("r") or "")),
            _text(info.expert_model or ""),
            _text(_score(info, scores.get(item.digest, []))),
            f"{item.size / 1e6:.1f} MB" if item.files else "",
            _text((info.created or item.time)[:10]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _score(info: ExpertInfo, scores: list[Score]) -> str:
    own = [score for score in scores if score.task in info.tasks] or scores
    if own:
        score = own[0]
        return f"{score.metric} {100 * score.value:.1f} % ({score.n} rows)"
    loss = info.metrics.get("validation_loss")
    return f"loss {loss:.3f}" if isinstance(loss, float) else ""


def _example(library: LibraryWriter, infos: dict[str, ExpertInfo]) -> list[str]:
    name = next((name for name, info in infos.items() if info.expert_config), "name")
    base = (infos[name].expert_model if name in infos else None) or "the/base"
    scheme, _, repo = library.uri.partition("://")
    folder = f"{json.dumps(repo)}, subfolder={json.dumps(name)}"
    lines = [
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
    ]
    if scheme != "hf":
        lines += ["from mttl_experts import ExpertLibrary", ""]
        lines.append(f"library = ExpertLibrary({json.dumps(library.uri)})")
        folder = f"library.path({json.dumps(name)})"
    else:
        lines.append("")
    lines.append(f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})")
    return [*lines, f"model = PeftModel.from_pretrained(base, {folder})", "```"]


def _text(text: str) -> str:
    """Text that is only text, in a cell of a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
