"""The data of a library's experts: what they are tested on, and what a router learns from."""

from __future__ import annotations

from collections.abc import Sequence

import click
import torch
from eval_options import BY_TASK, EvalOptions

from mttl_adapters import BaseModel
from mttl_data import (
    Batches,
    DatasetLibrary,
    HeldOut,
    PromptWriter,
    Row,
    context_length,
    held_out,
    open_dataset,
)
from mttl_experts import Expert, ExpertLibrary
from mttl_experts.jobs import bar

# Rows that a router learns from at once.
ROUTER_BATCH = 8


class ExpertsData:
    """Rows of the experts' own datasets, written, chosen and cut as each was trained."""

    def __init__(
        self,
        options: EvalOptions,
        library: ExpertLibrary,
        experts: Sequence[Expert],
        base: BaseModel,
    ) -> None:
        """Nothing is opened before it is asked for."""
        self.options, self.library, self.experts, self.base = options, library, experts, base
        self._datasets: dict[str, DatasetLibrary] = {}

    def held_out(self, task: str, expert: Expert, n_shots: int = 0) -> HeldOut:
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

    def prompts(self) -> dict[str, list[dict[str, torch.Tensor]]]:
        """What a router is fitted on, as the model is asked: of each expert, or task (lorauter)."""
        found: dict[str, list[dict[str, torch.Tensor]]] = {}
        for expert in self.experts:
            writer = self._writer(expert)
            for row in self._router_rows(expert):
                whose = row.task_name if self.options.route == "lorauter" else expert.name
                ids = torch.tensor([writer.prompt(row).input_ids])
                found.setdefault(whose, []).append({"input_ids": ids})
        return found

    def batches(self, expert: Expert) -> Batches:
        """The rows of an expert that a router learns from."""
        return self.written(expert, self._router_rows(expert))

    def written(self, expert: Expert, rows: Sequence[Row]) -> Batches:
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
