"""Trains the experts of one command, one after the other, and reports what they reached."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from typing import Any

import click
from rich.table import Table
from train_options import TrainOptions
from train_plan import Plan, is_there, plans

from mttl_adapters import (
    BaseModel,
    TrainedAdapter,
    load_base_model,
    train_adapter,
)
from mttl_data import (
    Batches,
    DatasetLibrary,
    HeldOut,
    PromptError,
    PromptWriter,
    Row,
    benchmark_names,
    check_benchmarks,
    context_length,
    evaluate_benchmarks,
    held_out,
    open_dataset,
    truncation,
)
from mttl_experts import Expert, ExpertInfo, ExpertLibrary, recipe_digest
from mttl_experts.jobs import TWO_SHOT, Scoring, bar, console, mean, percent, say, write_json
from mttl_routing import apply_expert


def run(options: TrainOptions) -> None:
    """Train what is not there yet, score it, add it, and print the table."""
    start = time.monotonic()
    benchmarks = _benchmark_names(options)
    library = _open_library(options)
    # First of all, so that a folder that cannot be written is found before any training.
    write_json(options.output / "options.json", asdict(options) | {"output": str(options.output)})
    data = _open_data(options)
    base = _load(options)
    wanted = plans(options, data, base)
    for plan in wanted:
        for task in plan.tasks:
            _held_out(options, data, task)  # rows to score on are missed before any training
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
        "mean": {key: mean(row[key] for row in rows) for key in _SCORES},
    }
    console().print(_table(rows, results["mean"]))
    if benchmarks:
        results["benchmarks"] = _benchmarks(benchmarks, options, wanted, library, base)
    results |= {"generation": library.generation, "seconds": round(time.monotonic() - start, 1)}
    write_json(options.output / "results.json", results)
    say(f"{results['seconds']:.0f} s; results in {options.output / 'results.json'}")


def _open_library(options: TrainOptions) -> ExpertLibrary:
    library = ExpertLibrary(options.library, create=True)
    return library.copy_to(options.destination) if options.destination else library


def _open_data(options: TrainOptions) -> DatasetLibrary:
    tasks = [name for names in options.task for name in names.split(",")]
    if options.dataset != "starter" and not tasks and not options.all_tasks:
        raise click.UsageError(
            f"which tasks of {options.dataset!r}? name them with --task, or take --all; "
            f"`apps/dataset show` lists them"
        )
    whole = options.dataset == "starter" or options.all_tasks
    with bar(f"tasks of {options.dataset}") as shown:
        return open_dataset(options.dataset, None if whole else tasks, shown.update)


def _load(options: TrainOptions) -> BaseModel:
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
    info = ExpertInfo(
        expert_name=plan.name,
        expert_task_name=plan.tasks[0] if len(plan.tasks) == 1 else plan.tasks,
        expert_config=trained.config,
        training_config=plan.recipe
        | {"dataset": options.dataset, "versions": {name: version(name) for name in _TOOLS}},
        expert_model=base.model_id,
        model_revision=base.revision,
        model_architecture=base.model.config.model_type,
        model_fingerprint=base.fingerprint,
        tokenizer_digest=base.tokenizer_digest,
        template_digest=base.template_digest,
        dataset_digest=recipe_digest(plan.recipe["data"]),
        recipe_digest=plan.digest,
        metrics={
            "step": trained.step,
            "train_loss": trained.train_loss,
            "validation_loss": trained.validation_loss,
            "examples": trained.examples,
            "tokens": trained.tokens,
            "seconds": trained.seconds,
        },
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Expert(info, trained.weights)


_TOOLS = ("torch", "transformers", "peft", "mttl-adapters", "mttl-data")


def _trained(plan: Plan, options: TrainOptions, base: BaseModel) -> TrainedAdapter:
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
            examples, options.batch_size, pad_id=base.tokenizer.pad_token_id, seed=options.seed
        )

    with bar(f"training {plan.name}", plan.steps) as shown:
        trained = train_adapter(
            base.model,
            plan.adapter,
            list(islice(batches(plan.train).stream(), plan.steps)),
            plan.training,
            validation=list(batches(plan.validation)) if plan.validation else (),
            checkpoint=plan.checkpoint(options.output),
            checkpoint_seconds=options.checkpoint_seconds,
            progress=shown.update,
        )
    if trained.resumed_from:
        say(f"{plan.name}: went on from step {trained.resumed_from}")
    return trained


_SCORES = ("base", "base_two_shot", "expert")


def _held_out(options: TrainOptions, data: DatasetLibrary, task: str, n_shots: int = 0) -> HeldOut:
    return held_out(
        data,
        task,
        n_shots=n_shots,
        limit=options.test_rows,
        metric=options.metric,
        task_source=options.task_source,
        template_type=options.template_type,
        max_input_length=options.max_input_length,
        max_output_length=options.max_output_length,
    )


def _measure(
    plan: Plan, options: TrainOptions, data: DatasetLibrary, scoring: Scoring
) -> dict[str, Any]:
    """One row of the table: the base, the base with two examples, and the expert on test rows."""
    expert = scoring.library.get_expert(plan.name)
    base, shots, own = [], [], []
    for task in plan.tasks:
        asked = _held_out(options, data, task)
        base.append(scoring.score(asked, "base", nullcontext(scoring.base)))
        shots.append(
            scoring.score_if_possible(
                _held_out(options, data, task, TWO_SHOT),
                f"base with {TWO_SHOT} examples",
                nullcontext(scoring.base),
            )
        )
        own.append(scoring.score(asked, expert.name, apply_expert(scoring.base, expert), [expert]))
    metrics = expert.expert_info.metrics
    return {
        "expert_name": plan.name,
        "task": ",".join(plan.tasks),
        "metric": own[0].metric,
        "n": sum(score.n for score in own),
        "base": mean(score.value for score in base),
        "base_two_shot": mean(None if score is None else score.value for score in shots),
        "expert": mean(score.value for score in own),
        "ci95": own[0].ci95 if len(plan.tasks) == 1 else None,
        "examples": metrics["examples"],
        "tokens_per_second": metrics["tokens"] / max(metrics["seconds"], 1e-9),
        "seconds": metrics["seconds"],
    }


def _table(rows: list[dict[str, Any]], means: Mapping[str, float | None]) -> Table:
    table = Table(title="Held-out scores, in percent", title_justify="left")
    table.add_column("task", overflow="fold")
    for column in (
        "base", "base, 2 examples", "expert", "95 %", "rows", "examples", "tokens/s", "seconds"
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        low_high = "-".join(f"{100 * end:.0f}" for end in row["ci95"] or ())
        table.add_row(
            row["expert_name"],
            *(percent(row[kind]) for kind in _SCORES),
            low_high,
            str(row["n"]),
            str(row["examples"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['seconds']:.0f}",
        )
    table.add_section()
    table.add_row("mean", *(percent(means[kind]) for kind in _SCORES))
    return table


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
