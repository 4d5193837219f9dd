"""Evaluate a library as one model, merged or routed: ``uv run apps/eval --help``."""

from __future__ import annotations

from typing import Any

import click

from mttl_experts.jobs import JobCommand, known_errors

# Names that the older command line gives to these options.
ALIASES = {
    "eval_metric": "metric",
    "expert_selection": "selection",
    "include_task_source": "task_source",
    "include_template_type": "template_type",
    "library_id": "library",
    "output_dir": "output",
    "pipeline_eval_tasks": "benchmarks",
    "predict_batch_size": "batch_size",
    "recompute_prototypes": "recompute",
    "router_granularity": "granularity",
    "router_temp": "temperature",
    "subsample_test": "test_rows",
    "topk": "top_k",
}

# Keys of apps/train alone, so that one config file does for both.
TRAIN_KEYS = [
    "all", "all_tasks", "alpha", "balance", "checkpoint_seconds", "destination",
    "destination_library_id", "dropout", "epochs", "evaluate_every", "expert_name",
    "finetune_task_name", "layers", "learning_rate", "leave_out_evaluation_tasks", "lora_alpha",
    "lora_dropout", "lora_rank", "micro_batch_size", "modify_layers", "modify_modules", "modules",
    "moe", "num_train_epochs", "remove_phi_eval_tasks", "replace", "router", "scheduler", "seed",
    "steps", "subsample_dev", "task", "total_steps", "train_batch_size", "train_rows",
    "validation_rows", "warmup_proportion", "weight_decay",
]  # fmt: skip


@click.command(
    cls=JobCommand,
    aliases=ALIASES,
    others=TRAIN_KEYS,
    context_settings={"show_default": True, "help_option_names": ["-h", "--help"]},
)
@click.option("--library", default="local://mttldata/library", help="The experts' address.")
@click.option(
    "--merge",
    help="Evaluate the experts merged into one: uniform, ties, core, ...; '?' lists all.",
)
@click.option("--route", help="Evaluate them routed: arrow, spectr, oracle, ...; '?' lists all.")
@click.option("--merge-or-route", help="One option for both, by the older names.")
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    help="Experts that a router which chooses sends a token to. [default: 4]",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    help="The higher, the more equal its weights. [default: 1]",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    help="Fewer experts, where those reach this share of all. [default: off]",
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, max_open=True),
    help="Leave out experts of a smaller share than this. [default: off]",
)
@click.option(
    "--granularity",
    type=click.Choice(["layer", "block", "model"]),
    help="Who shares its decision: no layer, those of a block, all. [default: layer]",
)
@click.option(
    "--router-rows",
    type=click.IntRange(min=1),
    help="Training rows of each expert that centroid, phatgoose, seqr, predictor, lorauter, "
    "retrieval and routers that are trained learn from. [default: 64]",
)
@click.option(
    "--gate-steps",
    type=click.IntRange(min=1),
    help="Training steps of each expert's gates (phatgoose), or of the router (softmax, "
    "product_key, mlp, poly, mhr); what they give is kept in the library. [default: 100, and at "
    "least one for each expert]",
)
@click.option(
    "--then",
    help="Router that shares each token among the experts that --route retrieval finds: arrow, ... "
    "[default: equal shares]",
)
@click.option(
    "--bank-files",
    help="Folder to map the experts' factors from while they are routed, written where they are "
    "not there, so that more experts than memory holds can be. [default: all in memory]",
)
@click.option(
    "--resident-gb",
    type=click.FloatRange(0, min_open=True),
    help="Most gigabytes of memory that --bank-files take. [default: the system decides]",
)
@click.option("--rank", type=click.IntRange(min=1), help="Cut the merged expert to this rank.")
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of entries that ties, dare_*, della or breadcrumbs keeps. [default: the method's]",
)
@click.option("--inside", help="Method inside core, knots, pico or compress_then_merge.")
@click.option("--scale", type=float, help="Multiplies the merge. [default: the method's]")
@click.option("--weights", help="NAME=W,NAME=W ... for the merge. [default: the method's]")
@click.option(
    "--option",
    "merge_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="What the merge method takes besides, such as gamma=0.01; again for more.",
)
@click.option("--selection", help="Only these experts (comma list). [default: all]")
@click.option("--model", help="Base model. [default: the one that the experts are for]")
@click.option("--dataset", help="Tasks. [default: those that the experts were trained on]")
@click.option("--output", default="mttldata/eval", help="Folder for results.json.")
@click.option(
    "--benchmarks",
    help="Instead of the experts' own tasks, lm-evaluation-harness's: arc-easy, ... (comma list); "
    "'in_distribution' stands for the experts' own.",
)
@click.option("--data-dir", help="Folder of the benchmarks' parquet files. [default: the hub]")
@click.option("--test-rows", type=click.IntRange(min=1), help="Most rows a task. [default: all]")
@click.option("--metric", help="How answers are scored. [default: the task's own]")
@click.option("--batch-size", default=32, type=click.IntRange(min=1), help="Rows answered at once.")
@click.option(
    "--max-input-length",
    type=click.IntRange(min=1),
    help="Most tokens of a prompt. [default: as the task's expert was trained]",
)
@click.option(
    "--max-output-length",
    type=click.IntRange(min=1),
    help="Most tokens of an answer. [default: as the task's expert was trained]",
)
@click.option(
    "--task-source",
    help="Use only rows from these collections (comma list). [default: as trained]",
)
@click.option(
    "--template-type",
    help="Use only rows of these template types (comma list). [default: as trained]",
)
@click.option(
    "--precision",
    default="auto",
    type=click.Choice(["auto", "bf16", "16", "32"]),
    help="Number format of the base.",
)
@click.option(
    "--routing-accuracy",
    is_flag=True,
    help="Also tell, layer by layer, what share of a task's tokens is sent to its own expert most.",
)
@click.option("--recompute", is_flag=True, help="Measure again what the library has scores of.")
@click.option("--strict", is_flag=True, help="Refuse a base whose weights or tokenizer differ.")
def main(**options: Any) -> None:
    """Evaluate a library as one model, beside its base and each expert on its own task."""
    from mttl_data import DataError

    with known_errors(DataError):
        from eval_options import check

        job = check(**options)
        from eval_job import run

        from mttl_adapters import AdapterError

    with known_errors(AdapterError, DataError):
        run(job)


if __name__ == "__main__":
    main(prog_name="apps/eval")
