"""A two-layer model and byte-level tokenizers, built in code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_end|>"],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, with a chat template that ends a turn in <|im_end|>."""
    return _tokenizer(CHAT_TEMPLATE)


@pytest.fixture(scope="session")
def raw_tokenizer() -> PreTrainedTokenizerFast:
    """The same without a chat template."""
    return _tokenizer(None)


def _tiny_llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 259,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 0,
            "pad_token_id": 0,
            **options,
        }
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # far apart logits, so that rounding never decides
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return _tiny_llama()


@pytest.fixture
def tiny_llama():
    """Makes further models like ``model``, with other settings if given."""
    return _tiny_llama


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that MTTL_TEST_DATA names."""
    folder = os.environ.get("MTTL_TEST_DATA")
    if not folder:
        pytest.skip("MTTL_TEST_DATA names no folder of real data")
    return Path(folder)
