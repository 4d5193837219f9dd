"""Scores a library as one model, beside its base and each expert on its own task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
from eval_data import ExpertsData
from eval_options import FITTED, EvalOptions
from eval_routing import in_words, over_tasks, routing_accuracy
from rich.table import Table

from mttl_adapters import (
    BankFiles,
    BaseModel,
    load_base_model,
)
from mttl_data import (
    BenchmarkScore,
    PromptError,
    check_benchmarks,
    evaluate_benchmarks,
)
from mttl_experts import (
    Expert,
    ExpertLibrary,
    check_compatible,
)
from mttl_experts.jobs import (
    TWO_SHOT,
    Scoring,
    bar,
    console,
    mean,
    percent,
    say,
    weights_of,
    write_json,
)
from mttl_routing import RoutedModel, apply_expert, check_one_base, merge

COLUMNS = ("base", "base_two_shot", "expert", "model")


def run(options: EvalOptions) -> None:
    """Score every task, print the table and write ``results.json``."""
    library = _opened(options)
    experts = list(library.values())
    if not experts:
        raise click.UsageError(f"{library.uri} has no experts to evaluate; train some first")
    check_benchmarks(options.harness, options.data_dir)
    # First of all, so that a folder that cannot be written is found before any scoring.
    write_json(options.output / "options.json", asdict(options) | {"output": str(options.output)})
    evaluation = Evaluation(options, library, experts)
    rows = []
    if options.in_distribution:
        rows += [evaluation.task(task) for task in library.tasks]
    if options.harness:
        rows += evaluation.benchmarks(options.harness)
    means = {column: mean(row[column] for row in rows if row["in_mean"]) for column in COLUMNS}
    console().print(_table(evaluation.title, rows, means))
    path = options.output / "results.json"
    routing = over_tasks(rows) if options.routing_accuracy and options.in_distribution else None
    if routing:
        say(in_words(routing))
    write_json(
        path,
        {
            "method": options.merge or options.route or "base",
            "settings": options.method,
            "library": library.uri,
            "generation": evaluation.generation,
            "experts": {expert.name: expert.digest for expert in experts},
            "model": evaluation.base.model_id,
            "tasks": rows,
            "mean": means,
        }
        | ({"routing": routing} if routing else {}),
    )
    say(f"results in {path}")


def _opened(options: EvalOptions) -> ExpertLibrary:
    """What is evaluated: the experts selected, or all that are not merges themselves."""
    library = ExpertLibrary(options.library, selection=options.selection)
    merges = sorted(set(library).difference(library.unmerged))
    if options.selection is not None or not merges:
        return library
    say(f"left out, being merges: {', '.join(merges)}; --selection takes them in")
    return ExpertLibrary(options.library, exclude_selection=merges)


class Evaluation:
    """One library, its base model, and the one model made of both."""

    def __init__(
        self, options: EvalOptions, library: ExpertLibrary, experts: Sequence[Expert]
    ) -> None:
        """Load the base, and check that the experts are for it."""
        self.options, self.library, self.experts = options, library, experts
        # Of the experts that are evaluated; scores and prototypes kept on the way come after it.
        self.generation = library.generation
        self.weights = None
        if options.weights is not None:
            self.weights = weights_of(options.weights, [expert.name for expert in experts])
        self.base = self._load()
        self.title = " ".join(f"{key} {value}" for key, value in options.method.items() if value)
        self.scoring = Scoring(
            library, self.base, options.batch_size, options.recompute, (PromptError,)
        )
        self.data = ExpertsData(options, library, experts, self.base)
        self._router: Any = None  # made when first asked for

    def task(self, task: str) -> dict[str, Any]:
        """Scores of one task: base, base with two examples, its own expert, and the one model."""
        expert = min(
            self.library.get_experts_for_task(task),
            key=lambda expert: (len(expert.expert_info.tasks), expert.name),
        )
        asked = self.data.held_out(task, expert)
        base = self.scoring.score(asked, "base", nullcontext(self.base))
        shots = self.scoring.score_if_possible(
            self.data.held_out(task, expert, TWO_SHOT),
            f"base with {TWO_SHOT} examples",
            nullcontext(self.base),
        )
        own = self.scoring.score(asked, expert.name, apply_expert(self.base, expert), [expert])
        model = base
        if self.options.method:
            whole = replace(asked, share_prefix=not self.options.decides_by_prompt)
            model = self.scoring.score(
                whole, self.title, self._mixture(task), self.experts, self.options.method
            )
        row = {
            "task": task,
            "metric": model.metric,
            "n": model.n,
            "base": base.value,
            "base_two_shot": None if shots is None else shots.value,
            "expert": own.value,
            "model": model.value,
            "ci95": model.ci95,
            "in_mean": True,
        }
        if self.options.routing_accuracy:
            names = [each.name for each in self.library.get_experts_for_task(task)]
            with self._mixture(task) as routed:
                rows = self.data.written(expert, asked.rows)
                row["routing"] = routing_accuracy(routed, rows, names)
        return row

    def benchmarks(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Scores on lm-evaluation-harness's tasks, a row for each and each of its metrics."""
        base = self._harness("base", nullcontext(self.base), names)
        model = base
        if self.options.method:
            model = self._harness(self.title, self._mixture(None), names)
        rows = []
        for name in names:
            for metric in ("acc", "acc_norm"):
                value = getattr(model[name], metric)
                if value is not None:
                    rows.append(
                        {
                            "task": name,
                            "metric": metric,
                            "n": model[name].n,
                            "base": getattr(base[name], metric),
                            "base_two_shot": None,
                            "expert": None,
                            "model": value,
                            "ci95": getattr(model[name], f"{metric}_ci95"),
                            "in_mean": metric == model[name].metric,
                            "cut": model[name].cut,
                        }
                    )
        return rows

    @cached_property
    def merged(self) -> Expert:
        """The experts merged into one."""
        options = self.options
        own = {"density": options.density, "inside": options.inside} | options.merge_options
        with bar(f"merging {len(self.experts)} experts by {options.merge}") as shown:
            try:
                return merge(
                    self.library,
                    options.merge or "",
                    rank=options.rank,
                    scale=options.scale,
                    weights=self.weights,
                    strict=options.strict,
                    progress=shown.update,
                    **own,
                )
            except ValueError as error:  # a value that the method does not take
                raise click.UsageError(f"--merge: {error}") from error

    @contextmanager
    def _mixture(self, task: str | None) -> Iterator[Any]:
        """The base with all experts in it, for as long as the block lasts."""
        options = self.options
        if options.merge:
            with apply_expert(self.base, self.merged) as model:
                yield model
            return
        source: Any = list(self.experts) if options.recompute else self.library
        make = RoutedModel.from_experts if options.recompute else RoutedModel.from_library
        learning: dict[str, Any] = {}
        if self._router is None:
            batches = self.data.batches if options.learns_from_batches else None
            examples = self.data.prompts() if options.route in FITTED else None
            learning = {"batches": batches, "examples": examples, "gate_steps": options.gate_steps}
        trains = learning and options.trains_gates
        with bar("router") if trains else nullcontext() as shown:
            try:
                made = make(
                    source,
                    self._router or options.route or "",
                    combine=options.combine,
                    base_model=self.base,
                    bank_files=self.bank_files,
                    progress=shown and shown.update,
                    **options.choice,
                    **learning,
                )
            except ValueError as error:
                if options.combine == "after":
                    raise
                raise click.UsageError(
                    f"--route {options.route} averages factors, slice by slice, and these "
                    f"experts or this base do not allow it ({error}); --route poly sums outputs"
                ) from error
        self._router = made.router
        with made as routed, routed.tasks(task) if task else nullcontext():
            yield routed

    @cached_property
    def bank_files(self) -> BankFiles | None:
        """Where the experts are mapped from; None where they are to be in memory."""
        bound = self.options.resident_gb
        return self.options.bank_files and BankFiles(
            self.options.bank_files, resident_bytes=None if bound is None else int(bound * 10**9)
        )

    def _harness(self, who: str, context: Any, names: Sequence[str]) -> dict[str, BenchmarkScore]:
        with context as model, bar(f"benchmarks: {who}") as shown:
            return evaluate_benchmarks(
                model.model,
                self.base.tokenizer,
                names,
                data_dir=self.options.data_dir,
                limit=self.options.test_rows,
                progress=shown.update,
            )

    def _load(self) -> BaseModel:
        options = self.options
        check_one_base(self.experts, strict=options.strict)
        names = sorted({e.expert_info.expert_model or "embedded" for e in self.experts})
        here = [name for name in names if Path(name).is_dir()]  # one base, under several names
        with bar("base model") as shown:
            base = load_base_model(
                options.model or (here or names)[0],
                dtype=options.precision,
                progress=shown.update,
            )
        for expert in self.experts:
            check_compatible(
                expert.expert_info,
                base_id=base.model_id,
                fingerprint=base.fingerprint,
                tokenizer_digest=base.tokenizer_digest,
                template_digest=base.template_digest,
                strict=options.strict,
            )
        return base


def _table(title: str, rows: Sequence[dict[str, Any]], means: dict[str, float | None]) -> Table:
    table = Table(title=f"Scores in percent; model: {title or 'base'}", title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for column in ("base", "base, 2 examples", "expert", "model", "95 %", "rows"):
        table.add_column(column, justify="right")
    for row in rows:
        ends = "-".join(f"{100 * end:.0f}" for end in row["ci95"] or ())
        table.add_row(
            row["task"],
            row["metric"] + ("" if row["in_mean"] else ", not in mean"),
            *(percent(row[column]) for column in COLUMNS),
            ends,
            str(row["n"]),
        )
    table.add_section()
    table.add_row("mean", "", *(percent(means[column]) for column in COLUMNS))
    return table
