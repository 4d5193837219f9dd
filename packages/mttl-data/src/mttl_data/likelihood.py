"""How likely a causal model finds given continuations of given contexts.

Multiple choice asks for several continuations of one context, so a context is run once and its
cache serves them all, and only positions that are scored meet the language head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mttl_data.forward import Forward, evaluating
from mttl_data.progress import Progress

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """The score of one continuation.

    Attributes:
        logprob: Sum of the natural logarithms of its tokens' probabilities.
        greedy: Whether each of its tokens was the most likely one.
    """

    logprob: float
    greedy: bool


def likelihoods(
    model: Any,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch_size: int = 16,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation after its context.

    Args:
        model: Any causal language model of transformers.
        requests: (context, continuation) token ids; neither may be empty.
        batch_size: Contexts run at a time.
        max_length: Most tokens given to the model; a longer context loses its first ones.
        progress: Told how many requests are answered.
    """
    groups: dict[Ids, list[tuple[int, Ids]]] = {}
    for index, (context, continuation) in enumerate(requests):
        if not context or not continuation:
            raise ValueError("a context and a continuation need at least one token each")
        kept = tuple(context)
        if max_length is not None:  # the continuation's last token is never fed
            room = max_length + 1 - len(continuation)
            if room < 1:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens does not fit into {max_length}"
                )
            kept = kept[-room:]
        groups.setdefault(kept, []).append((index, tuple(continuation)))
    found: dict[int, Likelihood] = {}
    contexts = sorted(groups, key=len, reverse=True)
    run = Forward(model)
    with evaluating(model):
        for at in range(0, len(contexts), batch_size):
            batch = contexts[at : at + batch_size]
            asked = [(row, *entry) for row, ids in enumerate(batch) for entry in groups[ids]]
            scores = _score_batch(run, batch, [(row, ids) for row, _, ids in asked])
            for (_, index, _), score in zip(asked, scores, strict=True):
                found[index] = score
            if progress is not None:
                progress("", len(found), len(requests))
    return [found[index] for index in range(len(requests))]


def _score_batch(
    run: Forward, contexts: Sequence[Ids], asked: Sequence[tuple[int, Ids]]
) -> list[Likelihood]:
    """Scores of continuations; each names the row of its context."""
    lengths = torch.tensor([len(context) for context in contexts], device=run.device)
    longest = int(lengths.max())
    ids = torch.tensor(
        [(0,) * (longest - len(context)) + context for context in contexts], device=run.device
    )
    place = torch.arange(longest, device=run.device)[None] - (longest - lengths)[:, None]
    mask = (place >= 0).long()
    logits, cache = run(ids, None, mask, place.clamp(min=0))
    first = logits[:, -1].float().log_softmax(-1)  # (b, vocabulary)
    logprobs = [[float(first[row, ids[0]])] for row, ids in asked]
    greedy = [bool(first[row].argmax() == ids[0]) for row, ids in asked]
    longer = [at for at, (_, ids) in enumerate(asked) if len(ids) > 1]
    if longer:
        rows = torch.tensor([asked[at][0] for at in longer], device=run.device)
        cache.batch_select_indices(rows)
        fed = [asked[at][1][:-1] for at in longer]
        for at, after in zip(
            longer, _after(run, cache, mask[rows], lengths[rows], fed), strict=True
        ):
            targets = torch.tensor(asked[at][1][1:], device=run.device)
            scores = after.float().log_softmax(-1)  # (tokens, vocabulary)
            logprobs[at] += scores.gather(-1, targets[:, None])[:, 0].tolist()
            greedy[at] = greedy[at] and bool((scores.argmax(-1) == targets).all())
    return [Likelihood(sum(parts), same) for parts, same in zip(logprobs, greedy, strict=True)]


def _after(
    run: Forward, cache: Any, mask: Tensor, lengths: Tensor, fed: Sequence[Ids]
) -> list[Tensor]:
    """(tokens, vocabulary) logits after each token fed, for each row of the cache."""
    longest = max(len(ids) for ids in fed)
    ids = torch.tensor([row + (0,) * (longest - len(row)) for row in fed], device=run.device)
    columns = torch.arange(longest, device=run.device)[None]
    real = columns < torch.tensor([len(row) for row in fed], device=run.device)[:, None]
    mask = torch.cat([mask, real.long()], dim=1)
    logits, _ = run(ids, cache, mask, lengths[:, None] + columns, last=longest)
    return [logits[row, : len(ids)] for row, ids in enumerate(fed)]
