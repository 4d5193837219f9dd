"""Train experts and add them to a library: ``uv run apps/train --help``."""

from __future__ import annotations

from typing import Any

import click

from mttl_experts.jobs import JobCommand, known_errors

# Names that the older command line gives to these options.
ALIASES = {
    "destination_library_id": "destination",
    "eval_metric": "metric",
    "finetune_task_name": "task",
    "include_task_source": "task_source",
    "include_template_type": "template_type",
    "library_id": "library",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_rank": "rank",
    "modify_layers": "layers",
    "modify_modules": "modules",
    "num_train_epochs": "epochs",
    "output_dir": "output",
    "pipeline_eval_tasks": "benchmarks",
    "remove_phi_eval_tasks": "leave_out_evaluation_tasks",
    "subsample_dev": "validation_rows",
    "subsample_test": "test_rows",
    "topk": "top_k",
    "total_steps": "steps",
    "train_batch_size": "batch_size",
}

at_least_1 = click.IntRange(min=1)


# Keys of apps/eval alone, so that one config file does for both.
EVAL_KEYS = [
    "bank_files", "density", "expert_selection", "gate_steps", "granularity", "inside", "merge",
    "merge_options", "merge_or_route", "option", "recompute", "recompute_prototypes",
    "resident_gb", "route", "router_granularity", "router_rows", "router_temp",
    "routing_accuracy", "scale", "selection", "strict", "temperature", "then", "threshold",
    "top_p", "weights",
]  # fmt: skip


@click.command(
    cls=JobCommand,
    aliases=ALIASES,
    others=EVAL_KEYS,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.option(
    "--task",
    multiple=True,
    help="Train one expert on this task; may be repeated. 'a,b' is one expert for both. "
    "[default: four tasks of the starter mixture]",
)
@click.option("--all", "all_tasks", is_flag=True, help="Train one expert on each task there is.")
@click.option(
    "--moe",
    type=click.IntRange(min=2),
    help="Train so many fresh experts and their router together, as one mixture, on all the tasks.",
)
@click.option(
    "--router",
    type=click.Choice(["softmax", "rkhs", "product_key", "mlp", "poly", "mhr"]),
    help="With --moe: what sends tokens to experts; poly and mhr learn a blend of all for each "
    "task, and average factors. [default: softmax]",
)
@click.option(
    "--top-k",
    type=at_least_1,
    help="With --moe: experts a token gets. [default: 2; mlp, poly and mhr: all]",
)
@click.option(
    "--balance",
    type=click.FloatRange(0),
    help="With --moe: weight of the loss that evens out the experts' use; 0 for mlp, poly and "
    "mhr, which use all of them. [default: 0.01]",
)
@click.option("--model", default="embedded", help="Base model: 'embedded', a folder or a hub id.")
@click.option(
    "--dataset",
    default="starter",
    help="Tasks: 'starter', a dataset library's address, a folder of parquet or jsonl files, or "
    "hf://chiayewken/flan-v2.",
)
@click.option("--library", default="local://mttldata/library", help="Where experts are added.")
@click.option("--destination", help="Copy the library here first, and add the experts to the copy.")
@click.option(
    "--expert-name",
    help="Name of the expert, for one --task, or of the mixture. [default: the task, or 'moe']",
)
@click.option("--replace", is_flag=True, help="Put new experts in place of others of their name.")
@click.option("--output", default="mttldata/train", help="Folder for results and checkpoints.")
@click.option("--rank", default=16, type=at_least_1, help="LoRA rank.")
@click.option("--alpha", type=float, help="LoRA alpha. [default: twice the rank]")
@click.option("--dropout", default=0.0, type=click.FloatRange(0, 1, max_open=True), help="LoRA's.")
@click.option("--layers", default=".*", help="Regular expression for names of adapted layers.")
@click.option("--modules", default=".*", help="Regular expression for the modules they are in.")
@click.option("--steps", type=at_least_1, help="Optimiser steps. [default: 40, or --epochs]")
@click.option("--epochs", type=at_least_1, help="Passes over the training rows, for --steps.")
@click.option("--batch-size", default=8, type=at_least_1, help="Rows in a step.")
@click.option("--micro-batch-size", type=at_least_1, help="Rows in a forward pass. [default: all]")
@click.option("--learning-rate", default=2e-3, type=click.FloatRange(0, min_open=True))
@click.option("--warmup-proportion", default=0.06, type=click.FloatRange(0, 1))
@click.option("--weight-decay", default=0.0, type=click.FloatRange(0))
@click.option("--scheduler", default="linear", help="A schedule that transformers knows.")
@click.option("--evaluate-every", type=at_least_1, help="Steps between two validations.")
@click.option("--max-input-length", type=at_least_1, help="Most tokens of a prompt.")
@click.option("--max-output-length", type=at_least_1, help="Most tokens of an answer.")
@click.option(
    "--precision",
    default="auto",
    type=click.Choice(["auto", "bf16", "16", "32"]),
    help="Number format of the base; adapters are always 32-bit.",
)
@click.option(
    "--checkpoint-seconds", default=10.0, help="Time between two checkpoints of a training."
)
@click.option("--seed", default=0, help="Of initial weights, dropout and the order of rows.")
@click.option(
    "--train-rows", type=at_least_1, help="Most rows of a task to train on. [default: all]"
)
@click.option(
    "--validation-rows",
    default=32,
    type=click.IntRange(min=0),
    help="Most rows a task; 0: none.",
)
@click.option("--test-rows", type=at_least_1, help="Most rows to score on. [default: all]")
@click.option("--metric", help="How answers are scored. [default: the task's own]")
@click.option("--predict-batch-size", default=32, type=at_least_1, help="Rows answered at once.")
@click.option(
    "--benchmarks",
    help="Also measure on these, by lm-evaluation-harness: arc-easy, piqa, ... (comma list).",
)
@click.option("--data-dir", help="Folder of the benchmarks' parquet files. [default: the hub]")
@click.option("--task-source", help="Use only rows from these collections (comma list).")
@click.option("--template-type", help="Use only rows of these template types (comma list).")
@click.option(
    "--leave-out-evaluation-tasks/--keep-evaluation-tasks",
    default=True,
    help="With --all, leave out tasks that overlap the benchmarks.",
)
def main(**options: Any) -> None:
    """Train experts on tasks and add them to a library, each with its scores."""
    from mttl_data import DataError

    with known_errors(DataError):
        from train_options import check

        job = check(**options)
        if job.moe:
            from train_moe import run
        else:
            from train_job import run

        from mttl_adapters import AdapterError

    with known_errors(AdapterError, DataError):
        run(job)


if __name__ == "__main__":
    main(prog_name="apps/train")
