"""Polytropon (https://arxiv.org/abs/2202.13914): each task its own blend of skills, the experts.

A matrix Z of tasks by experts is learned for each layer; with ``granularity="model"`` all layers
share the first one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mttl_adapters.chosen import Chosen
from mttl_routing.routers.learned import LearnedRouter, Parameters
from mttl_routing.routers.protocol import Layer, Rows


class Poly(LearnedRouter):
    """Gates sigmoid(Z_t)/Σ sigmoid(Z_t) of a row's task t, the same for all its tokens.

    A row whose task is not among those learned, or that names none, has the average of their lines
    of Z. In training mode the sigmoid is drawn, as in the paper, from a relaxed Bernoulli
    distribution of temperature 1. The paper averages factors, which is ``combine="before"``; the
    other works.

    Args:
        names: of the experts.
        widths: of which only the module paths matter here.
        tasks: that have lines in Z.
        seed: of the initial values.
    """

    def __init__(
        self, names: Sequence[str], widths: Mapping[str, int], tasks: Sequence[str], seed: int = 0
    ) -> None:
        """Draw Z, (tasks, e) for each module, near 0."""
        super().__init__(names)
        if not tasks:
            raise ValueError("there are no tasks to learn of: the experts name none; give tasks=")
        self.tasks = tuple(tasks)
        generator = torch.Generator().manual_seed(seed)
        shape = len(self.tasks), len(self.names)
        self.logits = Parameters(
            {path: 2e-3 * torch.rand(shape, generator=generator) - 1e-3 for path in widths}
        )

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Chosen:
        """One line for each row, or one for all where they are of one task."""
        tasks = rows.tasks if isinstance(rows.tasks, tuple) else (rows.tasks,)
        tokens = rows.tokens if isinstance(rows.tasks, tuple) else len(x)
        if len(tasks) * tokens != len(x):
            rows.spread(x.new_zeros(len(tasks), 1))  # its error says what is wrong
        columns = layer.once(
            (self, "enabled", x.device), lambda: torch.tensor(layer.enabled, device=x.device).long()
        )
        lines = [self.line(layer.experts[column]) for column in layer.enabled]
        shares = self.shares(layer.module, tasks, lines).to(x.device)
        return Chosen(columns.expand(len(tasks), -1), shares, tokens)

    def shares(self, path: str, tasks: Sequence[str | None], lines: Sequence[int]) -> Tensor:
        """(b, n), what some of the experts weigh for each task."""
        logits = self.logits.of(path)
        known = {task: index for index, task in enumerate(self.tasks)}
        mean = logits.mean(dim=0)
        rows = torch.stack([mean if task not in known else logits[known[task]] for task in tasks])[
            :, lines
        ]
        if self.training:
            uniform = torch.rand_like(rows).clamp(1e-6, 1 - 1e-6)
            rows = rows + uniform.logit()
        opened = rows.sigmoid()
        return opened / opened.sum(dim=1, keepdim=True).clamp_min(1e-12)

    def follow(self, added: Sequence[object], removed: Sequence[str]) -> None:
        """As for every learned router; the experts are the columns of Z."""
        names = self.names
        super().follow(added, removed)  # type: ignore[arg-type]
        kept = [n for n, name in enumerate(names) if name in self.names]
        for parameter in self.logits.values():
            parameter.data = parameter.data[:, kept]
