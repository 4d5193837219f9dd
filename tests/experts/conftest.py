"""A two-layer model built from a config, and experts on it made in code."""

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary

HIDDEN, MIDDLE, LAYERS = 16, 24, 2
SHAPES = {  # module to (o, i)
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}


@pytest.fixture(scope="session")
def llama():
    """Makes the same two-layer Llama each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=48,
            hidden_size=HIDDEN,
            intermediate_size=MIDDLE,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.fixture(scope="session")
def make_expert():
    """Makes a LoRA expert with random weights on the two-layer Llama."""

    def make(name="e1", task=None, seed=0, rank=2, shapes=None, **config):
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for layer in range(LAYERS):
            for module, (o, i) in (shapes or SHAPES).items():
                path = f"base_model.model.model.layers.{layer}.{module}"
                weights[f"{path}.lora_A.weight"] = torch.randn(rank, i, generator=generator)
                weights[f"{path}.lora_B.weight"] = torch.randn(o, rank, generator=generator)
        targets = sorted(module.split(".")[-1] for module in (shapes or SHAPES))
        defaults = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": targets}
        info = ExpertInfo(name, task, expert_config=defaults | config, expert_model="test/llama")
        return Expert(info, weights)

    return make


@pytest.fixture
def address(scheme, new_address):
    """Makes addresses on one backend, new to each test; one for each name."""
    made = {}

    def make(name="library"):
        if name not in made:
            made[name] = new_address(scheme)
        return made[name]

    return make


@pytest.fixture
def library(address):
    """An empty library, on each backend."""
    return ExpertLibrary(address(), create=True)
