import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mttl_adapters import BaseModel
from mttl_experts import Expert, ExpertInfo

HIDDEN, INTERMEDIATE, KEY_VALUE, VOCABULARY = 32, 48, 16, 61
BASE_ID = "tests/two-layer-llama"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")

SHAPES = {  # (out, in)
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (KEY_VALUE, HIDDEN),
    "v_proj": (KEY_VALUE, HIDDEN),
    "o_proj": (HIDDEN, HIDDEN),
    "gate_proj": (INTERMEDIATE, HIDDEN),
    "up_proj": (INTERMEDIATE, HIDDEN),
    "down_proj": (HIDDEN, INTERMEDIATE),
}


def module_path(layer: int, target: str) -> str:
    block = "self_attn" if target in ATTENTION else "mlp"
    return f"model.layers.{layer}.{block}.{target}"


@pytest.fixture(scope="session")
def base() -> PreTrainedModel:
    """A two-layer Llama in float32, frozen; tests leave it as they find it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


TEXT = "add sum two numbers sort letters words of the list name country capital one big"


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word a token, for all of ``base``'s ids."""
    words = TEXT.split()
    words += [f"w{n}" for n in range(2 + len(words), VOCABULARY - 1)]
    vocabulary = {"<pad>": 0, "<s>": 1} | {word: 2 + n for n, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary | {"<unk>": VOCABULARY - 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def loaded(base, tokenizer) -> BaseModel:
    """The tiny Llama as ``load_base_model`` would give it."""
    return BaseModel(base, tokenizer, BASE_ID, None, "f" * 64, "t" * 64, None)


MakeExpert = Callable[..., Expert]


@pytest.fixture(scope="session")
def make_expert() -> MakeExpert:
    """Random LoRA experts for ``base``, with any of PEFT's ways to say rank and scaling."""

    def make(
        name: str,
        *,
        seed: int | None = None,
        rank: int = 4,
        alpha: float = 8,
        rslora: bool = False,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        layers: Sequence[int] = (0, 1),
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        task: str | tuple[str, ...] | None = None,
        model: str | None = BASE_ID,
        size: float = 0.3,
        dtype: torch.dtype = torch.float32,
        **config: Any,
    ) -> Expert:
        seed = sum(map(ord, name)) if seed is None else seed
        generator = torch.Generator().manual_seed(seed)
        weights: dict[str, Tensor] = {}
        for layer in layers:
            for target in targets:
                path = module_path(layer, target)
                out_features, in_features = SHAPES[target]
                r = next(
                    (v for k, v in (rank_pattern or {}).items() if re.search(rf"{k}$", path)), rank
                )
                for part, shape in [("A", (r, in_features)), ("B", (out_features, r))]:
                    tensor = torch.randn(shape, generator=generator) * size
                    weights[f"base_model.model.{path}.lora_{part}.weight"] = tensor.to(dtype)
        peft_config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": alpha,
            "use_rslora": rslora,
            "target_modules": list(targets),
            "layers_to_transform": list(layers),
            "rank_pattern": dict(rank_pattern or {}),
            "alpha_pattern": dict(alpha_pattern or {}),
            "bias": "none",
        }
        info = ExpertInfo(
            name,
            expert_task_name=name if task is None else task,
            expert_config=peft_config | config,
            expert_model=model,
        )
        return Expert(info, weights)

    return make


@pytest.fixture(scope="session")
def mixed_experts(make_expert: MakeExpert) -> list[Expert]:
    """Four experts that differ in rank, alpha, rsLoRA, patterns and modules."""
    return [
        make_expert("anna"),
        make_expert("bert", rank=2, alpha=5, rslora=True, targets=("q_proj", "down_proj")),
        make_expert(
            "cleo", rank_pattern={"layers.1.self_attn.q_proj": 7}, alpha_pattern={"v_proj": 3}
        ),
        make_expert("dora-the-name", rank=1, layers=(1,), targets=("v_proj", "up_proj")),
    ]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(5))
