import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mttl_experts import (
    Expert,
    ExpertInfo,
    LoraFactors,
    UnsupportedAdapterError,
    inner_product,
    lora_modules,
    spectral_form,
    spectral_forms,
)

Q0 = "model.layers.0.self_attn.q_proj"
SIDES = st.integers(1, 12)


def delta(factors):
    """ΔW, formed: the slow obvious version."""
    return factors.scaling * factors.b.double() @ factors.a.double()


@settings(deadline=None, max_examples=60)
@given(SIDES, SIDES, st.integers(1, 6), st.integers(0, 99), st.sampled_from([1.0, 0.25, -3.0]))
def test_the_spectral_form_is_the_svd_of_delta(o, i, r, seed, scaling):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(r, i, generator=generator)
    b = torch.randn(o, r, generator=generator)
    u, sigma, v = spectral_form(a, b, scaling)
    k = min(o, i, r)
    assert (u.shape, sigma.shape, v.shape) == ((o, k), (k,), (i, k))
    assert {u.dtype, sigma.dtype, v.dtype} == {torch.float32}
    torch.testing.assert_close((u * sigma) @ v.T, scaling * b @ a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(u.T @ u, torch.eye(k), atol=1e-5, rtol=0)
    torch.testing.assert_close(v.T @ v, torch.eye(k), atol=1e-5, rtol=0)
    dense = torch.linalg.svdvals(scaling * b @ a)[:k]
    torch.testing.assert_close(sigma, dense, atol=1e-4, rtol=1e-4)
    assert torch.equal(sigma, sigma.sort(descending=True).values)
    assert (sigma >= 0).all()


def test_the_spectral_form_forgets_the_factorisation():
    torch.manual_seed(0)
    a, b, mix = torch.randn(3, 10), torch.randn(8, 3), torch.randn(3, 3) + 3 * torch.eye(3)
    one = spectral_form(a, b, 0.5)
    other = spectral_form(mix @ a, b @ torch.linalg.inv(mix) / 2, 1.0)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)


def test_a_half_precision_expert_has_a_float32_form():
    a, b = torch.randn(2, 6).bfloat16(), torch.randn(5, 2).bfloat16()
    u, sigma, v = spectral_form(a, b, 2.0)
    assert u.dtype == torch.float32
    torch.testing.assert_close((u * sigma) @ v.T, 2 * b.float() @ a.float())


def test_an_untrained_expert_has_the_zero_form():
    u, sigma, v = spectral_form(torch.randn(2, 6), torch.zeros(5, 2))
    assert (sigma == 0).all()
    assert torch.isfinite(u).all()
    assert torch.isfinite(v).all()


def test_modules_are_sorted_and_named_as_in_the_base(make_expert):
    expert = make_expert(rank=2)
    modules = lora_modules(expert)
    assert list(modules) == sorted(modules)
    assert Q0 in modules
    assert len(modules) == 4
    assert modules[Q0].a is expert.expert_weights[f"base_model.model.{Q0}.lora_A.weight"]
    assert modules[Q0].scaling == 4 / 2
    assert modules[Q0].rank == 2
    assert not modules[Q0].fan_in_fan_out
    assert lora_modules(make_expert(fan_in_fan_out=True))[Q0].fan_in_fan_out


def test_rslora_and_patterns_set_each_modules_scaling(make_expert):
    assert lora_modules(make_expert(rank=4, use_rslora=True))[Q0].scaling == 4 / math.sqrt(4)
    expert = make_expert(rank=2, alpha_pattern={r"layers\.0\..*": 10, "down_proj": 6, "proj": 1})
    with pytest.raises(ValueError, match=r"several keys of alpha_pattern.*\[6, 10\]"):
        lora_modules(expert)
    expert = make_expert(rank=2, alpha_pattern={"layers.0.self_attn.q_proj": 10, "proj": 1})
    scalings = {module: f.scaling for module, f in lora_modules(expert).items()}
    assert scalings[Q0] == 5  # matches from a dot on: "proj" alone is the end of no path
    assert scalings["model.layers.1.self_attn.q_proj"] == 2


def test_rank_pattern_must_agree_with_the_weights(make_expert):
    expert = make_expert(rank=2, rank_pattern={"q_proj": 3})
    with pytest.raises(ValueError, match=r"q_proj' has A \(2, 16\).*config says rank 3"):
        lora_modules(expert)
    expert = make_expert(rank=2, r=8, rank_pattern={"q_proj": 2, "down_proj": 2})
    assert lora_modules(expert)[Q0].scaling == 4 / 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.down_proj"]),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("alora_invocation_tokens", [1]),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1}),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_what_is_more_than_a_plain_lora_is_refused_by_name(make_expert, option, value):
    named = repr(value) if option == "peft_type" else option
    with pytest.raises(UnsupportedAdapterError, match=f"'e1'.*{named}"):
        lora_modules(make_expert("e1", **{option: value}))


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.layers.0.q.lora_magnitude_vector", "DoRA"),
        ("model.layers.0.q.lora_B.bias", "a bias"),
        ("lm_head.weight", "modules_to_save"),
        ("model.embed_tokens.lora_embedding_A", "embedding"),
    ],
)
def test_a_tensor_that_is_no_factor_is_refused_by_name(make_expert, key, named):
    expert = make_expert()
    weights = dict(expert.expert_weights) | {f"base_model.model.{key}": torch.ones(2, 2)}
    with pytest.raises(UnsupportedAdapterError, match=f"{key}.*{named}"):
        lora_modules(Expert(expert.expert_info, weights))


def test_broken_weights_are_errors_that_name_the_module(make_expert):
    expert = make_expert()
    weights = dict(expert.expert_weights)
    del weights[f"base_model.model.{Q0}.lora_B.weight"]
    with pytest.raises(ValueError, match="q_proj' lacks lora_B"):
        lora_modules(Expert(expert.expert_info, weights))
    weights = dict(expert.expert_weights)
    weights[f"base_model.model.{Q0}.lora_B.weight"] = torch.ones(4, 2, 1, 1)
    with pytest.raises(UnsupportedAdapterError, match=r"\(4, 2, 1, 1\).*linear"):
        lora_modules(Expert(expert.expert_info, weights))
    with pytest.raises(ValueError, match="'e2' has no weights yet"):
        lora_modules(Expert(ExpertInfo("e2")))
    with pytest.raises(ValueError, match="r is 'many' for module"):
        lora_modules(make_expert(r="many"))
    with pytest.raises(ValueError, match="lora_alpha is None for module"):
        lora_modules(make_expert(lora_alpha=None))
    with pytest.raises(ValueError, match="a key of rank_pattern is no regular expression"):
        lora_modules(make_expert(rank_pattern={"(": 2}))
    weights = dict(expert.expert_weights)
    weights[f"base_model.model.{Q0}.lora_A.weight"] = torch.full((2, 16), torch.nan)
    with pytest.raises(ValueError, match="q_proj' has a weight that is NaN"):
        spectral_forms(Expert(expert.expert_info, weights))


def test_the_inner_product_is_that_of_the_formed_deltas(make_expert):
    one = make_expert("a", seed=1, rank=2, use_rslora=True)
    other = make_expert("b", seed=2, rank=3, lora_alpha=7)
    f, g = lora_modules(one), lora_modules(other)
    slow = sum(float((delta(f[m]) * delta(g[m])).sum()) for m in f)
    assert inner_product(one, other) == pytest.approx(slow, rel=1e-12)
    assert inner_product(f, g) == inner_product(one, other)
    assert inner_product(other, one) == pytest.approx(slow, rel=1e-12)


def test_refactored_experts_have_cosine_one(make_expert):
    """Flattened factors would see cosine near 0; the same ΔW is the same expert."""
    one = lora_modules(make_expert(seed=1, rank=2))
    turn = torch.tensor([[0.0, 2.0], [-1.0, 1.0]])
    other = {
        m: LoraFactors(turn @ f.a, f.b @ torch.linalg.inv(turn), f.scaling) for m, f in one.items()
    }
    squares = inner_product(one, one) * inner_product(other, other)
    assert inner_product(one, other) / math.sqrt(squares) == pytest.approx(1, abs=1e-6)


def test_modules_that_one_expert_lacks_add_nothing(make_expert):
    both, attention = make_expert("a", seed=1), make_expert("b", seed=2)
    kept = {k: v for k, v in attention.expert_weights.items() if "q_proj" in k}
    attention = Expert(attention.expert_info, kept)
    f, g = lora_modules(both), lora_modules(attention)
    slow = sum(float((delta(f[m]) * delta(g[m])).sum()) for m in g)
    assert inner_product(both, attention) == pytest.approx(slow, rel=1e-12)


def test_experts_of_other_shapes_have_no_inner_product(make_expert):
    small = make_expert("b", shapes={"self_attn.q_proj": (8, 8)})
    with pytest.raises(ValueError, match=r"q_proj' is \(16, 16\).*\(8, 8\).*different bases"):
        inner_product(make_expert("a"), small)


def test_spectral_forms_cover_every_module(make_expert):
    expert = make_expert()
    forms = spectral_forms(expert)
    for module, factors in lora_modules(expert).items():
        u, sigma, v = forms[module]
        torch.testing.assert_close((u * sigma) @ v.T, delta(factors).float(), atol=1e-4, rtol=1e-4)
