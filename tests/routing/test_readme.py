import re
from pathlib import Path

import pytest
import torch

from mttl_experts import ExpertLibrary, lora_modules
from mttl_routing import MERGES, ROUTERS

README = Path(__file__).parents[2] / "packages" / "mttl-routing" / "README.md"


@pytest.fixture
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_method_and_router_is_in_the_readme():
    text = README.read_text(encoding="utf-8")
    for name, entry in [*MERGES.items(), *ROUTERS.items()]:
        assert f"`{name}`" in text
        assert entry.paper in text


def test_the_custom_router_equals_a_slow_loop(base, mixed_experts, tokens, tmp_path, blocks):
    library = ExpertLibrary(f"local://{tmp_path}/library", create=True)
    for expert in mixed_experts:
        library.add_expert(expert)
    names = {"library": library, "base": base}
    exec(blocks[2], names)
    routed = names["routed"]
    seen = []
    path = "model.layers.1.self_attn.v_proj"
    handle = base.get_submodule(path).register_forward_hook(
        lambda module, args, output: seen.append((args[0], output))
    )
    with routed, torch.no_grad():
        routed(tokens)
    handle.remove()
    x, found = (tensor.flatten(0, 1) for tensor in seen[0])
    factors = [lora_modules(library[name]).get(path) for name in library]
    for token in range(0, len(x), 5):
        updates = [
            torch.zeros(found.shape[1]) if f is None else f.scaling * f.b @ (f.a @ x[token])
            for f in factors
        ]
        weights = torch.stack([update.norm() for update in updates]).softmax(0)
        expected = base.get_submodule(path)(x[token])
        expected = expected + sum(w * u for w, u in zip(weights, updates, strict=True))
        torch.testing.assert_close(found[token], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("router", ["phatgoose", "softmax"])
def test_the_examples_of_routers_that_are_shown_data_run(
    base, mixed_experts, tokens, tmp_path, blocks, router
):
    library = ExpertLibrary(f"local://{tmp_path}/library", create=True)
    library.add_expert(mixed_experts[0])
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    names = {"library": library, "base": base, "batches": {"anna": [batch]}}
    (text,) = (b for b in blocks if f'"{router}"' in b and "batches=batches" in b)
    exec(f"from mttl_routing import RoutedModel\n{text}", names)
    with names["model"] as model, torch.no_grad():
        assert model(tokens).logits.shape == (3, 9, 61)


def test_the_example_of_training_runs(base, mixed_experts, tokens, tmp_path, blocks, monkeypatch):
    monkeypatch.chdir(tmp_path)
    library = ExpertLibrary("local://library", create=True)
    for expert in mixed_experts:
        library.add_expert(expert)
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    names = {"library": library, "base": base, "mixture": [batch] * 2}
    (text,) = (block for block in blocks if "train(" in block)
    exec(text, names)
    names["again"].remove()
    for name, value in names["routed"].router.state_dict().items():
        assert torch.equal(value, names["again"].router.state_dict()[name])


def test_the_first_example_runs(base, mixed_experts, tmp_path, blocks, monkeypatch, capsys):
    class Tokenizer:
        def __call__(self, text: str, return_tensors: str) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[ord(sign) % 61 for sign in text]])}

        def decode(self, ids: torch.Tensor) -> str:
            return " ".join(map(str, ids.tolist()))

    class Loaded:
        model, tokenizer, model_id = base, Tokenizer(), "tests/two-layer-llama"
        fingerprint, tokenizer_digest, template_digest = "f" * 64, "t" * 64, None

    monkeypatch.chdir(tmp_path)
    library = ExpertLibrary("local://mttldata/library", create=True)
    for expert in mixed_experts:
        library.add_expert(expert)
    text = blocks[0].replace("from mttl_adapters import load_base_model", "")
    exec(text, {"load_base_model": lambda name: Loaded})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0] != lines[1]


def test_the_example_of_more_experts_than_memory_holds_runs(
    base, mixed_experts, tokens, tmp_path, blocks, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = ExpertLibrary(f"local://{tmp_path}/library", create=True)
    for expert in mixed_experts:
        library.add_expert(expert)
    (text,) = (block for block in blocks if "BankFiles" in block)
    names = {"library": library, "base": base, "prompt": {"input_ids": tokens}}
    exec(text, names)
    assert len(list(names["files"].folder.iterdir())) == len(library)
