import dataclasses
import warnings

import pytest
import torch

from mttl_experts import (
    Expert,
    ExpertInfo,
    IncompatibleExpertError,
    IncompatibleExpertWarning,
    check_compatible,
    check_fits,
    check_weights,
)

MODULES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"]


def lora(**config):
    return ExpertInfo("e1", expert_config={"peft_type": "LORA", "r": 2} | config)


def test_another_base_is_refused_and_both_are_named():
    info = ExpertInfo("e1", expert_model="microsoft/phi-2")
    with pytest.raises(IncompatibleExpertError, match=r"'e1'.*'microsoft/phi-2'.*'gpt2'"):
        check_compatible(info, base_id="gpt2")


def test_the_same_weights_under_another_name_are_the_same_base():
    info = ExpertInfo("e1", expert_model="/a/phi", model_fingerprint="aaa")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_compatible(info, base_id="/b/phi", fingerprint="aaa", strict=True)
    with pytest.raises(IncompatibleExpertError, match="'/b/phi'"):
        check_compatible(info, base_id="/b/phi", fingerprint="bbb")


@pytest.mark.parametrize("what", ["fingerprint", "tokenizer_digest", "template_digest"])
def test_the_same_base_with_another_fingerprint_is_a_warning_and_strictly_an_error(what):
    field = "model_fingerprint" if what == "fingerprint" else what
    info = ExpertInfo("e1", expert_model="gpt2", **{field: "aaa"})
    with pytest.warns(IncompatibleExpertWarning, match=r"'e1'.*'aaa'.*'bbb'"):
        check_compatible(info, base_id="gpt2", **{what: "bbb"})
    with pytest.raises(IncompatibleExpertError, match=r"'aaa'.*'bbb'"):
        check_compatible(info, base_id="gpt2", **{what: "bbb"}, strict=True)


def test_what_fits_or_is_not_known_passes_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_compatible(ExpertInfo("e1"), base_id="gpt2", fingerprint="aaa", strict=True)
        info = ExpertInfo("e1", expert_model="gpt2", model_fingerprint="aaa")
        check_compatible(info, base_id="gpt2", fingerprint="aaa", strict=True)
        check_compatible(info)


@pytest.mark.parametrize("targets", [[], ""])
def test_a_config_that_targets_nothing_is_refused(targets):
    with pytest.raises(
        IncompatibleExpertError, match=r"'e1' has target_modules=.*attach to nothing"
    ):
        check_compatible(lora(target_modules=targets))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q"]},
        {"target_modules": ["k_proj", "o_proj"]},
        {"target_modules": r"model\.decoder\..*"},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
    ],
)
def test_a_config_that_matches_no_module_of_the_base_is_refused(config):
    with pytest.raises(IncompatibleExpertError, match="match none of the base's 3 modules"):
        check_compatible(lora(**config), modules=MODULES)


def test_a_target_that_is_no_regular_expression_is_refused():
    with pytest.raises(IncompatibleExpertError, match=r"'\(' is no regular expression"):
        check_compatible(lora(target_modules="("), modules=MODULES)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj"]},
        {"target_modules": r".*\.(q|k)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
        {},
    ],
)
def test_a_config_that_matches_a_module_passes(config):
    check_compatible(lora(**config), modules=MODULES)


def test_another_architecture_is_refused_whatever_the_base_is_called():
    info = ExpertInfo("e1", expert_model="org/base", model_architecture="llama")
    check_compatible(info, architecture="llama")
    with pytest.raises(IncompatibleExpertError, match=r"'e1'.*'llama', not 'gpt2'"):
        check_compatible(info, architecture="gpt2")


def test_weights_that_their_config_would_drop_are_refused(make_expert):
    check_weights(make_expert("e1"))
    lost = make_expert("e1", target_modules=["k_proj"])
    with pytest.raises(IncompatibleExpertError, match=r"'e1' has weights for 4 .*match none of"):
        check_weights(lost)
    with pytest.raises(IncompatibleExpertError, match=r"lora_A \(2, \d+\).*says rank 8"):
        check_weights(make_expert("e1", r=8))
    expert = make_expert("e1")
    (name, *_) = (key for key in expert.expert_weights if "lora_B" in key)
    odd = Expert(expert.expert_info, {**expert.expert_weights, name: torch.ones(16, 3)})
    with pytest.raises(IncompatibleExpertError, match=r"lora_B \(16, 3\)"):
        check_weights(odd)


def test_a_shape_that_does_not_fit_the_base_is_refused(make_expert):
    expert = make_expert("e1")
    shapes = {
        f"model.layers.{layer}.{module}": shape
        for layer in range(2)
        for module, shape in {"self_attn.q_proj": (16, 16), "mlp.down_proj": (16, 24)}.items()
    }
    check_fits(expert, shapes)
    path = "model.layers.1.mlp.down_proj"
    with pytest.raises(IncompatibleExpertError, match=r"is \(16, 32\) .* and \(16, 24\)"):
        check_fits(expert, shapes | {path: (16, 32)})
    fewer = {name: shape for name, shape in shapes.items() if name != path}
    with pytest.raises(IncompatibleExpertError, match=rf"lacks 1 \(such as '{path}'\)"):
        check_fits(expert, fewer)
    none = dataclasses.replace(expert.expert_info, expert_config=None)
    with pytest.raises(IncompatibleExpertError, match="lacks 4"):
        check_fits(Expert(none, expert.expert_weights), {"lm_head": (16, 16)})
