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
        heads: of :class:`Mhr`; None where an expert has one gate.
        seed: of the initial values.
    """

    per_expert = ("logits",)
    learning_rate = 0.1
    """Of Z, whose numbers go from about 0 to some units; in the paper, too, it is larger than that
    of the skills."""

    def __init__(
        self,
        names: Sequence[str],
        widths: Mapping[str, int],
        tasks: Sequence[str],
        *,
        heads: int | None = None,
        seed: int = 0,
    ) -> None:
        """Draw Z, (tasks, e) or (tasks, q, e) for each module, near 0."""
        super().__init__(names)
        if not tasks:
            raise ValueError("there are no tasks to learn of: the experts name none; give tasks=")
        self.tasks = tuple(tasks)
        generator = torch.Generator().manual_seed(seed)
        split = () if heads is None else (heads,)
        shape = len(self.tasks), *split, len(self.names)
        self.logits = Parameters(
            {path: 2e-3 * torch.rand(shape, generator=generator) - 1e-3 for path in widths}
        )

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor | Chosen:
        """One line for each row, or one for all where they are of one task."""
        columns, shares, tokens = self._by_row(x, layer, rows)
        return Chosen(columns.expand(len(shares), -1), shares, tokens)

    def _by_row(self, x: Tensor, layer: Layer, rows: Rows) -> tuple[Tensor, Tensor, int]:
        """(n,) columns, their shares for each line, and how many tokens a line speaks for."""
        tasks = rows.tasks if isinstance(rows.tasks, tuple) else (rows.tasks,)
        tokens = rows.tokens if isinstance(rows.tasks, tuple) else len(x)
        if len(tasks) * tokens != len(x):
            rows.spread(x.new_zeros(len(tasks), 1))  # its error says what is wrong
        columns = layer.once(
            (self, "enabled", x.device), lambda: torch.tensor(layer.enabled, device=x.device).long()
        )
        lines = [self.line(layer.experts[column]) for column in layer.enabled]
        return columns, self.shares(layer.module, tasks, lines).to(x.device), tokens

    def shares(self, path: str, tasks: Sequence[str | None], lines: Sequence[int]) -> Tensor:
        """(b, n), or (b, q, n) of q heads: what some of the experts weigh for each task."""
        logits = self.logits.of(path)
        known = {task: index for index, task in enumerate(self.tasks)}
        mean = logits.mean(dim=0)
        of_tasks = [mean if task not in known else logits[known[task]] for task in tasks]
        rows = self.of_experts(torch.stack(of_tasks), lines)
        if self.training:
            uniform = torch.rand_like(rows).clamp(1e-6, 1 - 1e-6)
            rows = rows + uniform.logit()
        opened = rows.sigmoid()
        return opened / opened.sum(dim=-1, keepdim=True).clamp_min(1e-12)

    def of_experts(self, parameter: Tensor, lines: Sequence[int]) -> Tensor:
        """Columns of Z."""
        return parameter[..., list(lines)]


class Mhr(Poly):
    """MHR (https://arxiv.org/abs/2211.03831): a gate for each of q heads of an expert.

    Head h of an expert is the h-th of q equal slices of its A along the layer's input, and of its B
    along the output. Each head is blended by gates of its own, those of :class:`Poly`, and the
    layer adds (Σ g s B)(Σ g A)x: with one rank for all experts, and ``combine="before"``, for which
    alone the paper defines it.
    """

    combine = "before"

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        """(t, q, e)."""
        columns, shares, tokens = self._by_row(x, layer, rows)
        lines = shares.new_zeros(*shares.shape[:2], len(layer.experts))
        return lines.index_copy(2, columns, shares).repeat_interleave(tokens, dim=0)
