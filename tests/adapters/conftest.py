"""A two-layer Llama and its tokenizer, built in code."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def build_model(seed=0, **changes):
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes)))
    return model.requires_grad_(False).eval()


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<end>", *(f"w{i}" for i in range(62))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")


@pytest.fixture
def batches():
    return make_batches


def make_batches(n, rows=4, length=10, seed=0, vocabulary=64):
    """Rows of which the last three tokens are labelled and some are padded."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        ids = torch.randint(2, vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        labels = torch.full_like(ids, -100)
        labels[:, -3:] = ids[:, -3:]
        mask[0, -1], labels[0, -1] = 0, -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made
