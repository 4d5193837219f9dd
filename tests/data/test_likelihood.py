from __future__ import annotations

import pytest
import torch

from mttl_data.likelihood import likelihoods


def requests(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> list[int]:
        n = int(torch.randint(1, longest + 1, (1,), generator=generator))
        return torch.randint(3, 259, (n,), generator=generator).tolist()

    made = []
    for _ in range(9):
        context = ids(30)
        made += [(context, ids(6)) for _ in range(4)]
    order = torch.randperm(len(made), generator=generator).tolist()
    return [made[index] for index in order]


def one_by_one(model, asked, max_length=10_000):
    """The plain way: one whole forward for each pair."""
    found = []
    for context, continuation in asked:
        ids = torch.tensor([(context + continuation)[-(max_length + 1) :]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits.log_softmax(-1)[0, -len(continuation) :]
        targets = ids[0, -len(continuation) :]
        logprob = float(logits.gather(-1, targets[:, None]).sum())
        found.append((logprob, bool((logits.argmax(-1) == targets).all())))
    return found


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_scores_are_those_of_whole_forwards(model, batch_size):
    asked = requests()
    found = likelihoods(model, asked, batch_size=batch_size)
    for score, (logprob, greedy) in zip(found, one_by_one(model, asked), strict=True):
        assert score.logprob == pytest.approx(logprob, rel=1e-4, abs=1e-3)
        assert score.greedy == greedy


def test_the_most_likely_continuation_is_greedy(model):
    context = requests()[0][0]
    ids = torch.tensor([context])
    out = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    best = out[0, len(context) :].tolist()
    assert likelihoods(model, [(context, best)])[0].greedy
    assert not likelihoods(model, [(context, [*best[:-1], (best[-1] + 1) % 259])])[0].greedy


def test_a_context_too_long_loses_its_first_tokens(model):
    asked = requests()
    found = likelihoods(model, asked, max_length=12)
    for score, (logprob, _) in zip(found, one_by_one(model, asked, 12), strict=True):
        assert score.logprob == pytest.approx(logprob, rel=1e-4, abs=1e-3)


def test_each_context_is_run_once(model):
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, options: seen.append(tuple(options["input_ids"].shape)),
        with_kwargs=True,
    )
    try:
        likelihoods(model, [([5] * 40, [7, 8]), ([5] * 40, [9, 8, 4]), ([5] * 40, [3])])
    finally:
        hook.remove()
    assert seen == [(1, 40), (2, 2)]


def test_progress_counts_every_request(model):
    done = []
    likelihoods(model, requests(), batch_size=4, progress=lambda *told: done.append(told))
    assert done[-1] == ("", 36, 36)
    assert len(done) == 3


@pytest.mark.parametrize("pair", [([], [5]), ([5], [])])
def test_nothing_to_score_is_an_error(model, pair):
    with pytest.raises(ValueError, match="at least one token"):
        likelihoods(model, [pair])


def test_a_continuation_longer_than_the_context_is_an_error(model):
    with pytest.raises(ValueError, match="does not fit"):
        likelihoods(model, [([5], [6] * 20)], max_length=8)
