"""Trains a mixture of fresh experts and their router together, from scratch: ``--moe N``."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from train_job import batches_of, info_of, load_base, open_data, open_library
from train_options import TrainOptions
from train_plan import Plan, is_there, mixture_plan
from train_scores import SCORES, base_scores, row_of, rows_held_out, table_of

from mttl_adapters import BaseModel, TrainingReport, fresh_adapter
from mttl_data import DatasetLibrary, PromptError
from mttl_experts import Expert, ExpertLibrary
from mttl_experts.jobs import Scoring, bar, console, mean, say, write_json
from mttl_routing import RoutedModel, train


def run(options: TrainOptions) -> None:
    """Train the mixture if it is not there yet, score it, and print the table."""
    start = time.monotonic()
    library = open_library(options)
    write_json(options.output / "options.json", asdict(options) | {"output": str(options.output)})
    data = open_data(options)
    base = load_base(options)
    mixture = mixture_plan(options, data, base)
    for task in mixture.tasks:
        rows_held_out(options, data, task)  # rows to score on are missed before any training
    wanted = [_expert_plan(mixture, index) for index in range(options.moe or 0)]
    folder = options.output / mixture.name
    there = [is_there(plan, library, options.replace) for plan in wanted]
    if all(there) and _is_kept(folder, wanted, library):
        say(f"{len(wanted)} experts and their router are there already: {library.uri}, {folder}")
    else:
        say(f"training {len(wanted)} experts and their router on {', '.join(mixture.tasks)}")
        _train(mixture, wanted, folder, options, base, library)
    rows = _measure(mixture, wanted, folder, options, data, base, library)
    means = {key: mean(row[key] for row in rows) for key in SCORES}
    console().print(table_of(rows, means, "mixture"))
    results = {
        "library": library.uri,
        "model": base.model_id,
        "dataset": data.uri,
        "mixture": str(folder),
        "router": options.router,
        "experts": [plan.name for plan in wanted],
        "tasks": rows,
        "mean": means,
        "generation": library.generation,
        "seconds": round(time.monotonic() - start, 1),
    }
    write_json(options.output / "results.json", results)
    say(f"{results['seconds']:.0f} s; results in {options.output / 'results.json'}")
    say(f"to load it: mttl_routing.RoutedModel.from_pretrained({str(folder)!r})")


def _expert_plan(mixture: Plan, index: int) -> Plan:
    """The part of a mixture's plan that is one expert's."""
    return replace(
        mixture, name=f"{mixture.name}-{index}", recipe=mixture.recipe | {"expert": index}
    )


def _is_kept(folder: Path, wanted: Sequence[Plan], library: ExpertLibrary) -> bool:
    """Whether the folder holds the routed model of the library's experts."""
    try:
        record = json.loads((folder / "routed_model.json").read_text())
    except FileNotFoundError:
        return False
    digests = {plan.name: library.digest(plan.name) for plan in wanted}
    return {entry["name"]: entry["digest"] for entry in record["experts"]} == digests


def _train(
    mixture: Plan,
    wanted: Sequence[Plan],
    folder: Path,
    options: TrainOptions,
    base: BaseModel,
    library: ExpertLibrary,
) -> None:
    checkpoint = mixture.checkpoint(options.output)
    batches, validation = batches_of(mixture, options, base, named=options.by_task)
    with _fresh(wanted, options, base) as routed:
        with bar(f"training {mixture.name}", mixture.steps) as shown:
            report = train(
                routed,
                batches,
                mixture.training,
                experts=True,
                router_learning_rate=options.router_learning_rate,
                balance=options.balance,
                validation=validation,
                checkpoint=checkpoint,
                checkpoint_seconds=options.checkpoint_seconds,
                progress=shown.update,
            )
        if report.resumed_from:
            say(f"{mixture.name}: went on from step {report.resumed_from}")
        trained = _with_metrics(routed, wanted, options, base, report)
        routed.save_pretrained(folder)
    with library.batch(f"train {mixture.name}"):
        for expert in trained:
            there = expert.name in library
            (library.replace_expert if there else library.add_expert)(expert)
    checkpoint.unlink(missing_ok=True)


def _fresh(wanted: Sequence[Plan], options: TrainOptions, base: BaseModel) -> RoutedModel:
    """Experts that change nothing yet, each with an A of its own, and an untrained router."""
    experts = []
    for index, plan in enumerate(wanted):
        weights, config = fresh_adapter(base.model, plan.adapter, options.seed + index)
        experts.append(Expert(info_of(plan, options, base, config), weights))
    try:
        return RoutedModel.from_experts(
            experts,
            options.router,
            options.top_k,
            options.combine,
            base_model=base,
            seed=options.seed,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _with_metrics(
    routed: RoutedModel,
    wanted: Sequence[Plan],
    options: TrainOptions,
    base: BaseModel,
    report: TrainingReport,
) -> list[Expert]:
    """The experts of a trained model, which now say how the training went."""
    found = []
    for plan in wanted:
        expert = routed.expert(plan.name)
        config = expert.expert_info.expert_config or {}
        found.append(replace(expert, expert_info=info_of(plan, options, base, config, report)))
        routed.replace_expert(found[-1])
    return found


def _measure(
    mixture: Plan,
    wanted: Sequence[Plan],
    folder: Path,
    options: TrainOptions,
    data: DatasetLibrary,
    base: BaseModel,
    library: ExpertLibrary,
) -> list[dict[str, Any]]:
    """A row of the table for each task."""
    scoring = Scoring(library, base, options.predict_batch_size, no_score=(PromptError,))
    experts = [library.get_expert(plan.name) for plan in wanted]
    metrics = experts[0].expert_info.metrics
    bases = [base_scores(options, data, scoring, task) for task in mixture.tasks]
    rows = []
    with RoutedModel.from_pretrained(folder, base_model=base) as routed:
        for task, known in zip(mixture.tasks, bases, strict=True):
            asked = rows_held_out(options, data, task)
            method = {"kind": "moe", "recipe": mixture.digest}
            own = scoring.score(asked, mixture.name, routed.tasks(task), experts, method)
            rows.append(row_of(task, [task], [known], [own], metrics))
    return rows
