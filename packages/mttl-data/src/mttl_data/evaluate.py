"""Greedy answers of a causal model to many prompts, and its score on a task.

Written for few cores: what all prompts begin with is run once, rows of like length go together,
only the last position meets the language head, and rows that have ended leave the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mttl_data.errors import EmptyTaskError
from mttl_data.forward import Forward, context_length, evaluating
from mttl_data.metrics import mean_interval, score_answers
from mttl_data.progress import Progress
from mttl_data.prompts import ANSWER_ONLY, PromptWriter, Truncation, end_token_id, truncation
from mttl_data.rows import Row

_SLACK_TOKENS = 4  # room for an answer to be a little longer than the longest target
_ANSWER_SHARE = 2  # an answer takes at most one in this many of the context's tokens
_DROP_SHARE = 8  # ended rows leave once they are one in this many


@dataclass(frozen=True)
class TaskScore:
    """A model's score on the rows of one task.

    Attributes:
        n: Rows scored.
        mean: Their mean score, in [0, 1].
        ci95: Lower and upper end of its 95 % interval (``metrics.mean_interval``).
        answers: What the model wrote, row by row.
        scores: The score of each answer.
        metric: The name in ``METRICS``.
        truncation: What of the prompts was cut, and of the targets could not have been answered.
    """

    n: int
    mean: float
    ci95: tuple[float, float]
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    metric: str
    truncation: Truncation


def evaluate_task(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    metric: str,
    shots: Sequence[Row] = (),
    *,
    instruction: str = ANSWER_ONLY,
    max_input_length: int | None = None,
    max_output_length: int | None = None,
    batch_size: int = 32,
    stop_at_newline: bool = False,
    share_prefix: bool = True,
    progress: Progress | None = None,
) -> TaskScore:
    """Score of a model's greedy answers to the rows.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        rows: What to ask; their targets decide how long an answer may get.
        metric: A name in ``METRICS``.
        shots: Solved examples put before each question; none may be among ``rows``.
        instruction: The line that wants the answer alone.
        max_input_length: Most tokens of a prompt without its examples, as in training.
        max_output_length: Most tokens of an answer. It is never more than the longest target and a
            little, nor than half of the model's context.
        batch_size: Rows answered at a time.
        stop_at_newline: End an answer at its first line break.
        share_prefix: See ``generate_answers``.
        progress: Told how many rows are answered.
    """
    if not rows:
        raise EmptyTaskError("no rows to score a model on")
    lengths = [len(tokenizer(row.target, add_special_tokens=False).input_ids) for row in rows]
    most = [max(lengths) + 1 + _SLACK_TOKENS]
    context = context_length(model)
    most += [] if max_output_length is None else [max_output_length]
    most += [] if context is None else [context // _ANSWER_SHARE]
    max_new_tokens = min(most)
    writer = PromptWriter(
        tokenizer,
        shots=shots,
        instruction=instruction,
        max_length=context,
        max_input_length=max_input_length,
    )
    prompts = [
        replace(
            writer.prompt(row, room=max_new_tokens),
            target_tokens_cut=max(0, length + 1 - max_new_tokens),
        )
        for row, length in zip(rows, lengths, strict=True)
    ]
    answers = generate_answers(
        model,
        tokenizer,
        [prompt.input_ids for prompt in prompts],
        max_new_tokens,
        batch_size,
        progress,
        stop_at_newline=stop_at_newline,
        share_prefix=share_prefix,
    )
    scores = score_answers(metric, answers, rows)
    interval = mean_interval(scores)
    return TaskScore(
        n=interval.n,
        mean=interval.mean,
        ci95=(interval.low, interval.high),
        answers=tuple(answers),
        scores=tuple(scores),
        metric=metric,
        truncation=truncation(prompts),
    )


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    progress: Progress | None = None,
    *,
    stop_at_newline: bool = False,
    share_prefix: bool = True,
) -> list[str]:
    """The model's greedy answer to each prompt, as text without special tokens.

    Args:
        model: Any causal language model of transformers.
        tokenizer: Its tokenizer.
        prompts: Token ids; none may be empty.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts answered at a time.
        progress: Told how many prompts are answered.
        stop_at_newline: End an answer at its first line break after some text.
        share_prefix: Run what all prompts begin with only once. A model that decides something at
            prefill from the whole prompt must be asked without.
    """
    stops = {end_token_id(tokenizer)}
    if tokenizer.eos_token_id is not None:
        stops.add(int(tokenizer.eos_token_id))
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops.update([own] if isinstance(own, int) else own or ())

    def ended(ids: list[int]) -> bool:
        if ids[-1] in stops:
            return True
        return stop_at_newline and "\n" in tokenizer.decode(ids).lstrip()

    answers = greedy(
        model,
        prompts,
        max_new_tokens,
        ended=ended,
        batch_size=batch_size,
        share_prefix=share_prefix,
        progress=progress,
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    return [text.split("\n", 1)[0].rstrip() for text in texts] if stop_at_newline else texts


def greedy(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    ended: Callable[[list[int]], bool],
    batch_size: int = 32,
    share_prefix: bool = True,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The most likely next tokens of each prompt, one after the other, in the order of the prompts.

    Args:
        model: Any causal language model of transformers.
        prompts: Token ids; none may be empty.
        max_new_tokens: Most tokens for each.
        ended: Told the new tokens so far of one prompt; true when no more are wanted.
        batch_size: Prompts run at a time.
        share_prefix: Run what all prompts begin with only once.
        progress: Told how many prompts have ended.
    """
    if not all(prompts):
        raise ValueError("a prompt needs at least one token")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            "batch_size and max_new_tokens must be at least 1, "
            f"not {batch_size!r} and {max_new_tokens!r}"
        )
    answers: list[list[int]] = [[] for _ in prompts]
    if not prompts:
        return answers
    with evaluating(model):
        run = Forward(model)
        prefix, cache = _shared_prefix(run, prompts) if share_prefix else (0, None)
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        done = 0

        def told(n: int) -> None:
            nonlocal done
            done += n
            if progress is not None:
                progress("", done, len(prompts))

        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            suffixes = [prompts[index][prefix:] for index in chosen]
            new = _answer_batch(run, cache, prefix, suffixes, max_new_tokens, ended, told)
            for index, ids in zip(chosen, new, strict=True):
                answers[index] = ids
    return answers


def _shared_prefix(run: Forward, prompts: Sequence[Sequence[int]]) -> tuple[int, Any]:
    """Length of what all prompts begin with, and its cache of batch 1; (0, None) if not of use.

    Padding comes between the prefix and the rest, so only plain attention may share: a sliding
    window or a recurrent state would count the padding.
    """
    from transformers.cache_utils import DynamicLayer

    listed = [list(prompt) for prompt in prompts]
    low, high = min(listed), max(listed)  # in lexical order, so these two differ the earliest
    length = 0
    most = min(len(prompt) for prompt in prompts) - 1
    while length < most and low[length] == high[length]:
        length += 1
    if length == 0 or len(prompts) == 1 or not run.takes_positions:
        return 0, None
    ids = torch.tensor([low[:length]], device=run.device)
    positions = torch.arange(length, device=run.device)[None]
    cache = run(ids, None, torch.ones_like(ids), positions)[1]
    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer) is not DynamicLayer for layer in layers):
        return 0, None
    return length, cache


def _answer_batch(
    run: Forward,
    prefix_cache: Any,
    prefix: int,
    suffixes: list[Sequence[int]],
    max_new_tokens: int,
    ended: Callable[[list[int]], bool],
    told: Callable[[int], object],
) -> list[list[int]]:
    rows = len(suffixes)
    longest = max(len(suffix) for suffix in suffixes)
    pads = torch.tensor([longest - len(suffix) for suffix in suffixes])
    ids = torch.tensor(
        [[0] * (longest - len(suffix)) + list(suffix) for suffix in suffixes], device=run.device
    )
    cache = None
    if prefix_cache is not None:
        cache = copy.deepcopy(prefix_cache)
        cache.batch_repeat_interleave(rows)
    columns = torch.arange(longest)[None]  # (1, s)
    real = (columns >= pads[:, None]).long()  # (b, s)
    mask = torch.cat([torch.ones(rows, prefix, dtype=torch.long), real], dim=1).to(run.device)
    positions = (prefix + (columns - pads[:, None]).clamp(min=0)).to(run.device)
    answers: list[list[int]] = [[] for _ in suffixes]
    alive = list(range(rows))  # which answer each row of the batch belongs to
    open_rows = set(alive)
    while True:
        logits, cache = run(ids, cache, mask, positions)
        tokens = logits[:, -1].argmax(dim=-1)
        before = len(open_rows)
        for index, token in zip(alive, tokens.tolist(), strict=True):
            if index in open_rows:
                answers[index].append(token)
                if len(answers[index]) == max_new_tokens or ended(answers[index]):
                    open_rows.discard(index)
        if before > len(open_rows):
            told(before - len(open_rows))
        if not open_rows:
            return answers
        positions = positions[:, -1:] + 1
        ids = tokens[:, None]
        if (len(alive) - len(open_rows)) * _DROP_SHARE >= len(alive):
            kept = [at for at, index in enumerate(alive) if index in open_rows]
            alive = [alive[at] for at in kept]
            chosen = torch.tensor(kept, device=run.device)
            ids, mask, positions = ids[chosen], mask[chosen], positions[chosen]
            cache.batch_select_indices(chosen)
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
