import json

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary, lora_modules

TOKENS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def library(tmp_path, base_folder):
    """Two LoRA experts on the tiny base, of different rank and alpha."""
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    for name, rank, alpha in (("one", 2, 4), ("two", 3, 9)):
        generator = torch.Generator().manual_seed(rank)
        weights = {}
        for layer in range(2):
            path = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            weights[f"{path}.lora_A.weight"] = torch.randn(rank, 32, generator=generator)
            weights[f"{path}.lora_B.weight"] = torch.randn(32, rank, generator=generator)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": ["q_proj"]}
        info = ExpertInfo(name, f"{name}_task", expert_config=config, expert_model=str(base_folder))
        library.add_expert(Expert(info, weights))
    return library


@torch.no_grad()
def logits(folder, deltas=(), adapter=None):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for weight, expert in deltas:
        for module, factors in lora_modules(expert).items():
            delta = weight * factors.scaling * factors.b @ factors.a
            model.get_submodule(module).weight += delta
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    return model(input_ids=TOKENS).logits


def close(found, want):
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_each_format_does_what_the_expert_does(app, library, base_folder, tmp_path):
    one = [(1.0, library["one"])]
    want = logits(base_folder, one)
    assert (want - logits(base_folder)).abs().max() > 0.01

    out = app("library", "export", library.uri, "--to", "out")
    assert out.exit_code == 0, out.output
    close(logits(base_folder, adapter=tmp_path / "out" / "one"), want)
    assert (tmp_path / "out" / "two" / "adapter_config.json").is_file()

    for _ in range(2):  # the second finds it done
        out = app("library", "export", library.uri, "--to", "dense", "--format", "dense",
                  "--expert", "one", "--json")  # fmt: skip
        assert json.loads(out.stdout)["made"] == ["dense/one"]
    close(logits(tmp_path / "dense" / "one"), want)

    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "dense" / "one")("w1 w2").input_ids

    out = app("library", "export", library.uri, "--to", "gguf", "--format", "gguf")
    assert out.exit_code == 0, out.output
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == ["one.gguf", "two.gguf"]


@pytest.mark.parametrize("weights", [None, "one=0.5,two=-2"])
def test_the_stacked_lora_is_the_weighted_sum(app, library, base_folder, tmp_path, weights):
    given = () if weights is None else ("--weights", weights)
    out = app("library", "export", library.uri, "--to", "out", "--format", "stacked", *given)
    assert out.exit_code == 0, out.output
    one, two = (0.5, 0.5) if weights is None else (0.5, -2)
    want = logits(base_folder, [(one, library["one"]), (two, library["two"])])
    close(logits(base_folder, adapter=tmp_path / "out" / "stacked"), want)
    config = json.loads((tmp_path / "out" / "stacked" / "adapter_config.json").read_text())
    assert config["r"] == 2 + 3


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("--format", "dense"), "--expert"),
        (("--expert", "thre"), "'two'"),
        (("--format", "stacked", "--weights", "one=1"), "two"),
        (("--format", "stacked", "--weights", "one=x,two=1"), "NAME=NUMBER"),
        (("--format", "dense", "--expert", "one", "--base", "."), "config.json"),
        (("--weights", "one=1"), "stacked"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line(app, library, args, word):
    out = app("library", "export", library.uri, "--to", "out", *args)
    assert isinstance(out.exception, SystemExit), out.exception
    assert word in out.output.strip().splitlines()[-1]
