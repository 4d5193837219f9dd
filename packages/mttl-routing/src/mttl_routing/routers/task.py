"""Each row to the expert of its task, told by name: the oracle that routers are compared with."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mttl_experts import Expert
from mttl_routing.routers.protocol import Prompt


class Task:
    """Gates by the task of a row.

    The tasks come from the caller, by ``routed.tasks(...)`` or ``task_names=``. Experts that share
    a task share its gate equally, those switched off left out. A row whose task is None gets the
    base model alone.

    Args:
        tasks: tasks of each expert, by expert name.
    """

    def __init__(self, tasks: Mapping[str, tuple[str, ...]]) -> None:
        """Keep which tasks each expert has."""
        self._tasks = dict(tasks)

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Take up the tasks of new experts, and forget those of others."""
        kept = {name: tasks for name, tasks in self._tasks.items() if name not in set(removed)}
        self._tasks = kept | {expert.name: expert.expert_info.tasks for expert in added}

    def decide(self, prompt: Prompt) -> Tensor:
        """(b, e), the same for all tokens of a row and in every layer."""
        tasks = prompt.tasks
        if tasks is None:
            raise ValueError(
                "routing by task needs the task of each row: call the model with task_names=[...], "
                "or inside `with routed.tasks([...]):`"
            )
        n_rows = len(prompt.input_ids)
        if isinstance(tasks, str):
            tasks = (tasks,) * n_rows
        if len(tasks) != n_rows:
            raise ValueError(f"tasks are named for {len(tasks)} rows, the batch has {n_rows}")
        gates = torch.zeros(n_rows, len(prompt.experts), device=prompt.input_ids.device)
        for row, task in enumerate(tasks):
            columns = [] if task is None else self._columns(task, prompt)
            gates[row, columns] = 1.0 / max(1, len(columns))
        return gates

    def _columns(self, task: str, prompt: Prompt) -> list[int]:
        """Columns of the experts of a task that may be chosen."""
        known = self._tasks
        if not any(task in tasks for tasks in known.values()):
            every = sorted({task for tasks in known.values() for task in tasks})
            near = difflib.get_close_matches(task, every, n=3)
            raise ValueError(
                f"no expert of this model has task {task!r}; "
                f"{'did you mean' if near else 'there are'} "
                f"{', '.join(map(repr, near or every[:5]))}{'?' if near else ''}"
            )
        return [
            column for column in prompt.enabled if task in known.get(prompt.experts[column], ())
        ]
