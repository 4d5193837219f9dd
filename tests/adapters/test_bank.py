import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mttl_adapters import kernels
from mttl_adapters.bank import Bank

IN, OUT = 12, 20


@pytest.fixture(params=["torch", "cpu"])
def kernel(request):
    """Both implementations, one after the other; the compiled one where there is a compiler."""
    if request.param == "cpu" and kernels.missing():
        pytest.skip(kernels.missing())
    with kernels.using(request.param):
        yield request.param


Factors = list[tuple[Tensor, Tensor, float]]


def make_factors(ranks: list[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    return [
        (randn(rank, IN), randn(OUT, rank), 0.5 + 0.25 * index) for index, rank in enumerate(ranks)
    ]


def make_gates(tokens: int, experts: int, top_k: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    top = torch.rand(tokens, experts, generator=generator).topk(min(top_k, experts), dim=1)
    return torch.zeros(tokens, experts).scatter(1, top.indices, top.values)


def slow_sum(factors: Factors, x: Tensor, gates: Tensor) -> Tensor:
    """One expert and one token at a time, in float64."""
    out = torch.zeros(x.shape[0], OUT, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, (a, b, scaling) in enumerate(factors):
            update = b.double() @ (a.double() @ x[token].double())
            out[token] += gates[token, expert].double() * scaling * update
    return out


PATHS = [Bank.apply, Bank.apply_dense, Bank.apply_grouped]


@pytest.mark.parametrize("path", PATHS)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    ranks=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    tokens=st.integers(0, 6),
    top_k=st.integers(1, 9),
    seed=st.integers(0, 100),
)
def test_every_path_equals_a_slow_loop(kernel, path, ranks, tokens, top_k, seed):
    factors = make_factors(ranks, seed=seed)
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(seed))
    gates = make_gates(tokens, len(ranks), top_k, seed)
    found = path(Bank.from_factors(factors), x, gates)
    torch.testing.assert_close(
        found.double(), slow_sum(factors, x, gates), atol=1e-4, rtol=1e-5, check_dtype=False
    )


def test_the_chosen_path_is_the_cheaper_one_and_both_agree(monkeypatch):
    bank = Bank.from_factors([(a, b, 0.1) for a, b, _ in make_factors([2] * 300)])
    x, gates = torch.randn(1000, IN), make_gates(1000, 300, 1)
    dense = bank.apply_dense(x, gates)
    monkeypatch.setattr("mttl_adapters.crossover.PLAIN_CALL", 1)
    monkeypatch.setattr(Bank, "apply_dense", None)
    torch.testing.assert_close(bank.apply(x, gates), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("experts", "tokens", "chosen", "grouped"),
    [
        (4, 2048, 2, False),
        (8, 2048, 2, False),
        (32, 2048, 2, True),
        (256, 2048, 4, True),
        (8, 8, 2, False),
        (16, 8, 2, False),
        (256, 8, 2, True),
        (256, 8, 256, False),
    ],
)
def test_the_crossover_follows_what_was_measured(experts, tokens, chosen, grouped):
    a, b = torch.zeros(16, 576), torch.zeros(576, 16)
    bank = Bank.from_factors([(a, b, 1.0)] * experts)
    assert bank._grouped_pays(tokens, tokens * chosen, compiled=False) is grouped


@pytest.mark.parametrize("path", [Bank.apply_dense, Bank.apply_grouped])
def test_gradients_of_input_and_chosen_gates_equal_the_slow_loop(kernel, path):
    factors = make_factors([3, 0, 1, 4])
    gates = make_gates(5, 4, 2)
    chosen = gates != 0
    found, expected = [], []
    for grads, function in [
        (found, lambda x, g: path(Bank.from_factors(factors), x, g)),
        (expected, lambda x, g: slow_sum(factors, x, g)),
    ]:
        x = torch.linspace(-1, 1, 5 * IN).reshape(5, IN).requires_grad_()
        g = gates.clone().requires_grad_()
        (function(x, g) * torch.arange(OUT)).sum().backward()
        grads += [x.grad, g.grad[chosen]]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [Bank.apply_dense, Bank.apply_grouped])
def test_gradcheck_of_the_factors(kernel, path):
    shapes = [(3, IN), (1, IN)]
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    parts += [torch.randn(OUT, r, dtype=torch.float64, requires_grad=True) for r, _ in shapes]
    x = torch.randn(2, IN, dtype=torch.float64)
    gates = torch.tensor([[0.7, 0.3], [0.0, 1.0]], dtype=torch.float64)

    def function(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        return path(Bank.from_factors([(a1, b1, 2.0), (a2, b2, 0.5)]), x, gates)

    assert torch.autograd.gradcheck(function, parts)


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_input_meets_float32_factors_in_float32(kernel, path):
    factors = make_factors([4, 2, 3])
    x = torch.randn(6, IN).bfloat16()
    gates = make_gates(6, 3, 2)
    found = path(Bank.from_factors(factors), x, gates)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), slow_sum(factors, x, gates), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_bank_stays_bfloat16_and_close(path):
    factors = make_factors([4, 2, 3], dtype=torch.bfloat16)
    x = torch.randn(6, IN).bfloat16()
    gates = make_gates(6, 3, 2)
    found = path(Bank.from_factors(factors), x, gates)
    assert found.dtype == torch.bfloat16
    expected = slow_sum(factors, x, gates)
    assert (found.double() - expected).norm() < 0.02 * expected.norm()


def test_a_bank_gives_its_factors_back():
    factors = make_factors([3, 0, 1])
    for given_factors, kept in zip(factors, Bank.from_factors(factors).factors(), strict=True):
        torch.testing.assert_close(kept, given_factors, rtol=0, atol=0)


def test_dtype_is_the_widest_or_the_one_asked_for():
    factors = make_factors([2], torch.bfloat16) + make_factors([2], torch.float32)
    assert Bank.from_factors(factors).a.dtype == torch.float32
    assert Bank.from_factors(factors, dtype=torch.bfloat16).b.dtype == torch.bfloat16


def test_moving_a_bank_to_where_it_is_gives_itself():
    bank = Bank.from_factors(make_factors([2, 1]))
    assert bank.to("cpu") is bank


def test_before_equals_its_dense_formula():
    factors = make_factors([3, 3, 3])
    x, gates = torch.randn(5, IN), make_gates(5, 3, 2)
    found = Bank.from_factors(factors).apply_before(x, gates)
    for token in range(5):
        b = sum(g * s * b for g, (_, b, s) in zip(gates[token], factors, strict=True))
        a = sum(g * a for g, (a, _, _) in zip(gates[token], factors, strict=True))
        torch.testing.assert_close(found[token], b @ (a @ x[token]), rtol=1e-4, atol=1e-4)


def test_before_leaves_out_experts_of_rank_zero_and_refuses_mixed_ranks():
    factors = make_factors([3, 0, 3])
    x, gates = torch.randn(5, IN), make_gates(5, 3, 3)
    whole = Bank.from_factors(factors).apply_before(x, gates)
    part = Bank.from_factors([factors[0], factors[2]]).apply_before(x, gates[:, [0, 2]])
    torch.testing.assert_close(whole, part)
    with pytest.raises(ValueError, match=r"one rank.*\[2, 3\].*combine='after'"):
        Bank.from_factors(make_factors([3, 2])).apply_before(x, gates[:, :2])


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="at least one expert"):
        Bank.from_factors([])
    with pytest.raises(ValueError, match=r"expert 1 .*A \(2, 5\) and B \(20, 2\).*A \(r, 12\)"):
        Bank.from_factors([*make_factors([1]), (torch.zeros(2, 5), torch.zeros(OUT, 2), 1.0)])
    bank = Bank.from_factors(make_factors([2, 2]))
    with pytest.raises(ValueError, match=r"x \(3, 12\) and gates \(3, 5\).*gates \(t, 2\)"):
        bank.apply(torch.zeros(3, IN), torch.zeros(3, 5))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("part", [0, 1])
def test_factors_that_are_not_finite_are_refused_since_others_would_suffer(bad, part):
    def expert(value):
        factors = [torch.ones(2, 4), torch.ones(3, 2)]
        factors[part][1, 0] = value
        return *factors, 1.0

    good, spoilt = expert(1.0), expert(bad)
    said = rf"NaN or infinite number in {'AB'[part]}; leave it out"
    with pytest.raises(ValueError, match=f"expert 1 has a {said}"):
        Bank.from_factors([good, spoilt])
    bank = Bank.from_factors([good])
    for change in (bank.append, lambda *factors: bank.replace(0, *factors)):
        with pytest.raises(ValueError, match=f"the new expert has a {said}"):
            change(*spoilt)


def test_finite_factors_may_add_up_to_infinity():
    large = torch.full((1, 4), 6e4, dtype=torch.float16)
    assert len(Bank.from_factors([(large, large.T, 1.0)])) == 1
