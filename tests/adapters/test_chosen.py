import pytest
import torch

from mttl_adapters.chosen import NONE, Chosen


def test_dense_gates_come_back_from_what_was_chosen():
    gates = torch.tensor([[0.0, 0.5, 0.0], [0.25, 0.0, -0.75], [0.0, 0.0, 0.0]])
    chosen = Chosen.from_dense(gates)
    assert [sorted(line) for line in chosen.experts.tolist()] == [[NONE, 1], [0, 2], [NONE, NONE]]
    torch.testing.assert_close(chosen.dense(3), gates, rtol=0, atol=0)


def test_no_tokens_and_no_choice():
    assert Chosen.from_dense(torch.zeros(0, 3)).dense(3).shape == (0, 3)
    assert Chosen.from_dense(torch.zeros(2, 3)).experts.shape == (2, 0)


def test_rows_speak_for_their_tokens():
    chosen = Chosen.for_rows([2, NONE], tokens=3)
    assert chosen.n_tokens == 6
    assert chosen.each().experts.tolist() == [[2]] * 3 + [[NONE]] * 3
    torch.testing.assert_close(chosen.dense(3), chosen.each().dense(3))
    assert chosen.dense(3)[0].tolist() == [0, 0, 1]


def test_an_expert_named_twice_has_the_sum():
    chosen = Chosen(torch.tensor([[1, 1]]), torch.tensor([[0.25, 0.5]]))
    assert chosen.dense(2).tolist() == [[0.0, 0.75]]


def test_gradients_reach_the_gates_that_are_not_zero():
    gates = torch.tensor([[0.0, 0.5], [0.25, 0.125]], requires_grad=True)
    Chosen.from_dense(gates).weights.sum().backward()
    assert gates.grad is not None
    assert gates.grad[gates != 0].tolist() == [1, 1, 1]


def test_wrong_shapes_and_dtypes_are_named():
    with pytest.raises(ValueError, match=r"experts \(2, 1\) and weights \(2, 3\)"):
        Chosen(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"torch.int32 .* torch.int64"):
        Chosen(torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1))
