"""What keeps a router that learns from sending all tokens to few experts: losses over its gates."""

from __future__ import annotations

import torch
from torch import Tensor

from mttl_adapters.chosen import NONE, Chosen


def load_balance(probabilities: Tensor, gates: Tensor | Chosen) -> Tensor:
    """N·Σ_e f_e P_e (https://arxiv.org/abs/2101.03961): 1 where the experts are used alike.

    f_e is expert e's share of all choices (for top-1 the share of tokens, as there), without
    gradient, and P_e its mean probability. Where every token is sent to every expert it is 1
    whatever the gates; :func:`mutual_information` has more to say of such a router.

    Args:
        probabilities: (t, e), before any expert is left out; N counts those that are not 0 for all.
        gates: of the same tokens.
    """
    n_tokens, n_experts = probabilities.shape
    chosen = gates if isinstance(gates, Chosen) else Chosen.from_dense(gates)
    picked = chosen.each().experts.flatten()
    counts = torch.bincount(picked[picked != NONE], minlength=n_experts).to(probabilities)
    shares = counts / counts.sum().clamp_min(1.0)
    standing = int((probabilities.detach() > 0).any(dim=0).sum())
    return standing * (shares * probabilities.sum(dim=0)).sum() / max(1, n_tokens)


def mutual_information(probabilities: Tensor) -> Tensor:
    """H(e) - H(e|x) of expert and token, in nats, which a router is to have much of.

    The first is large where experts are used alike, the second small where each token is sent
    decidedly (https://arxiv.org/abs/2306.04640).

    Args:
        probabilities: (t, e).
    """
    marginal = probabilities.sum(dim=0) / max(1, len(probabilities))
    given = _entropy(probabilities).sum() / max(1, len(probabilities))
    return _entropy(marginal) - given


def task_information(probabilities: Tensor, tasks: Tensor) -> Tensor:
    """I(e; task) of expert and task, in nats, by which experts come to differ between tasks.

    As in Mod-Squad (https://arxiv.org/abs/2212.08066): H(e) less the mean of H(e|task), P(e|task)
    being the mean of a task's tokens. Unlike :func:`mutual_information` it leaves tokens of one
    task free to share experts in any way.

    Args:
        probabilities: (t, e).
        tasks: (t,) int64, the task of each token, counted from 0.
    """
    if not len(probabilities):
        return probabilities.sum()
    sums = probabilities.new_zeros(int(tasks.max()) + 1, probabilities.shape[1])
    sums = sums.index_add(0, tasks, probabilities)  # (tasks, e)
    counts = torch.bincount(tasks, minlength=len(sums)).to(probabilities)
    given = _entropy(sums / counts.clamp_min(1.0).unsqueeze(1)) @ counts
    return _entropy(sums.sum(dim=0) / len(probabilities)) - given / len(probabilities)


def _entropy(probabilities: Tensor) -> Tensor:
    # Of a share too small for its number format the logarithm is kept finite, and so the gradient.
    logs = probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log()
    return -(probabilities * logs).sum(dim=-1)
