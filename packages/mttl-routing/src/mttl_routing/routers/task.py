"""Each row to the expert of its task, told by name: the oracle that routers are compared with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

import torch
from torch import Tensor

from mttl_routing.routers.protocol import Layer, Rows


class Task:
    """Gates by the task of a token's row.

    The tasks come from the caller, by ``routed.tasks(...)`` or ``task_names=``. Experts that share
    a task share its gate equally. A row whose task is None gets the base model alone.

    Args:
        tasks: tasks of each expert, by expert name.
    """

    def __init__(self, tasks: Mapping[str, tuple[str, ...]]) -> None:
        """Keep which experts each task has."""
        self._experts: dict[str, list[str]] = {}
        for expert in sorted(tasks):
            for task in tasks[expert]:
                self._experts.setdefault(task, []).append(expert)

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        """(t, e), the same for all tokens of a row and in every layer."""
        if rows.tasks is None:
            raise ValueError(
                "routing by task needs the task of each row: call the model with task_names=[...], "
                "or inside `with routed.tasks([...]):`"
            )
        if isinstance(rows.tasks, str):
            return self._gate(rows.tasks, layer).to(x.device).expand(x.shape[0], -1)
        per_row = torch.stack([self._gate(task, layer) for task in rows.tasks])
        return rows.spread(per_row.to(x.device))

    def _gate(self, task: str | None, layer: Layer) -> Tensor:
        """(e,) gates of one row."""
        gate = torch.zeros(len(layer.experts))
        if task is None:
            return gate
        if task not in self._experts:
            near = difflib.get_close_matches(task, self._experts, n=3)
            known = near or sorted(self._experts)[:5]
            raise ValueError(
                f"no expert of this model has task {task!r}; "
                f"{'did you mean' if near else 'there are'} {', '.join(map(repr, known))}"
                f"{'?' if near else ''}"
            )
        experts = self._experts[task]
        gate[[layer.experts.index(expert) for expert in experts]] = 1.0 / len(experts)
        return gate
