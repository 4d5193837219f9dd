"""Experts of other kinds, routed as the LoRA experts that they come to."""

import copy

import peft
import pytest
import torch

from mttl_experts import Expert, ExpertInfo, UnsupportedAdapterError
from mttl_routing import RoutedModel, apply_expert, as_lora

CLOSE = {"rtol": 1e-3, "atol": 1e-3}
TARGETS = ["q_proj", "up_proj"]


def made(base, folder, config) -> tuple[Expert, torch.nn.Module]:
    """A random expert of a kind, and the base with it under PEFT."""
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 1.0 if "ia3" in name else 0.0, 0.3)
    model.save_pretrained(folder)
    info = ExpertInfo("other", expert_config=model.peft_config["default"].to_dict())
    weights = peft.get_peft_model_state_dict(model)
    return Expert(info, {name: value.detach() for name, value in weights.items()}), model


KINDS = {
    "LOHA": (peft.LoHaConfig(r=2, alpha=2, target_modules=TARGETS), 4),
    "LOKR": (peft.LoKrConfig(r=2, alpha=2, target_modules=TARGETS), 32),
    "IA3": (peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]), 32),
    "LORA": (peft.LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, use_dora=True), 32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_expert_equals_peft(base, make_expert, tokens, tmp_path, kind):
    config, most = KINDS[kind]
    expert, model = made(base, tmp_path, config)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    converted = as_lora(expert, base)
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    report = converted.expert_info.training_config["conversion"]
    assert report["kind"] == kind
    assert max(report["lost"].values()) < 1e-5
    assert max(converted.expert_info.expert_config["rank_pattern"].values()) <= most
    with torch.no_grad():
        expected = model(tokens).logits
        with apply_expert(base, converted):
            torch.testing.assert_close(base(tokens).logits, expected, **CLOSE)
    with RoutedModel.from_experts([converted, make_expert("anna")], base_model=base) as routed:
        routed(tokens)


def test_what_a_smaller_rank_loses_is_stated(base, tmp_path):
    expert, _ = made(base, tmp_path, KINDS["IA3"][0])
    report = as_lora(expert, base, rank=3).expert_info.training_config["conversion"]["lost"]
    whole, cut = as_lora(expert, base), as_lora(expert, base, rank=3)
    for path, lost in report.items():
        one, other = (
            e.expert_weights[f"base_model.model.{path}.lora_B.weight"]
            @ e.expert_weights[f"base_model.model.{path}.lora_A.weight"]
            for e in (whole, cut)
        )
        assert lost == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-3)
        assert lost > 0.1


def test_a_kind_that_changes_no_weights_is_refused_by_name(base, tmp_path):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    expert, _ = made(base, tmp_path, config)
    with pytest.raises(UnsupportedAdapterError, match="'other' of kind 'PREFIX_TUNING' cannot"):
        as_lora(expert, base)


@pytest.mark.parametrize("tolerance", [0.0, 0.2, 0.5])
def test_experts_of_other_kinds_are_routed_when_asked_losing_what_may_be_lost(
    base, make_expert, tokens, tmp_path, tolerance
):
    expert, model = made(base, tmp_path, KINDS["LORA"][0])
    lora = make_expert("anna")
    with pytest.raises(UnsupportedAdapterError, match="'other'.*DoRA"):
        RoutedModel.from_experts([expert, lora], base_model=base)
    with (
        RoutedModel.from_experts(
            [expert, lora], "uniform", base_model=base, convert=tolerance
        ) as routed,
        torch.no_grad(),
    ):
        assert routed.experts == ("anna", "other")
        with routed.only("other"):
            found = routed(tokens).logits
    if tolerance == 0:
        with torch.no_grad():
            torch.testing.assert_close(found, model(tokens).logits, **CLOSE)
    whole, cut = as_lora(expert, base), as_lora(expert, base, tolerance=tolerance)
    ranks = {
        path: (whole.expert_info.expert_config["rank_pattern"][path], rank)
        for path, rank in cut.expert_info.expert_config["rank_pattern"].items()
    }
    for path, lost in cut.expert_info.training_config["conversion"]["lost"].items():
        most, kept = ranks[path]
        assert lost <= tolerance + 1e-6
        assert kept < most if tolerance else kept == most
        one_less = as_lora(expert, base, rank=max(1, kept - 1)).expert_info.training_config
        assert one_less["conversion"]["lost"][path] > tolerance
