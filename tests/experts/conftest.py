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


_LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
# Name to PEFT's config class, without its ending, and what is set in it.
KINDS = {
    "lora": ("Lora", _LORA),
    "rslora": ("Lora", _LORA | {"use_rslora": True}),
    "dora": ("Lora", _LORA | {"use_dora": True}),
    "patterns": (
        "Lora",
        _LORA
        | {
            "rank_pattern": {"down_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"down_proj": 3},
        },
    ),
    "bias": ("Lora", _LORA | {"bias": "lora_only"}),
    "lora_bias": ("Lora", _LORA | {"lora_bias": True}),
    "modules_to_save": ("Lora", _LORA | {"modules_to_save": ["lm_head"]}),
    "embedding": ("Lora", {"r": 2, "target_modules": ["embed_tokens", "q_proj"]}),
    "tokens": ("Lora", _LORA | {"trainable_token_indices": {"embed_tokens": [1, 3]}}),
    "regex": ("Lora", {"r": 2, "target_modules": r".*\.1\.self_attn\.(q|v)_proj"}),
    "all-linear": ("Lora", {"r": 2, "target_modules": "all-linear"}),
    "parameters": ("Lora", {"r": 2, "target_parameters": ["q_proj.weight"], "target_modules": []}),
    "adalora": ("AdaLora", {"init_r": 4, "target_modules": ["q_proj"], "total_step": 10}),
    "ia3": ("IA3", {"target_modules": ["k_proj"], "feedforward_modules": []}),
    "loha": ("LoHa", {"r": 2, "target_modules": ["q_proj"]}),
    "lokr": ("LoKr", {"r": 2, "target_modules": ["q_proj"]}),
    "oft": ("OFT", {"r": 0, "oft_block_size": 4, "target_modules": ["q_proj"]}),
    "vera": ("Vera", {"r": 4, "target_modules": ["q_proj"]}),
    "shira": ("Shira", {"r": 2, "target_modules": ["q_proj"]}),
    "poly": (
        "Poly",
        {"r": 2, "n_tasks": 2, "n_skills": 2, "n_splits": 2, "target_modules": ["q_proj"]},
    ),
    "norms": ("LNTuning", {"target_modules": ["input_layernorm"]}),
    "tokens_alone": ("TrainableTokens", {"token_indices": [1, 2]}),
    "prompt": ("PromptTuning", {"num_virtual_tokens": 3}),
    "prefix": ("PrefixTuning", {"num_virtual_tokens": 3}),
}


@pytest.fixture(params=KINDS)
def kind(request):
    """Each kind of PEFT adapter in turn."""
    return request.param


@pytest.fixture
def adapted(llama):
    """Makes a model with a perturbed adapter of a kind: ``adapted("dora")``."""
    import peft

    def make(kind, base=llama):
        name, options = KINDS[kind]
        config = getattr(peft, f"{name}Config")(**options, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), config).eval()
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        return model

    return make


@pytest.fixture(scope="session")
def logits():
    """Logits of a model on fixed tokens."""

    @torch.no_grad()
    def of(model, **inputs):
        return model(input_ids=torch.arange(14).reshape(2, 7), **inputs).logits

    return of
