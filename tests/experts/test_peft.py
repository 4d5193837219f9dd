"""An expert's folder is a PEFT folder: what PEFT makes of it is what the factors say."""

import math

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary, lora_modules, spectral_forms

pytest.importorskip("peft")  # the package itself does not need it
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 3},
    },
    "regex": {"r": 2, "lora_alpha": 2, "target_modules": r".*\.0\.self_attn\.(q|o)_proj"},
    "rslora-patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": "all-linear",
        "rank_pattern": {"gate_proj": 1},
        "alpha_pattern": {"gate_proj": 5},
    },
}


@pytest.fixture(params=CONFIGS)
def trained(request, llama):
    """A model with a perturbed LoRA, as PEFT has it, and its expert."""
    config = LoraConfig(**CONFIGS[request.param], task_type="CAUSAL_LM")
    model = get_peft_model(llama(), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    info = ExpertInfo(request.param, "t", expert_config=config.to_dict(), expert_model="test/llama")
    return model, Expert(info, get_peft_model_state_dict(model, save_embedding_layers=False))


TOKENS = torch.arange(14).reshape(2, 7)


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def add_deltas(model, deltas):
    """Add each ΔW to the base's weight: the slow obvious version."""
    with torch.no_grad():
        for path, delta in deltas.items():
            model.get_submodule(path).weight += delta
    return model


def test_peft_loads_the_folder_and_gives_the_logits_that_our_delta_gives(
    trained, llama, tmp_path, address
):
    model, expert = trained
    library = ExpertLibrary(address(), create=True)
    library.add_expert(expert)
    loaded = PeftModel.from_pretrained(llama(), library.path(expert.name)).eval()
    assert torch.equal(logits(loaded), logits(model))

    factors = lora_modules(library[expert.name])
    ours = add_deltas(llama(), {m: f.scaling * f.b @ f.a for m, f in factors.items()})
    assert (logits(ours) - logits(llama())).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-4, rtol=1e-4)

    forms = spectral_forms(library[expert.name])
    ours = add_deltas(llama(), {m: (f.u * f.sigma) @ f.v.T for m, f in forms.items()})
    torch.testing.assert_close(logits(ours), logits(model), atol=1e-4, rtol=1e-4)


def test_scalings_are_those_of_peft(trained):
    model, expert = trained
    factors = lora_modules(expert)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert factors.keys() == layers.keys()
    for path, found in factors.items():
        assert found.scaling == layers[path].scaling["default"]
        assert found.rank == layers[path].r["default"]


def test_fan_in_fan_out_is_noted_and_delta_is_o_by_i_all_the_same():
    from transformers import GPT2Config, GPT2LMHeadModel

    def base():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=1)).eval()

    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(base(), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    info = ExpertInfo("gpt2", expert_config=config.to_dict())
    factors = lora_modules(Expert(info, get_peft_model_state_dict(model)))
    ((path, found),) = factors.items()
    assert found.fan_in_fan_out
    assert (found.b.shape[0], found.a.shape[1]) == (24, 8)
    delta = found.scaling * found.b @ found.a
    ours = add_deltas(base(), {path: delta.T})  # such a weight is (i, o)
    tokens = torch.arange(6).reshape(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_merged_model_of_peft_has_our_delta(trained, llama):
    model, expert = trained
    before = llama()
    merged = model.merge_and_unload()
    for path, found in lora_modules(expert).items():
        change = merged.get_submodule(path).weight - before.get_submodule(path).weight
        torch.testing.assert_close(
            change.detach(), found.scaling * found.b @ found.a, atol=1e-5, rtol=1e-4
        )
    assert math.isfinite(logits(merged).sum())
