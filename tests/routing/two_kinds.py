"""Tokens of two kinds, for each of which one of two experts is right."""

import torch

from mttl_routing import apply_expert

NAMES = ("anna", "bert")
KINDS = (slice(2, 5), slice(31, 34))  # token ids


def two_experts(make_expert):
    """Two that change the last thing the model does, so that a wrong one costs much."""
    return [make_expert(name, targets=("down_proj",), layers=(1,), size=1.0) for name in NAMES]


def ids_of(kind: int, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 10 * kind)
    return torch.randint(KINDS[kind].start, KINDS[kind].stop, (rows, 8), generator=generator)


def rows_of(base, expert, kind: int, seed: int) -> dict:
    """Four rows of a kind, whose labels are what the expert says."""
    ids = ids_of(kind, 4, seed=seed)
    with torch.no_grad(), apply_expert(base, expert) as routed:
        said = routed(ids).logits.argmax(-1)
    labels = torch.cat([torch.full((4, 1), -100), said[:, :-1]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def accuracy(routed) -> float:
    """Share of tokens, not learned from, of which the expert of their kind gets the most."""
    right, tokens = 0, 0
    for kind, name in enumerate(NAMES):
        ids = ids_of(kind, 16, seed=7)
        with routed.trace() as trace, torch.no_grad():
            routed(ids, task_names=name)
        table = trace.table()
        own = [w for w, who in zip(table["weight"], table["expert"], strict=True) if who == name]
        right += sum(weight > 0.5 for weight in own)  # one that was not chosen has no line
        tokens += ids.numel()
    return right / tokens
