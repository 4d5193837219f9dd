"""Which layers share a decision, and what layers of one input share of the work."""

import copy

import pytest
import torch

from mttl_experts import lora_modules
from mttl_routing import RoutedModel
from mttl_routing.blocks import group_of

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class ByInput:
    """Gates by the signs of the input; keeps where it was asked, and what it gave."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.shared: list[tuple[str, ...]] = []
        self.made = 0

    def gates(self, x, layer, rows):
        self.asked.append(layer.module)
        self.shared.append(tuple(each.module for each in rows.layers))

        def make():
            self.made += 1
            return x.float()[:, : len(layer.experts)].sigmoid()

        return rows.once("sigmoid", make)


def adapted(experts) -> list[str]:
    return sorted(set().union(*map(lora_modules, experts)))


@pytest.mark.parametrize("use_cache", [True, False])
def test_layers_decide_by_themselves_or_with_their_block_or_their_model(
    base, mixed_experts, tokens, use_cache
):
    paths = adapted(mixed_experts)
    first = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    found = {}
    for granularity, asked in [("layer", paths), ("block", first), ("model", first[:1])]:
        router = ByInput()
        with (
            RoutedModel.from_experts(
                mixed_experts, router, granularity=granularity, base_model=base
            ) as routed,
            torch.no_grad(),
        ):
            found[granularity] = routed(tokens, use_cache=use_cache).logits
        assert sorted(router.asked) == asked
    assert not torch.allclose(found["layer"], found["block"], **CLOSE)
    assert not torch.allclose(found["block"], found["model"], **CLOSE)


@pytest.mark.parametrize("granularity", ["block", "model"])
def test_a_shared_decision_equals_its_slow_formula(base, mixed_experts, tokens, granularity):
    layers = {e.name: lora_modules(e) for e in mixed_experts}
    gates: dict[str, torch.Tensor] = {}

    def hook(path):
        def add(module, args, output):
            x = args[0]
            key = path.split(".self_attn")[0].split(".mlp")[0] if granularity == "block" else ""
            gate = gates.setdefault(key, x[..., :4].sigmoid())
            for column, expert in enumerate(mixed_experts):
                if (f := layers[expert.name].get(path)) is not None:
                    output = output + gate[..., column, None] * f.scaling * (x @ f.a.T @ f.b.T)
            return output

        return add

    handles = [
        base.get_submodule(path).register_forward_hook(hook(path))
        for path in adapted(mixed_experts)
    ]
    with torch.no_grad():
        expected = base(tokens).logits
    for handle in handles:
        handle.remove()
    with (
        RoutedModel.from_experts(
            mixed_experts, ByInput(), granularity=granularity, base_model=base
        ) as routed,
        torch.no_grad(),
    ):
        torch.testing.assert_close(routed(tokens).logits, expected, **CLOSE)


@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_generation_with_a_cache_equals_that_without(base, mixed_experts, tokens, granularity):
    length = {"max_new_tokens": 6, "do_sample": False}
    for router in ("arrow", ByInput()):
        with RoutedModel.from_experts(
            mixed_experts, router, granularity=granularity, base_model=base
        ) as routed:
            cached = routed.generate(tokens, **length)
            assert torch.equal(cached, routed.generate(tokens, **length, use_cache=False))


def test_layers_of_one_input_share_what_is_made_of_it(base, mixed_experts, tokens):
    router = ByInput()
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
        for _ in range(2):
            with torch.no_grad():
                routed(tokens)
    # q and v of two blocks, up and down of the second, down of the first, twice
    assert len(router.asked) == 14
    assert router.made == 10
    at = {
        module: len(router.asked) - 1 - router.asked[::-1].index(module) for module in router.asked
    }
    for block in (0, 1):
        together = tuple(f"model.layers.{block}.self_attn.{name}_proj" for name in "qv")
        assert router.shared[at[together[0]]] == together == router.shared[at[together[1]]]
    down = "model.layers.1.mlp.down_proj"
    assert router.shared[at[down]] == (down,)


def test_an_input_that_was_changed_in_place_is_another(base, make_expert, tokens):
    def change(module, args):
        args[0].add_(1.0)

    router = ByInput()
    k_proj = base.model.layers[0].self_attn.k_proj
    handle = k_proj.register_forward_pre_hook(change)
    try:
        with (
            RoutedModel.from_experts([make_expert("one")], router, base_model=base) as routed,
            torch.no_grad(),
        ):
            routed(tokens)
    finally:
        handle.remove()
    assert router.made == 3  # q, then v of the first block, q and v of the second


def test_what_is_in_no_block_decides_by_itself(base):
    assert group_of("lm_head", base, "model") is None
    assert group_of("model.layers.3.mlp.experts.5.w1", base, "block") == "model.layers.3"
    assert group_of("transformer.h.11.attn.c_attn", base, "block") == "transformer.h.11"
    assert group_of("model.layers.3.mlp.up_proj", base, "layer") is None


def test_another_granularity_is_refused(base, mixed_experts):
    with pytest.raises(ValueError, match="granularity is 'head'; it takes 'layer', 'block'"):
        RoutedModel.from_experts(mixed_experts, granularity="head", base_model=base)


# Learning


class Learned(torch.nn.Module):
    """One linear gate for all layers that have 32 inputs; it may look at the rows' tasks."""

    def __init__(self, n_experts: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = torch.nn.Linear(32, n_experts, bias=False)
        self.rows = torch.nn.Parameter(torch.randn(3, n_experts))

    def gates(self, x, layer, rows):
        own = self.gate(x[:, :32].float())
        return (own + rows.spread(self.rows[[int(task) for task in rows.tasks]])).softmax(dim=1)


def test_gradients_reach_a_router_s_parameters_and_its_mode_follows(base, mixed_experts, tokens):
    router = Learned(4)
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
        assert not routed.eval().router.training
        assert routed.train().router.training
        routed.eval()
        routed(tokens, task_names=["0", "2", "1"]).logits.square().mean().backward()
    assert router.gate.weight.grad.abs().max() > 0
    assert (router.rows.grad.abs().sum(dim=1) > 0).all()
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_layers_computed_again_in_the_backward_pass_are_routed_as_they_were(
    base, mixed_experts, tokens, granularity
):
    grads = []
    base = copy.deepcopy(base)  # transformers leaves a hook on it
    embedded = base.get_input_embeddings()(tokens).requires_grad_()
    for again in (False, True):
        router = Learned(4)
        with RoutedModel.from_experts(
            mixed_experts, router, granularity=granularity, base_model=base
        ) as routed:
            routed.train()
            if again:
                routed.activation_checkpointing_enable()
            with routed.tasks(["0", "2", "1"]):
                loss = routed(inputs_embeds=embedded, use_cache=False).logits.square().mean()
            loss.backward()
            grads.append((router.gate.weight.grad, router.rows.grad))
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, **CLOSE)


def test_one_decision_for_the_model_cannot_be_computed_again_by_blocks(base, mixed_experts):
    with (
        RoutedModel.from_experts(mixed_experts, granularity="model", base_model=base) as routed,
        pytest.raises(ValueError, match="all blocks hang together by one decision"),
    ):
        routed.activation_checkpointing_enable()
