"""Routers with parameters: what they compute, and that it can be learned, saved and loaded."""

import pytest
import torch
from torch import Tensor

from mttl_adapters import Bank
from mttl_experts import ExpertLibrary
from mttl_routing import Choice, Layer, Mlp, ProductKey, RoutedModel, Rows, Softmax

NAMES = ("softmax", "rkhs", "product_key", "mlp", "poly")
TOP_K, TEMPERATURE = 2, 0.7
TASKS = ("cleo", "anna", "a task that nobody knows")
SEEN = {"task_names": TASKS}


@pytest.fixture
def routed_by(base, mixed_experts):
    def make(name, experts=mixed_experts, **options):
        return RoutedModel.from_experts(
            experts, name, TOP_K, temperature=TEMPERATURE, base_model=base, **options
        )

    return make


@torch.no_grad()
def logits_of(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **SEEN, **kwargs).logits


def randomised(router):
    """With parameters that tell, also where they begin near 0."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return router


@pytest.mark.parametrize("name", NAMES)
def test_it_comes_back_from_a_folder_with_what_it_learned(base, routed_by, name, tokens, tmp_path):
    with routed_by(name) as routed:
        fresh = logits_of(routed, tokens)
        randomised(routed.router)
        expected = logits_of(routed, tokens)
        assert not torch.equal(fresh, expected)
        routed.save_pretrained(tmp_path / "kept")
    with RoutedModel.from_pretrained(tmp_path / "kept", base_model=base) as routed:
        assert torch.equal(logits_of(routed, tokens), expected)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_from_its_seed(routed_by, name):
    def state(**options):
        with routed_by(name, **options) as routed:
            return torch.cat([p.flatten() for p in routed.router.parameters()])

    assert torch.equal(state(seed=1), state(seed=1))
    assert not torch.equal(state(seed=1), state(seed=2))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_each_parameter(base, make_expert, name, tokens):
    names = ("anna", "bert", "cleo")
    experts = [make_expert(name) for name in names]
    with RoutedModel.from_experts(experts, name, 3, base_model=base) as routed:
        routed(tokens, labels=tokens, task_names=names).loss.backward()
        grads = {name: parameter.grad for name, parameter in routed.router.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


@pytest.mark.parametrize("kind", [Softmax, Mlp, ProductKey])
def test_gradients_of_the_gates_are_right(kind):
    names, path = ("a", "b", "c"), "layer"
    router = kind(names, {path: 5}, hidden=4).double()
    bank = Bank.from_factors([(torch.ones(1, 5), torch.ones(2, 1), 1.0)] * 3)
    layer = Layer(path, names, bank)
    state = dict(router.named_parameters())
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def gates(x, *values):
        given = dict(zip(state, values, strict=True))
        rows = Rows(1, len(x))
        named = {f"of.{name}": value for name, value in given.items()}
        return torch.func.functional_call(_Gates(router), named, (x, layer, rows))

    x.requires_grad_()
    assert torch.autograd.gradcheck(
        gates, (x, *[p.detach().requires_grad_() for p in state.values()])
    )


class _Gates(torch.nn.Module):
    def __init__(self, router):
        super().__init__()
        self.of = router

    def forward(self, x, layer, rows):
        return self.of.gates(x, layer, rows).dense(3)


@pytest.mark.parametrize("n_experts", [1, 2, 3, 5, 7, 12, 16, 23])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_product_of_keys_is_searched_exactly(n_experts, k):
    names = tuple(f"e{n}" for n in range(n_experts))
    router = ProductKey(names, {"layer": 6}, Choice(k), hidden=4)
    shown = names[::-1]  # in another order than the router learned them in
    layer = Layer(
        "layer", shown, Bank.from_factors([(torch.ones(1, 6), torch.ones(2, 1), 1.0)] * n_experts)
    )
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(n_experts))
    rows = Rows(1, len(x))
    found = router.gates(x, layer, rows).dense(n_experts)
    every = Choice(k).of(router.scores(x, layer), router.columns(layer, x.device)).dense(n_experts)
    torch.testing.assert_close(found, every)


@pytest.mark.parametrize("name", NAMES)
def test_experts_that_come_and_go(routed_by, make_expert, name, tokens):
    with routed_by(name) as routed:
        randomised(routed.router)
        expected = logits_of(routed, tokens)
        with pytest.raises(ValueError, match="learned nothing for expert 'new'"):
            routed.add_expert(make_expert("new"))
        routed.replace_expert(make_expert("anna"))
        torch.testing.assert_close(logits_of(routed, tokens), expected)
        with routed.without("bert"):
            without = logits_of(routed, tokens)
        if name == "product_key":
            with pytest.raises(ValueError, match="disable"):
                routed.remove_expert("bert")
            return
        routed.remove_expert("bert")
        torch.testing.assert_close(logits_of(routed, tokens), without, rtol=1e-4, atol=1e-4)


def test_a_routed_model_from_a_library_has_an_untrained_router(base, mixed_experts):
    library = ExpertLibrary("virtual://learned-routers", create=True)
    for expert in mixed_experts:
        library.add_expert(expert)
    with RoutedModel.from_library(library, "softmax", top_k=2, base_model=base) as routed:
        assert isinstance(routed.router, Softmax)
        assert routed.router.choice == Choice(2)


class TestMhr:
    """With equal ranks, and combine="before" alone."""

    @pytest.fixture
    def experts(self, make_expert):
        return [
            make_expert(name, targets=("q_proj", "up_proj")) for name in ("anna", "cleo", "emil")
        ]

    @pytest.fixture
    def routed(self, base, experts):
        with RoutedModel.from_experts(
            experts, "mhr", combine="before", base_model=base, heads=4
        ) as routed:
            randomised(routed.router)
            yield routed

    def test_one_head_is_poly(self, base, experts, tokens):
        found = []
        for name, options in (("mhr", {"heads": 1}), ("poly", {})):
            with RoutedModel.from_experts(
                experts, name, combine="before", base_model=base, **options
            ) as routed:
                for parameter in routed.router.parameters():
                    parameter.data = torch.linspace(-2, 2, parameter.numel()).view_as(parameter)
                found.append(logits_of(routed, tokens))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

    def test_it_keeps_to_what_a_language_model_does(self, base, routed, tokens, tmp_path):
        expected = logits_of(routed, tokens)
        with routed.trace() as trace:
            logits_of(routed, tokens)
        shares = trace.shares()["model.layers.0.self_attn.q_proj"]
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
        routed.save_pretrained(tmp_path / "kept")
        with routed.without("cleo"):
            without = logits_of(routed, tokens)
        routed.remove_expert("cleo")
        torch.testing.assert_close(logits_of(routed, tokens), without, rtol=1e-4, atol=1e-4)
        routed.remove()
        with RoutedModel.from_pretrained(tmp_path / "kept", base_model=base) as again:
            assert torch.equal(logits_of(again, tokens), expected)

    def test_what_it_is_not_defined_for_is_refused(self, base, experts, tokens):
        with pytest.raises(ValueError, match="Mhr is defined for combine='before' alone"):
            RoutedModel.from_experts(experts, "mhr", base_model=base)
        made = RoutedModel.from_experts(experts, "mhr", 4, "before", base_model=base, heads=5)
        with made as routed, pytest.raises(ValueError, match="5 heads do not divide a layer of 32"):
            routed(tokens)


def test_poly_without_a_task_takes_the_average(routed_by, tokens):
    with routed_by("poly") as routed, torch.no_grad():
        randomised(routed.router)
        torch.testing.assert_close(
            routed(tokens).logits, routed(tokens, task_names="nobody's").logits
        )
        assert not torch.allclose(routed(tokens).logits, routed(tokens, task_names="anna").logits)
