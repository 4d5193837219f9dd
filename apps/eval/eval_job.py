"""Scores a library as one model, beside its base and each expert on its own task."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property
from typing import Any

import click
from eval_options import EvalOptions
from rich.table import Table

from mttl_adapters import (
    EMBEDDED_ID,
    BaseModel,
    load_base_model,
)
from mttl_data import (
    BenchmarkScore,
    DatasetLibrary,
    check_benchmarks,
    evaluate_benchmarks,
    held_out,
    open_dataset,
)
from mttl_experts import (
    Expert,
    ExpertLibrary,
    Score,
    check_compatible,
)
from mttl_experts.jobs import bar, console, write_json
from mttl_routing import RoutedModel, apply_expert, merge

TWO_SHOT = 2
COLUMNS = ("base", "base_two_shot", "expert", "model")


def run(options: EvalOptions) -> None:
    """Score every task, print the table and write ``results.json``."""
    library = ExpertLibrary(options.library, selection=options.selection)
    experts = list(library.values())
    if not experts:
        raise click.UsageError(f"{library.uri} has no experts to evaluate; train some first")
    check_benchmarks(options.harness, options.data_dir)
    evaluation = Evaluation(options, library, experts)
    rows = []
    if options.in_distribution:
        rows += [evaluation.task(task) for task in library.tasks]
    if options.harness:
        rows += evaluation.benchmarks(options.harness)
    mean = {column: _mean([row[column] for row in rows]) for column in COLUMNS}
    console().print(_table(evaluation.title, rows, mean))
    path = options.output / "results.json"
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
            "mean": mean,
        },
    )
    write_json(options.output / "options.json", asdict(options) | {"output": str(options.output)})
    console().print(f"results in {path}")


class Evaluation:
    """One library, its base model, and the one model made of both."""

    def __init__(
        self, options: EvalOptions, library: ExpertLibrary, experts: Sequence[Expert]
    ) -> None:
        """Load the base, and check that the experts are for it."""
        self.options, self.library, self.experts = options, library, experts
        # Of the experts that are evaluated; scores and prototypes kept on the way come after it.
        self.generation = library.generation
        self.base = self._load()
        self.title = " ".join(f"{key} {value}" for key, value in options.method.items() if value)
        self._datasets: dict[str, DatasetLibrary] = {}

    def task(self, task: str) -> dict[str, Any]:
        """Scores of one task: base, base with two examples, its own expert, and the one model."""
        expert = min(
            self.library.get_experts_for_task(task),
            key=lambda expert: (len(expert.expert_info.tasks), expert.name),
        )
        data = self._dataset(expert)
        base = self._score(task, data, "base", [], nullcontext(self.base.model))
        shots = self._score(
            task, data, "base, 2 examples", [], nullcontext(self.base.model), n_shots=TWO_SHOT
        )
        own = self._score(task, data, expert.name, [expert], self._one(expert))
        model = base
        if self.options.method:
            model = self._score(
                task, data, self.title, self.experts, self._mixture(task), self.options.method
            )
        return {
            "task": task,
            "metric": model.metric,
            "n": model.n,
            "base": base.value,
            "base_two_shot": shots.value,
            "expert": own.value,
            "model": model.value,
            "ci95": model.ci95,
        }

    def benchmarks(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Scores on lm-evaluation-harness's tasks, a row for each and each of its metrics."""
        base = self._harness("base", nullcontext(self.base.model), names)
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
                        }
                    )
        return rows

    @cached_property
    def merged(self) -> Expert:
        """The experts merged into one."""
        options = self.options
        with bar(f"merging {len(self.experts)} experts by {options.merge}"):
            return merge(
                self.experts, options.merge or "", rank=options.rank, density=options.density
            )

    @contextmanager
    def _one(self, expert: Expert) -> Iterator[Any]:
        with apply_expert(self.base, expert) as model:
            yield model.model

    @contextmanager
    def _mixture(self, task: str | None) -> Iterator[Any]:
        """The base with all experts in it, for as long as the block lasts."""
        options = self.options
        if options.merge:
            with self._one(self.merged) as model:
                yield model
            return
        source: Any = list(self.experts) if options.recompute else self.library
        make = RoutedModel.from_experts if options.recompute else RoutedModel.from_library
        with (
            make(
                source,
                options.route or "",
                options.top_k,
                temperature=options.temperature,
                base_model=self.base,
            ) as routed,
            routed.tasks(task) if task else nullcontext(),
        ):
            yield routed.model

    def _score(
        self,
        task: str,
        data: DatasetLibrary,
        who: str,
        experts: Sequence[Expert],
        context: Any,
        method: dict[str, Any] | None = None,
        n_shots: int = 0,
    ) -> Score:
        held = held_out(
            data, task, n_shots=n_shots, limit=self.options.test_rows, metric=self.options.metric
        )

        def measure() -> Any:
            with context as model, bar(f"{task}: {who}", len(held.rows)) as shown:
                done = 0

                def advance(count: int) -> None:
                    nonlocal done
                    done += count
                    shown.update(done)

                score = held.score(model, self.base.tokenizer, self.options.batch_size, advance)
            if score.truncation.rows:
                console().print(f"{task}: of {score.n}, {score.truncation}")
            return score

        recipe = held.recipe() | {
            "base": self.base.fingerprint,
            "dtype": str(self.base.model.dtype),
        }
        if method:
            recipe["method"] = method
        return self.library.scores.get_or_make(
            experts, task, held.metric, recipe, measure, again=self.options.recompute
        )

    def _harness(self, who: str, context: Any, names: Sequence[str]) -> dict[str, BenchmarkScore]:
        with context as model, bar(f"benchmarks: {who}") as shown:
            return evaluate_benchmarks(
                model,
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
                self._datasets[name] = open_dataset(
                    name, tasks, lambda _, done, total: shown.update(done, total)
                )
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
        bases = sorted({e.expert_info.expert_model for e in self.experts} - {None})
        if len(bases) > 1:
            raise click.UsageError(
                f"{self.library.uri} has experts for {', '.join(map(str, bases))}; "
                "pick those of one base with --selection"
            )
        name = options.model or (bases[0] if bases else "embedded")
        with bar("base model") as shown:
            base = load_base_model(
                "embedded" if name == EMBEDDED_ID else name,
                dtype=options.dtype,
                progress=lambda what, done, total: shown.update(done, total, what),
            )
        told = set()
        for expert in self.experts:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check_compatible(
                    expert.expert_info,
                    base_id=base.model_id,
                    fingerprint=base.fingerprint,
                    tokenizer_digest=base.tokenizer_digest,
                    template_digest=base.template_digest,
                    strict=options.strict,
                )
            told |= {str(warning.message) for warning in caught}
        for warning in sorted(told):
            console().print(f"warning: {warning}")
        return base


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def _table(title: str, rows: Sequence[dict[str, Any]], mean: dict[str, float | None]) -> Table:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    table = Table(title=f"Scores in percent; model: {title or 'base'}", title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column("metric")
    for column in ("base", "base, 2 examples", "expert", "model", "95 %", "rows"):
        table.add_column(column, justify="right")
    for row in rows:
        ends = "-".join(f"{100 * end:.0f}" for end in row["ci95"] or ())
        table.add_row(
            row["task"],
            row["metric"],
            *(percent(row[column]) for column in COLUMNS),
            ends,
            str(row["n"]),
        )
    table.add_section()
    table.add_row("mean", "", *(percent(mean[column]) for column in COLUMNS))
    return table
