"""A tiny base model in a folder, tiny tasks in another, and the apps as functions of arguments."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
TASKS = ("copy_last", "copy_first")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    return build_base(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def make_base():
    """Makes a base of other weights in a folder: ``make_base(path, seed=1)``."""
    return build_base


def build_base(path, seed=0):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    words = ["<pad>", "<end>", *(f"w{i}" for i in range(62))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory):
    """Two tasks of 80 rows: say the last word, say the first word."""
    path = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)
    rows = []
    for task in TASKS:
        for index in range(80):
            first, last = (f"w{generator.randrange(2)}" for _ in range(2))
            words = [first, f"w{index % 60 + 2}", f"w{index // 60 + 2}", last]
            rows.append(
                {
                    "source": " ".join(words),
                    "target": words[-1 if task == "copy_last" else 0],
                    "task_name": task,
                    "task_source": "NIv2" if index % 2 else "P3",
                    "template_type": "zs_noopt",
                }
            )
    (path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def app(monkeypatch, tmp_path):
    """Runs an app in this process, in an empty folder: ``app("train", "--task", "x")``.

    What it asks is answered by ``answer="y\\n"``.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CONFIG_PATH", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(name, *args, answer=None):
        monkeypatch.syspath_prepend(str(ROOT / "apps" / name))
        main = f"{name}_app"
        if main not in sys.modules:
            path = ROOT / "apps" / name / "__main__.py"
            spec = importlib.util.spec_from_file_location(main, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            sys.modules[main] = module
        return CliRunner().invoke(sys.modules[main].main, [str(arg) for arg in args], input=answer)

    return run


@pytest.fixture
def train(app, base_folder, task_folder):
    """``apps/train`` on the tiny model and tasks, for few steps."""

    def run(*args, model=base_folder, dataset=task_folder):
        small = ("--model", model, "--dataset", dataset, "--rank", "2", "--precision", "32")
        defaults = () if "--steps" in args or "--epochs" in args else ("--steps", "3")
        return app("train", *small, *defaults, *args)

    return run
