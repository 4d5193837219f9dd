"""Scores a library as one model, beside its base and each expert on its own task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import torch
from eval_options import BY_TASK, FITTED, EvalOptions
from eval_routing import in_words, over_tasks, routing_accuracy
from rich.table import Table

from mttl_adapters import (
    BankFiles,
    BaseModel,
    load_base_model,
)
from mttl_data import (
    Batches,
    BenchmarkScore,
    DatasetLibrary,
    HeldOut,
    PromptError,
    PromptWriter,
    Row,
    check_benchmarks,
    context_length,
    evaluate_benchmarks,
    held_out,
    open_dataset,
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

# Rows that a router learns from at once.
ROUTER_BATCH = 8
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
        self._datasets: dict[str, DatasetLibrary] = {}
        self._router: Any = None  # made when first asked for

    def task(self, task: str) -> dict[str, Any]:
        """Scores of one task: base, base with two examples, its own expert, and the one model."""
        expert = min(
            self.library.get_experts_for_task(task),
            key=lambda expert: (len(expert.expert_info.tasks), expert.name),
        )
        asked = self._held_out(task, expert)
        base = self.scoring.score(asked, "base", nullcontext(self.base))
        shots = self.scoring.score_if_possible(
            self._held_out(task, expert, TWO_SHOT),
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
                rows = self._written(expert, asked.rows)
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
            batches = self._batches if options.learns_from_batches else None
            examples = self._prompts() if options.route in FITTED else None
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

    def _prompts(self) -> dict[str, list[dict[str, torch.Tensor]]]:
        """What a router is fitted on, as the model is asked: of each expert, or task (lorauter)."""
        found: dict[str, list[dict[str, torch.Tensor]]] = {}
        for expert in self.experts:
            writer = self._writer(expert)
            for row in self._router_rows(expert):
                whose = row.task_name if self.options.route == "lorauter" else expert.name
                ids = torch.tensor([writer.prompt(row).input_ids])
                found.setdefault(whose, []).append({"input_ids": ids})
        return found

    def _batches(self, expert: Expert) -> Batches:
        """The rows of an expert that a router learns from."""
        return self._written(expert, self._router_rows(expert))

    def _written(self, expert: Expert, rows: Sequence[Row]) -> Batches:
        """Rows with their answers, as the expert was trained on such."""
        return Batches(
            self._writer(expert).examples(rows),
            ROUTER_BATCH,
            pad_id=self.base.tokenizer.pad_token_id,
            tasks=[row.task_name for row in rows] if self.options.route in BY_TASK else None,
        )

    def _writer(self, expert: Expert) -> PromptWriter:
        """Writes rows as those were that the expert was trained on."""
        options, trained = self.options, expert.expert_info.training_config or {}
        return PromptWriter(
            self.base.tokenizer,
            max_length=context_length(self.base.model),
            max_input_length=options.max_input_length or trained.get("max_input_length"),
            max_output_length=options.max_output_length or trained.get("max_output_length"),
        )

    def _router_rows(self, expert: Expert) -> list[Row]:
        """The first training rows of an expert, the same number of each of its tasks."""
        options, trained = self.options, expert.expert_info.training_config or {}
        filters = trained.get("filters") or {}
        dataset, tasks = self._dataset(expert), expert.expert_info.tasks
        each = -(-options.router_rows // max(1, len(tasks)))
        rows = [
            row
            for task in tasks
            for row in dataset.rows(
                task,
                "train",
                options.task_source or filters.get("task_source", ()),
                options.template_type or filters.get("template_type", ()),
            )[:each]
        ]
        return rows[: options.router_rows]

    def _held_out(self, task: str, expert: Expert, n_shots: int = 0) -> HeldOut:
        """Test rows, chosen and cut as for the task's own expert where options say nothing."""
        options, trained = self.options, expert.expert_info.training_config or {}
        filters = trained.get("filters") or {}
        return held_out(
            self._dataset(expert),
            task,
            n_shots=n_shots,
            limit=options.test_rows,
            metric=options.metric,
            task_source=options.task_source or filters.get("task_source", ()),
            template_type=options.template_type or filters.get("template_type", ()),
            max_input_length=options.max_input_length or trained.get("max_input_length"),
            max_output_length=options.max_output_length or trained.get("max_output_length"),
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

    def _dataset(self, expert: Expert) -> DatasetLibrary:
        recorded = (expert.expert_info.training_config or {}).get("dataset")
        name = self.options.dataset or recorded
        if name is None:
            raise click.UsageError(
                f"expert {expert.name!r} does not say which dataset it was trained on; "
                "name it with --dataset"
            )
        if name not in self._datasets:
            tasks = None if name == "starter" else self._tasks_of(name)
            with bar(f"tasks of {name}") as shown:
                self._datasets[name] = open_dataset(name, tasks, shown.update)
        return self._datasets[name]

    def _tasks_of(self, dataset: str) -> list[str]:
        """Tasks of the experts that were trained on a dataset; all, where one was named for all."""
        if self.options.dataset:
            return list(self.library.tasks)
        infos = [expert.expert_info for expert in self.experts]
        from_it = [i for i in infos if (i.training_config or {}).get("dataset") == dataset]
        return sorted({task for info in from_it for task in info.tasks})

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
