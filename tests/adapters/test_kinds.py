import pytest
import torch
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from mttl_adapters.kinds import linear_layers, lora_config


def test_every_linear_layer_but_the_head_is_adapted(model):
    names = linear_layers(model)
    assert len(names) == 2 * 7
    assert "lm_head" not in names


@pytest.mark.parametrize(
    ("layers", "modules", "n"),
    [(".*", ".*", 14), ("q_proj|v_proj", ".*", 4), (".*", r".*\.1\.self_attn", 4)],
)
def test_layers_are_chosen_by_name(model, layers, modules, n):
    peft_model = get_peft_model(model, lora_config(model, layers=layers, modules=modules))
    adapted = [name for name, _ in peft_model.named_parameters() if "lora_A" in name]
    assert len(adapted) == n


def test_an_adapter_that_attaches_to_nothing_names_the_layers(model):
    with pytest.raises(ValueError, match="k_proj, o_proj, q_proj"):
        lora_config(model, layers="query")


def test_a_conv1d_layer_is_adapted_in_its_own_orientation():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    config = lora_config(model, rank=2, layers="c_attn")
    assert config.fan_in_fan_out
    peft_model = get_peft_model(model, config)
    shapes = {n: p.shape for n, p in peft_model.named_parameters() if "lora" in n}
    assert torch.Size([2, 8]) in shapes.values()
    assert torch.Size([24, 2]) in shapes.values()
