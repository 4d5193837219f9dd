"""Trains the experts of one command, one after the other, and reports what they reached."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from typing import Any

import click
from rich.table import Table
from train_options import TrainOptions
from train_plan import Plan, is_there, plans
from train_scores import SCORES, base_scores, row_of, rows_held_out, table_of

from mttl_adapters import (
    BaseModel,
    TrainedAdapter,
    TrainingReport,
    load_base_model,
    train_adapter,
)
from mttl_data import (
    Batches,
    DatasetLibrary,
    PromptError,
    PromptWriter,
    Row,
    benchmark_names,
    check_benchmarks,
    context_length,
    evaluate_benchmarks,
    open_dataset,
    truncation,
)
from mttl_experts import Expert, ExpertInfo, ExpertLibrary, recipe_digest
from mttl_experts.jobs import Scoring, bar, console, mean, say, write_json
from mttl_routing import apply_expert


def run(options: TrainOptions) -> None:
    """Train what is not there yet, score it, add it, and print the table."""
    start = time.monotonic()
    benchmarks = _benchmark_names(options)
    library = open_library(options)
    # First of all, so that a folder that cannot be written is found before any training.
    write_json(options.output / "options.json", asdict(options) | {"output": str(options.output)})
    data = open_data(options)
    base = load_base(options)
    wanted = plans(options, data, base)
    for plan in wanted:
        for task in plan.tasks:
            rows_held_out(options, data, task)  # rows to score on are missed before any training
    scoring = Scoring(library, base, options.predict_batch_size, no_score=(PromptError,))
    waiting = [plan for plan in wanted if not is_there(plan, library, options.replace)]
    say(f"{len(wanted)} experts wanted, {len(wanted) - len(waiting)} there already: {library.uri}")
    rows = []
    for plan in wanted:
        if plan in waiting:
            expert = _train(plan, options, base)
            there = options.replace and plan.name in library
            add = library.replace_expert if there else library.add_expert
            add(expert)
            plan.checkpoint(options.output).unlink(missing_ok=True)
        rows.append(_measure(plan, options, data, scoring))
    results: dict[str, Any] = {
        "library": library.uri,
        "model": base.model_id,
        "dataset": data.uri,
        "experts": rows,
        "mean": {key: mean(row[key] for row in rows) for key in SCORES},
    }
    console().print(table_of(rows, results["mean"]))
    if benchmarks:
        results["benchmarks"] = _benchmarks(benchmarks, options, wanted, library, base)
    results |= {"generation": library.generation, "seconds": round(time.monotonic() - start, 1)}
    write_json(options.output / "results.json", results)
    say(f"{results['seconds']:.0f} s; results in {options.output / 'results.json'}")


def open_library(options: TrainOptions) -> ExpertLibrary:
    """Where experts go: the library, or a copy of it where one was asked for."""
    library = ExpertLibrary(options.library, create=True)
    return library.copy_to(options.destination) if options.destination else library


def open_data(options: TrainOptions) -> DatasetLibrary:
    """The tasks to train and score on."""
    tasks = [name for names in options.task for name in names.split(",")]
    if options.dataset != "starter" and not tasks and not options.all_tasks:
        raise click.UsageError(
            f"which tasks of {options.dataset!r}? name them with --task, or take --all; "
            f"`apps/dataset show` lists them"
        )
    whole = options.dataset == "starter" or options.all_tasks
    with bar(f"tasks of {options.dataset}") as shown:
        return open_dataset(options.dataset, None if whole else tasks, shown.update)


def load_base(options: TrainOptions) -> BaseModel:
    """The base model, in the number format asked for."""
    with bar("base model") as shown:
        base = load_base_model(
            options.model,
            dtype=options.precision,
            progress=shown.update,
        )
    dtype = str(base.model.dtype).removeprefix("torch.")
    say(f"base {base.model_id}, {dtype}, on {base.model.device}")
    return base


def _train(plan: Plan, options: TrainOptions, base: BaseModel) -> Expert:
    trained = _trained(plan, options, base)
    return Expert(info_of(plan, options, base, trained.config, trained), trained.weights)


def info_of(
    plan: Plan,
    options: TrainOptions,
    base: BaseModel,
    config: dict[str, Any],
    report: TrainingReport | None = None,
) -> ExpertInfo:
    """Facts about the expert of a plan, with what its training says of itself once it is over."""
    return ExpertInfo(
        expert_name=plan.name,
        expert_task_name=plan.tasks[0] if len(plan.tasks) == 1 else plan.tasks,
        expert_config=config,
        training_config=plan.recipe
        | {"dataset": options.dataset, "versions": {name: version(name) for name in TOOLS}},
        expert_model=base.model_id,
        model_revision=base.revision,
        model_architecture=base.model.config.model_type,
        model_fingerprint=base.fingerprint,
        tokenizer_digest=base.tokenizer_digest,
        template_digest=base.template_digest,
        dataset_digest=recipe_digest(plan.recipe["data"]),
        recipe_digest=plan.digest,
        metrics={} if report is None else {name: getattr(report, name) for name in _METRICS},
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


_METRICS = ("step", "train_loss", "validation_loss", "examples", "tokens", "seconds")
TOOLS = ("torch", "transformers", "peft", "mttl-adapters", "mttl-data")


def batches_of(
    plan: Plan, options: TrainOptions, base: BaseModel, named: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a plan trains on, one batch a step, and what it validates on.

    With ``named``, batches name the task of each row.
    """
    writer = PromptWriter(
        base.tokenizer,
        max_length=context_length(base.model),
        max_input_length=options.max_input_length,
        max_output_length=options.max_output_length,
    )

    def batches(rows: tuple[Row, ...]) -> Batches:
        examples = writer.examples(rows)
        cut = truncation(examples)
        if cut.rows:
            say(f"{plan.name}: of {len(examples)}, {cut}")
        return Batches(
            examples,
            options.batch_size,
            pad_id=base.tokenizer.pad_token_id,
            seed=options.seed,
            tasks=[row.task_name for row in rows] if named else None,
        )

    validation = list(batches(plan.validation)) if plan.validation else []
    return list(islice(batches(plan.train).stream(), plan.steps)), validation


def _trained(plan: Plan, options: TrainOptions, base: BaseModel) -> TrainedAdapter:
    batches, validation = batches_of(plan, options, base)
    with bar(f"training {plan.name}", plan.steps) as shown:
        trained = train_adapter(
            base.model,
            plan.adapter,
            batches,
            plan.training,
            validation=validation,
            checkpoint=plan.checkpoint(options.output),
            checkpoint_seconds=options.checkpoint_seconds,
            progress=shown.update,
        )
    if trained.resumed_from:
        say(f"{plan.name}: went on from step {trained.resumed_from}")
    return trained


def _measure(
    plan: Plan, options: TrainOptions, data: DatasetLibrary, scoring: Scoring
) -> dict[str, Any]:
    """One row of the table: the base, the base with two examples, and the expert on test rows."""
    expert = scoring.library.get_expert(plan.name)
    bases, own = [], []
    for task in plan.tasks:
        bases.append(base_scores(options, data, scoring, task))
        asked = rows_held_out(options, data, task)
        own.append(scoring.score(asked, expert.name, apply_expert(scoring.base, expert), [expert]))
    return row_of(plan.name, plan.tasks, bases, own, expert.expert_info.metrics)


def _benchmark_names(options: TrainOptions) -> list[str]:
    """What to measure with the harness; the tasks trained on are scored in any case."""
    names = benchmark_names([name for name in options.benchmarks if name != "in_distribution"])
    check_benchmarks(names, options.data_dir)  # before hours of training, not after
    return names


def _benchmarks(
    names: list[str],
    options: TrainOptions,
    wanted: list[Plan],
    library: ExpertLibrary,
    base: BaseModel,
) -> list[dict[str, Any]]:
    """Scores of the base and of each expert on benchmarks, printed and given back."""
    rows = []
    table = Table(title="Benchmarks, in percent", title_justify="left")
    for column in ("model", "benchmark", "rows", "acc", "acc_norm"):
        table.add_column(column)

    def measure(who: str, model: Any) -> None:
        with bar(f"benchmarks: {who}") as shown:
            scores = evaluate_benchmarks(
                model,
                base.tokenizer,
                names,
                data_dir=options.data_dir,
                limit=options.test_rows,
                progress=shown.update,
            )
        for name, score in scores.items():
            rows.append({"model": who, "benchmark": name} | asdict(score))
            norm = "" if score.acc_norm is None else f"{100 * score.acc_norm:.1f}"
            table.add_row(who, name, str(score.n), f"{100 * score.acc:.1f}", norm)

    measure("base", base.model)
    for plan in wanted:
        with apply_expert(base, library.get_expert(plan.name)) as model:
            measure(plan.name, model.model)
    console().print(table)
    return rows
