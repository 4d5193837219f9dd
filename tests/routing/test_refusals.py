"""What does not fit a base, and arguments that mean nothing, are refused in one clear line."""

import copy
import dataclasses
import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from mttl_adapters import BankFiles
from mttl_experts import (
    Expert,
    ExpertLibrary,
    IncompatibleExpertError,
    IncompatibleExpertWarning,
    UnsupportedAdapterError,
)
from mttl_routing import RoutedModel, Uniform, apply_expert
from mttl_routing.routers import arrow_prototypes


@torch.no_grad()
def logits_of(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


def test_an_expert_for_another_base_is_refused_and_both_are_named(base, make_expert):
    class Loaded:
        model, tokenizer, model_id = base, None, "someone/phi"
        fingerprint, tokenizer_digest, template_digest = "f" * 64, "t" * 64, None

    with pytest.raises(IncompatibleExpertError, match=r"two-layer-llama.*someone/phi"):
        RoutedModel.from_experts([make_expert("e1")], base_model=Loaded)
    with pytest.raises(IncompatibleExpertError, match="different base models"):
        RoutedModel.from_experts(
            [make_expert("e1"), make_expert("e2", model="other/base")], base_model=base
        )


def test_a_bare_model_from_a_hub_knows_its_id_and_one_from_a_folder_does_not(
    base, make_expert, tmp_path
):
    named = copy.deepcopy(base)
    named.config.name_or_path = "someone/phi"
    with pytest.raises(IncompatibleExpertError, match="someone/phi"):
        RoutedModel.from_experts([make_expert("e1")], base_model=named)
    named.config.name_or_path = str(tmp_path)
    RoutedModel.from_experts([make_expert("e1")], base_model=named)


def test_a_loaded_base_of_the_same_id_is_accepted(base, make_expert, tokens):
    class Loaded:
        model, tokenizer, model_id = base, None, "tests/two-layer-llama"
        fingerprint, tokenizer_digest, template_digest = "f" * 64, "t" * 64, None

    with apply_expert(Loaded, make_expert("e1")) as routed:
        assert routed.model is base


@pytest.mark.parametrize(
    ("how", "which"),
    [
        ("from_experts", "of the base"),
        ("from_experts", "of each other"),
        ("from_library", "of the base"),
        ("from_library", "of each other"),
        ("apply_expert", "of the base"),
    ],
)
def test_other_weights_are_a_warning_and_strictly_an_error(base, make_expert, tmp_path, how, which):
    class Loaded:
        model, tokenizer, model_id = base, None, "tests/two-layer-llama"
        fingerprint = "f" * 64 if which == "of the base" else None
        tokenizer_digest, template_digest = None, None

    experts = []
    for name, digest in (("e1", "a" * 64), ("e2", "a" * 64 if Loaded.fingerprint else "b" * 64)):
        made = make_expert(name)
        info = dataclasses.replace(made.expert_info, model_fingerprint=digest)
        experts.append(dataclasses.replace(made, expert_info=info))
    if how == "apply_expert":
        make = partial(apply_expert, Loaded, experts[0])
    elif how == "from_experts":
        make = partial(RoutedModel.from_experts, experts, base_model=Loaded)
    else:
        library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompatibleExpertWarning)
            for expert in experts:
                library.add_expert(expert)
        make = partial(RoutedModel.from_library, library, base_model=Loaded)
    both = "a{64}.*f{64}" if Loaded.fingerprint else "(a{64}.*b{64})|(b{64}.*a{64})"
    with pytest.warns(IncompatibleExpertWarning, match=both), make():
        pass
    with pytest.raises(IncompatibleExpertError, match=both), make(strict=True):
        pass


def test_a_shape_that_does_not_fit_names_the_module_and_both_shapes(base, make_expert):
    expert = make_expert("wide", targets=("gate_proj",), layers=(0,))
    weights = {k.replace("mlp.gate", "self_attn.q"): v for k, v in expert.expert_weights.items()}
    with pytest.raises(
        IncompatibleExpertError,
        match=r"layers\.0\.self_attn\.q_proj' is \(32, 32\).*\(48, 32\) in expert 'wide'",
    ):
        RoutedModel.from_experts([Expert(expert.expert_info, weights)], base_model=base)


def test_an_adapter_that_would_attach_to_nothing_is_refused(base, make_expert):
    expert = make_expert("lost", layers=(0,))
    weights = {k.replace("model.layers", "h"): v for k, v in expert.expert_weights.items()}
    with pytest.raises(IncompatibleExpertError, match=r"none of the 2 .*'lost'.*attach to nothing"):
        RoutedModel.from_experts([Expert(expert.expert_info, weights)], base_model=base)


def test_one_module_that_the_base_lacks_is_refused_too(base, make_expert):
    expert = make_expert("deep", layers=(0, 1))
    weights = {k.replace("layers.1", "layers.9"): v for k, v in expert.expert_weights.items()}
    with pytest.raises(IncompatibleExpertError, match=r"2 of the 4 .*layers\.9"):
        RoutedModel.from_experts([Expert(expert.expert_info, weights)], base_model=base)


def test_a_module_that_is_not_linear_is_refused_by_its_type(base, make_expert):
    expert = make_expert("norm", layers=(0,), targets=("q_proj",))
    weights = {
        k.replace("self_attn.q_proj", "input_layernorm"): v
        for k, v in expert.expert_weights.items()
    }
    with pytest.raises(IncompatibleExpertError, match=r"input_layernorm.*is a LlamaRMSNorm"):
        RoutedModel.from_experts([Expert(expert.expert_info, weights)], base_model=base)


def test_bad_arguments_get_one_clear_line(base, mixed_experts):
    build = RoutedModel.from_experts
    with pytest.raises(ValueError, match="no router 'arow'; there are 'arrow'"):
        build(mixed_experts, "arow", base_model=base)
    with pytest.raises(ValueError, match="combine is 'both'"):
        build(mixed_experts, combine="both", base_model=base)
    with pytest.raises(ValueError, match="top_k is 0"):
        build(mixed_experts, top_k=0, base_model=base)
    with pytest.raises(TypeError, match="is no router"):
        build(mixed_experts, object(), base_model=base)
    with pytest.raises(ValueError, match="no experts were given"):
        build([], base_model=base)
    with pytest.raises(ValueError, match="'anna', 'anna'"):
        build([mixed_experts[0]] * 2, base_model=base)
    with pytest.raises(ValueError, match=r"one rank.*combine='after'"):
        build(mixed_experts, "uniform", combine="before", base_model=base)


def test_a_router_whose_gates_have_another_shape_is_told_so(base, mixed_experts, tokens):
    class TooFew(Uniform):
        def gates(self, x, layer, rows):
            return torch.ones(len(x), 2)

    with (
        RoutedModel.from_experts(mixed_experts, TooFew(), base_model=base) as routed,
        pytest.raises(ValueError, match=r"gates \(27, 2\).*gates \(t, 4\)"),
    ):
        routed(tokens)


def test_an_expert_that_changes_nothing_in_a_layer_has_any_prototype(base, make_expert, tokens):
    fresh = make_expert("fresh")
    weights = {k: v * ("lora_A" in k) for k, v in fresh.expert_weights.items()}
    fresh = Expert(fresh.expert_info, weights)
    assert all(torch.isfinite(v).all() for v in arrow_prototypes(fresh).values())
    with apply_expert(base, fresh) as routed:
        found = logits_of(routed, tokens)
    torch.testing.assert_close(found, logits_of(base, tokens))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_an_expert_that_is_not_finite_is_refused_and_named(
    base, make_expert, mixed_experts, part, tokens, tmp_path
):
    """Or tokens that never chose it would get no number, by 0 times infinity."""
    weights = dict(make_expert("spoilt").expert_weights)
    path = "model.layers.1.self_attn.v_proj"
    key = f"base_model.model.{path}.{part}.weight"
    weights[key] = weights[key].clone()
    weights[key][1, 1] = torch.inf
    spoilt = Expert(make_expert("spoilt").expert_info, weights)
    said = rf"'spoilt' has a NaN or infinite number in {part} of module '{path}'"

    files = BankFiles(tmp_path)
    for options in ({}, {"bank_files": files}):
        with pytest.raises(UnsupportedAdapterError, match=said):
            RoutedModel.from_experts(
                [*mixed_experts, spoilt], "uniform", base_model=base, **options
            )
    with RoutedModel.from_experts(mixed_experts, "uniform", base_model=base) as routed:
        expected = logits_of(routed, tokens)
        with pytest.raises(UnsupportedAdapterError, match=said):
            routed.add_expert(spoilt)
        named = Expert(dataclasses.replace(spoilt.expert_info, expert_name="anna"), weights)
        with pytest.raises(UnsupportedAdapterError, match=said.replace("spoilt", "anna")):
            routed.replace_expert(named)
        assert torch.equal(logits_of(routed, tokens), expected)


def test_an_expert_too_large_for_the_dtype_asked_for_is_refused(base, make_expert):
    expert = make_expert("large", size=1e6)
    with pytest.raises(UnsupportedAdapterError, match=r"'large'.*as torch\.float16"):
        RoutedModel.from_experts([expert], "uniform", base_model=base, dtype=torch.float16)
