"""What each way of making one model of a library keeps of its experts' skill.

    uv run apps/train --all
    uv run benchmarks/quality.py [--library L] [--ways "merge ties,route arrow"] [--write FILE]
    uv run benchmarks/quality.py --ways "route arrow --top-k 2" --routing-accuracy [--write FILE]

Runs ``apps/eval`` once a way (every merge method that takes any number of experts, every router)
and prints one JSON line each: the score of every task, their mean, and the mean of each score over
that of the task's own expert. Scores are kept in the library, so a run that was stopped goes on.
``--routing-accuracy``, and any other option of ``apps/eval``, goes to that; a row then has the
share of tokens that each layer sends to their own task's expert most of all.
``--write`` puts the rows that there are into a markdown file, between the two marks of a table;
with ``--keep-rows`` beside those of other ways that stand there, if they are of the same experts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mttl_routing import MERGES, ROUTERS

ROOT = Path(__file__).parents[1]
# Takes two experts, or weights that only the caller knows; fixed needs to be told the expert; the
# others are second names.
LEFT_OUT = {"slerp", "weighted", "task", "fixed", "avg_act", "rkhs"}


def ways() -> list[str]:
    """Every way, as ``apps/eval`` takes it."""
    merges = [f"merge {name}" for name in MERGES if name not in LEFT_OUT]
    return merges + [f"route {name}" for name in ROUTERS if name not in LEFT_OUT]


def evaluated(way: str, library: str, arguments: list[str]) -> dict[str, Any]:
    """One row: what ``apps/eval`` found."""
    kind, name, *rest = way.split()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "apps/eval"), f"--{kind}", name, *rest]
        command += ["--library", library, "--output", folder, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"way": way, "failed": (done.stdout + done.stderr).strip().splitlines()[-1]}
        found = json.loads((Path(folder) / "results.json").read_text())
    tasks = found["tasks"]
    shares = [row["model"] / row["expert"] for row in tasks if row["expert"]]
    return {
        "way": way,
        "experts": len(found["experts"]),
        "rows": sum(row["n"] for row in tasks),
        "base": found["mean"]["base"],
        "expert": found["mean"]["expert"],
        "mean": found["mean"]["model"],
        "of_experts": sum(shares) / len(shares),
        "tasks": {row["task"]: [row["base"], row["expert"], row["model"]] for row in tasks},
    } | ({"routing": found["routing"]} if "routing" in found else {})


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in markdown, best first, in percent; base and experts above them."""
    good = sorted((r for r in rows if "failed" not in r), key=lambda row: -row["of_experts"])
    if not good:
        return ""
    tasks = list(good[0]["tasks"])
    head = ["", "of the experts", "mean", *tasks]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for place, name in ((1, "each its own expert"), (0, "base")):
        values = [good[0]["tasks"][task][place] for task in tasks]
        own = [good[0]["tasks"][task][1] for task in tasks]
        share = [v / o for v, o in zip(values, own, strict=True) if o]
        figures = [sum(share) / len(share), sum(values) / len(values), *values]
        lines.append([name, *(f"{100 * figure:.1f}" for figure in figures)])
    for row in good:
        figures = [row["of_experts"], row["mean"], *(row["tasks"][task][2] for task in tasks)]
        lines.append([f"`{row['way']}`", *(f"{100 * figure:.1f}" for figure in figures)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def accuracies(rows: list[dict[str, Any]]) -> str:
    """Share of tokens sent most to their own expert, in markdown: over layers, and by kind."""
    routed = sorted(
        (row for row in rows if "routing" in row),
        key=lambda row: -statistics.fmean(row["routing"].values()),
    )
    if not routed:
        return ""
    kinds = sorted({layer.rpartition(".")[2] for layer in routed[0]["routing"]})
    lines = [["", "mean", "lowest layer", "highest layer", *kinds]]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for row in routed:
        shares = row["routing"]
        of_kind = [[v for path, v in shares.items() if path.endswith(f".{k}")] for k in kinds]
        figures = [statistics.fmean(shares.values()), min(shares.values()), max(shares.values())]
        figures += [statistics.fmean(some) for some in of_kind]
        lines.append([f"`{row['way']}`", *(f"{100 * figure:.1f}" for figure in figures)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def written(text: str, name: str, table: str) -> str:
    """A markdown text with a table between the marks of its name."""
    begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
    if begin not in text:
        sys.exit(f"--write: the file has no line {begin!r} to put the table under")
    before, _, after = text.partition(begin)
    return f"{before}{begin}\n\n{table}\n{end}{after.partition(end)[2]}"


def kept(text: str, name: str, table: str) -> str:
    """A table, and the rows of other ways that a markdown text has in that of this name."""
    part = text.partition(f"<!-- table: {name} -->")[2].partition("<!-- end of table -->")[0]
    old = [line for line in part.splitlines() if line.startswith("|")]
    new = table.splitlines()
    if not (old and new):
        return table or "".join(f"{line}\n" for line in old)
    if old[:4] != new[:4]:  # tasks, what each expert has by itself, and the base
        sys.exit(
            "--keep-rows: the file's table is of other tasks, rows or experts, whose scores by "
            f"themselves are\n{old[2]}\nand here\n{new[2]}"
        )
    measured = {line.split("|")[1] for line in new}
    rows = new[4:] + [line for line in old[4:] if line.split("|")[1] not in measured]
    rows.sort(key=lambda line: -float(line.split("|")[2]))
    return "".join(f"{line}\n" for line in new[:4] + rows)


def main() -> None:
    """Read the options, and evaluate one way after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default="local://mttldata/library")
    parser.add_argument("--ways", help="Comma list, each with its options. [default: all]")
    parser.add_argument("--write", type=Path, help="Markdown file with the two marks.")
    parser.add_argument("--keep-rows", action="store_true", help="--write beside what is there.")
    parser.add_argument("--table", default="quality", help="Name of the table in its marks.")
    options, arguments = parser.parse_known_args()
    chosen = [way.strip() for way in options.ways.split(",")] if options.ways else ways()
    rows = []
    for way in chosen:
        rows.append(evaluated(way, options.library, arguments))
        print(json.dumps(rows[-1]), flush=True)
        if options.write is not None:
            text, of_ways = options.write.read_text(), table(rows)
            if options.keep_rows:
                of_ways = kept(text, options.table, of_ways)
            text = written(text, options.table, of_ways)
            if "--routing-accuracy" in arguments:
                text = written(text, f"{options.table}, routing", accuracies(rows))
            options.write.write_text(text)


if __name__ == "__main__":
    main()
