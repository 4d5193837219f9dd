"""PHATGOOSE (https://arxiv.org/abs/2402.05859): each token to the experts whose gates open for it.

A gate is trained for each expert by itself, after the expert and with it frozen, so that the layer
adds sigmoid(⟨g, x⟩)·ΔW x. Later the gates of all experts are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mttl_adapters import TrainingConfig
from mttl_adapters.progress import Progress
from mttl_experts import Expert, lora_modules
from mttl_routing.routers.data import Batch, routed_alone
from mttl_routing.routers.protocol import Layer, Rows
from mttl_routing.routers.vectors import VectorRouter

STEPS = 100
LEARNING_RATE = 1e-3
RECIPE = {"kind": "phatgoose-gates", "format": 2}


class _Sigmoid(nn.Module):
    """The router of one expert while its gates are trained: it opens by sigmoid(⟨g, x⟩)."""

    def __init__(self, widths: dict[str, int], device: torch.device) -> None:
        super().__init__()
        self.paths = list(widths)
        self.vectors = nn.ParameterList(torch.zeros(n, device=device) for n in widths.values())

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        vector = self.vectors[self.paths.index(layer.module)]
        opened: Tensor = (x.to(vector.dtype) @ vector).sigmoid()
        return opened.unsqueeze(1)


def train_gates(
    base: object,
    expert: Expert,
    batches: Iterable[Batch],
    *,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Gate vector of each module that an expert adapts, trained on its own data.

    By AdamW from zeros, one batch a step, over and over until ``steps``; nothing else moves.

    Args:
        base: the base model, bare or from ``load_base_model``; the expert is put in meanwhile.
        expert: whose gates are trained.
        batches: its data, with labels, at least one.
        steps: of training.
        learning_rate: constant.
        progress: told of each step, and whose gates are trained.

    Returns:
        (i,) float32 by module path.
    """
    from mttl_routing.training import train

    def tell(_: str, done: int, total: int | None) -> None:
        if progress is not None:
            progress(f"gates of {expert.name}", done, total)

    held = list(batches)
    if not held:
        raise ValueError(f"no batches were given for expert {expert.name!r}; gates need some")
    tell("", 0, steps)
    widths = {path: f.a.shape[1] for path, f in lora_modules(expert).items()}
    config = TrainingConfig(
        learning_rate=learning_rate,
        scheduler="constant",
        warmup_proportion=0.0,
        max_grad_norm=0.0,
    )
    with routed_alone(base, expert, lambda device: _Sigmoid(widths, device)) as routed:
        train(routed, [held[step % len(held)] for step in range(steps)], config, progress=tell)
        router = routed.router
        return {
            path: vector.detach().float().cpu()
            for path, vector in zip(router.paths, router.vectors, strict=True)
        }


class Phatgoose(VectorRouter):
    """Scores ⟨LN(x), LN(g_e)⟩/√i of the token and the expert's gate, both standardised.

    The paper takes ``Choice(top_k=2)``.

    Args:
        vectors: :func:`train_gates` of each expert, by expert name.
        choice: how scores become gates.
    """

    def key(self, vector: Tensor) -> Tensor:
        """The gate less its mean, over its standard deviation; zeros where it has none."""
        centred = vector - vector.mean()
        return centred / centred.std(correction=0).clamp_min(torch.finfo(torch.float32).tiny)

    def scale(self, x: Tensor) -> Tensor:
        """One over the standard deviation of x and √i.

        The mean of x needs no taking off: a standardised gate has none, so it drops out.
        """
        deviation = x.std(dim=1, correction=0, keepdim=True)
        return 1.0 / (deviation * math.sqrt(x.shape[1])).clamp_min(torch.finfo(torch.float32).tiny)
