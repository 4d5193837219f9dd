"""Multiple-choice benchmarks of lm-evaluation-harness, over a model that is in memory.

Prompts, scoring and metrics are the harness's own; the rows come from local parquet files or from
the hub, and the likelihoods from ``likelihood``.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mttl_data.errors import DataNotReachableError, TruncationWarning, unknown_task
from mttl_data.hub import hub_dataset
from mttl_data.likelihood import likelihoods
from mttl_data.metrics import mean_interval
from mttl_data.progress import Progress


@dataclass(frozen=True)
class Benchmark:
    """A task as the harness defines it, and where its rows lie.

    Attributes:
        dataset: Id on the hub. Locally its last part is the folder's name.
        config: Configuration, and the folder inside; None for none.
        split: The one that is scored.
        text: The harness's ``doc_to_text``.
        target: Its ``doc_to_target``: the place of the right choice.
        choice: Its ``doc_to_choice``.
        normalised: Whether it also defines ``acc_norm``.
        source: The paper.
    """

    dataset: str
    config: str | None
    split: str
    text: str
    target: Any
    choice: Any
    normalised: bool
    source: str


@dataclass(frozen=True)
class BenchmarkScore:
    """A model's score on one benchmark.

    Attributes:
        n: Rows scored.
        acc: Share of rows whose right choice is the likeliest.
        acc_ci95: Its 95 % interval.
        acc_norm: The same with likelihoods taken per character; None where it is not defined.
        acc_norm_ci95: Its 95 % interval.
        cut: Rows whose text did not fit into the model's context and lost its beginning.
    """

    n: int
    acc: float
    acc_ci95: tuple[float, float]
    acc_norm: float | None
    acc_norm_ci95: tuple[float, float] | None
    cut: int

    @property
    def metric(self) -> str:
        """The one of both that stands for the benchmark: ``acc_norm`` where it is defined.

        So it was in the evaluations that this library of experts is compared with, where the
        likelihood of a choice is taken per token.
        """
        return "acc" if self.acc_norm is None else "acc_norm"


_LABELLED = "{{choices.label.index(answerKey.lstrip())}}"


def _arc(config: str) -> Benchmark:
    return Benchmark(
        "allenai/ai2_arc",
        config,
        "test",
        "Question: {{question}}\nAnswer:",
        _LABELLED,
        "{{choices.text}}",
        True,
        "https://arxiv.org/abs/1803.05457",
    )


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        "arc-challenge": _arc("ARC-Challenge"),
        "arc-easy": _arc("ARC-Easy"),
        "boolq": Benchmark(
            "aps/super_glue",
            "boolq",
            "validation",
            "{{passage}}\nQuestion: {{question}}?\nAnswer:",
            "label",
            ["no", "yes"],
            False,
            "https://arxiv.org/abs/1905.10044",
        ),
        "openbookqa": Benchmark(
            "allenai/openbookqa",
            "main",
            "test",
            "question_stem",
            _LABELLED,
            "{{choices.text}}",
            True,
            "https://arxiv.org/abs/1809.02789",
        ),
        "piqa": Benchmark(
            "baber/piqa",
            None,
            "validation",
            "Question: {{goal}}\nAnswer:",
            "label",
            "{{[sol1, sol2]}}",
            True,
            "https://arxiv.org/abs/1911.11641",
        ),
    }
)


def evaluate_benchmarks(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    data_dir: str | PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> dict[str, BenchmarkScore]:
    """A model's score on each benchmark, without solved examples and without a chat template.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        names: Names in ``BENCHMARKS``; ``_`` and capitals are taken too.
        data_dir: A folder with hub-shaped folders of parquet files, such as
            ``ai2_arc/ARC-Easy/test.parquet``; the hub if left out.
        limit: First rows of each alone.
        batch_size: Questions run at a time.
        progress: Told how many choices are scored.

    Raises:
        UnknownTaskError: No such benchmark.
        DataNotReachableError: Its rows are neither in ``data_dir`` nor to be had from the hub.
    """
    chosen = benchmark_names(names)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit!r}")
    if not chosen:
        return {}
    rows = {name: _rows(name, data_dir) for name in chosen}
    with _quiet():
        from lm_eval import evaluator
        from lm_eval.api.task import ConfigurableTask

        tasks = {
            name: ConfigurableTask(config=_config(name, BENCHMARKS[name], table))
            for name, table in rows.items()
        }
        harness = _harness_model(model, tokenizer, batch_size, progress)
        results = evaluator.evaluate(
            lm=harness,
            task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
        )
    scores = {name: _score(results["samples"][name], harness.cut) for name in chosen}
    for name, score in scores.items():
        if score.cut:
            warnings.warn(
                f"{name}: of {score.n} rows, {score.cut} were longer than the model's "
                f"{harness.max_length} tokens and lost their beginning",
                TruncationWarning,
                stacklevel=2,
            )
    return scores


def check_benchmarks(names: Sequence[str], data_dir: str | PathLike[str] | None = None) -> None:
    """Raise what ``evaluate_benchmarks`` would for names and rows that are not to be had."""
    for name in benchmark_names(names):
        _rows(name, data_dir)


def benchmark_names(names: Sequence[str]) -> list[str]:
    """The names in ``BENCHMARKS`` that are meant, each once; ``all`` alone means all of them."""
    wanted = list(BENCHMARKS) if list(names) == ["all"] else map(benchmark_name, names)
    return list(dict.fromkeys(wanted))


def benchmark_name(name: str) -> str:
    """The name in ``BENCHMARKS`` that is meant; ``UnknownTaskError`` lists the known."""
    plain = name.strip().lower().replace("_", "-")
    if plain not in BENCHMARKS:
        raise unknown_task(name, "the benchmarks", BENCHMARKS)
    return plain


def _rows(name: str, data_dir: str | PathLike[str] | None) -> Any:
    """The benchmark's rows as a ``datasets.Dataset``."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    benchmark = BENCHMARKS[name]
    folder = benchmark.dataset.rpartition("/")[2]
    inner = "/".join(filter(None, [folder, benchmark.config]))
    needed = f"{inner}/{benchmark.split}.parquet"
    if data_dir is None:
        return hub_dataset(
            benchmark.dataset,
            benchmark.config,
            benchmark.split,
            f"pass data_dir=PATH, a folder with {needed}",
        )
    root = Path(data_dir)
    places = [root / inner, root / benchmark.dataset / (benchmark.config or "")]
    if benchmark.config:
        places.append(root / benchmark.config)
    for place in [*places, root]:
        files = [place / f"{benchmark.split}.parquet"]
        files = [file for file in files if file.is_file()]
        files = files or sorted(place.glob(f"{benchmark.split}-*.parquet"))
        if files:
            return datasets.Dataset(pa.concat_tables([pq.read_table(file) for file in files]))
    raise DataNotReachableError(
        f"benchmark {name!r} needs {needed}, which is not under data_dir={str(data_dir)!r}; "
        "pass a data_dir that has it, or none to take it from the hub"
    )


def _config(name: str, benchmark: Benchmark, rows: Any) -> dict[str, Any]:
    metrics = ["acc", "acc_norm"] if benchmark.normalised else ["acc"]
    return {
        "task": name,
        "custom_dataset": lambda **_: {benchmark.split: rows},
        "output_type": "multiple_choice",
        "test_split": benchmark.split,
        "doc_to_text": benchmark.text,
        "doc_to_target": benchmark.target,
        "doc_to_choice": benchmark.choice,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in metrics
        ],
    }


def _harness_model(model: Any, tokenizer: Any, batch_size: int, progress: Progress | None) -> Any:
    """The model as the harness wants it, scoring with ``likelihood`` and without its bars."""
    from lm_eval.models.huggingface import HFLM

    class InMemory(HFLM):  # type: ignore[misc]
        cut: frozenset[str] = frozenset()

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> Any:
            self.cut = frozenset(
                texts[0]
                for texts, context, continuation in requests
                if len(context) + len(continuation) > self.max_length + 1
            )
            found = likelihoods(
                self.model,
                [(context, continuation) for _, context, continuation in requests],
                batch_size=batch_size,
                max_length=self.max_length,
                progress=progress,
            )
            return [(score.logprob, score.greedy) for score in found]

    was_training = model.training
    harness = InMemory(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    model.train(was_training)
    return harness


def _score(samples: Sequence[Mapping[str, Any]], cut: frozenset[str]) -> BenchmarkScore:
    acc = mean_interval([float(sample["acc"]) for sample in samples])
    norm = None
    if "acc_norm" in samples[0]:
        norm = mean_interval([float(sample["acc_norm"]) for sample in samples])
    return BenchmarkScore(
        n=acc.n,
        acc=acc.mean,
        acc_ci95=(acc.low, acc.high),
        acc_norm=None if norm is None else norm.mean,
        acc_norm_ci95=None if norm is None else (norm.low, norm.high),
        cut=sum(sample["arguments"][0][0] in cut for sample in samples),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness without its log lines and without the bar that it shows while building."""
    from unittest.mock import patch

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import lm_eval.api.task as building

        with patch.object(building, "tqdm", lambda rows, **_: rows):
            yield
    finally:
        logger.setLevel(level)
