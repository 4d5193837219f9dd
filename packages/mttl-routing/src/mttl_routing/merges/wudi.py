"""WUDI (https://arxiv.org/abs/2503.08099): a sum moved to where experts interfere less."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mttl_routing.merges.linear import linear
from mttl_routing.merges.rule import Update


def wudi(updates: Sequence[Update], *, steps: int = 300, learning_rate: float = 1e-5) -> Tensor:
    """Where Adam gets from Σ ΔW_e in minimising Σ_e ‖(ΔW - ΔW_e) ΔW_eᵀ‖² / ‖ΔW_e‖²; (o, i) float32.

    The loss has a closed-form minimum; the paper's result is the 300 steps of Adam at 1e-5, which
    does not get there, and so is this one. The gradient is written out. As Adam's steps have a
    length of their own, the result does not follow the size of the updates. The paper needs no
    weights and no factor.

    Args:
        updates: of one module.
        steps: of Adam.
        learning_rate: its.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps is {steps!r}; it takes a whole number from 0")
    if not learning_rate > 0.0:
        raise ValueError(f"learning_rate is {learning_rate!r}; it takes a number above zero")
    start = linear([Update(update.factors, 1.0) for update in updates])
    total = start.b @ start.a
    inputs = torch.zeros(total.shape[1], total.shape[1])  # Σ ΔW_eᵀ ΔW_e / ‖ΔW_e‖²
    pull = torch.zeros(total.shape)  # Σ (start - ΔW_e) ΔW_eᵀ ΔW_e / ‖ΔW_e‖²
    for update in updates:
        a, b = update.factors.a.float(), update.scaled_b
        gram = b.T @ b  # (r, r)
        energy = float(((a @ a.T) * gram).sum())
        if energy > 0.0:
            inward = gram / energy @ a  # (r, i)
            inputs.addmm_(a.T, inward)
            # Zero for one expert alone, and not only nearly, from which Adam would walk away.
            pull.addmm_((total - b @ a) @ a.T if len(updates) > 1 else torch.zeros_like(b), inward)
    moved = torch.zeros_like(total)
    optimizer = torch.optim.Adam([moved], lr=learning_rate)
    for _ in range(steps):
        moved.grad = torch.addmm(pull, moved, inputs).mul_(2.0)
        optimizer.step()
    return total + moved
