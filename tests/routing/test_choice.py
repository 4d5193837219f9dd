import itertools
import math

import pytest
import torch

from mttl_routing.routers.choice import Choice


def slow(choice: Choice, scores: list[float], columns: list[int], n_experts: int) -> list[float]:
    """Gates of one token, as the docstring says them."""
    pairs = zip(scores, columns, strict=True)
    asked = [(score / choice.temperature, column) for score, column in pairs]
    if choice.null:
        asked.append((0.0, None))
    total = sum(math.exp(score) for score, _ in asked)
    kept, reached = [], 0.0
    for score, column in sorted(asked, key=lambda each: -each[0])[: choice.top_k]:
        if choice.top_p is not None and reached >= choice.top_p:
            break
        kept.append((score, column))
        reached += math.exp(score) / total

    def shares(of):
        total = sum(math.exp(score) for score, _ in of)
        return [math.exp(score) / total for score, _ in of]

    if choice.threshold is not None:
        enough = [s >= choice.threshold or n == 0 for n, s in enumerate(shares(kept))]
        kept = list(itertools.compress(kept, enough))
    gates = [0.0] * n_experts
    for share, (_, column) in zip(shares(kept), kept, strict=True):
        if column is not None:
            gates[column] += share
    return gates


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.6])
@pytest.mark.parametrize("top_p", [None, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("top_k", [1, 2, 4, 9])
def test_gates_equal_a_slow_loop(top_k, top_p, threshold, null):
    choice = Choice(top_k, 0.7, top_p, threshold, null)
    columns = [5, 0, 3, 1, 6]
    generator = torch.Generator().manual_seed(top_k)
    scores = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    gates = choice.of(scores, torch.tensor(columns)).dense(7)
    expected = [slow(choice, line, columns, 7) for line in scores.tolist()]
    torch.testing.assert_close(gates, torch.tensor(expected, dtype=torch.float64))


def test_columns_are_the_first_ones_where_none_are_named():
    gates = Choice(1).of(torch.tensor([[1.0, 3.0], [2.0, 0.0]])).dense(3)
    assert gates.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("null", [False, True])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"threshold": 0.5}])
def test_nobody_to_choose_from_leaves_the_base_alone(null, options):
    gates = Choice(null=null, **options).of(torch.zeros(3, 0), torch.zeros(0).long()).dense(4)
    assert (gates == torch.zeros(3, 4)).all()


def test_the_base_takes_the_share_of_a_score_of_zero():
    gates = Choice(null=True).of(torch.tensor([[0.0, 0.0], [-9.0, -9.0]])).dense(2)
    torch.testing.assert_close(gates[0], torch.full((2,), 1 / 3))
    assert gates[1].sum() < 0.001


def test_gradients_reach_the_scores_of_the_experts_kept():
    scores = torch.tensor([[1.0, 0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    for choice in (Choice(2), Choice(3, top_p=0.9), Choice(2, threshold=0.1, null=True)):
        gates = choice.of(scores).dense(3)
        (grad,) = torch.autograd.grad(gates[0, 0], scores)
        assert (grad[0, :2] != 0).all()
        assert grad[0, 2] == 0
        assert torch.autograd.gradcheck(lambda s, c=choice: c.of(s).dense(3), scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": True}, "top_k is True"),
        ({"top_k": 2.0}, "top_k is 2.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": 1.0}, "threshold is 1.0"),
    ],
)
def test_a_number_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Choice(**options)
