import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from mttl_experts import Expert, lora_modules
from mttl_routing import apply_expert, merge, merge_into_checkpoint


@pytest.fixture(params=["one file", "shards"])
def checkpoint(request, base, tmp_path):
    size = "30KB" if request.param == "shards" else "1GB"
    base.save_pretrained(tmp_path / "base", max_shard_size=size)
    (tmp_path / "base" / "notes.txt").write_text("kept")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"the base's own")
    return tmp_path / "base"


@pytest.mark.parametrize("method", ["uniform", "ties"])
def test_the_checkpoint_is_the_base_with_the_merge(
    base, tokens, mixed_experts, checkpoint, tmp_path, method
):
    merged = merge(mixed_experts, method)
    told = []
    made = merge_into_checkpoint(
        merged, checkpoint, tmp_path / "made", progress=lambda *args: told.append(args)
    )
    shards = len(list(checkpoint.glob("*.safetensors")))
    assert told == [("", n + 1, shards) for n in range(shards)]
    assert (made / "notes.txt").read_text() == "kept"
    assert not (made / "pytorch_model.bin").exists()
    model = LlamaForCausalLM.from_pretrained(made).eval()
    with torch.no_grad(), apply_expert(base, merged) as other:
        torch.testing.assert_close(model(tokens).logits, other(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob("*.part"))


def test_a_weight_keeps_its_dtype_and_is_rounded_once(base, make_expert, tmp_path):
    copy.deepcopy(base).bfloat16().save_pretrained(tmp_path / "base")
    expert = make_expert("e1", size=0.01)
    merge_into_checkpoint(expert, tmp_path / "base", tmp_path / "made")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "made", dtype=torch.bfloat16)
    for module, f in lora_modules(expert).items():
        weight = base.get_submodule(module).weight.bfloat16().float()
        expected = (weight + f.scaling * f.b @ f.a).bfloat16()
        assert torch.equal(model.get_submodule(module).weight, expected)


def test_a_weight_kept_the_other_way_round_gets_the_transpose(base, make_expert, tmp_path):
    base.save_pretrained(tmp_path / "base")
    expert = make_expert("e1", targets=("q_proj",), fan_in_fan_out=True)
    merge_into_checkpoint(expert, tmp_path / "base", tmp_path / "made")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "made")
    for module, f in lora_modules(expert).items():
        expected = base.get_submodule(module).weight + (f.scaling * f.b @ f.a).T
        torch.testing.assert_close(model.get_submodule(module).weight, expected)


def test_what_does_not_fit_is_refused_before_anything_is_written(
    base, make_expert, checkpoint, tmp_path
):
    expert = make_expert("e1", layers=(1,))
    config = expert.expert_info.expert_config
    renamed = {k.replace("layers.1", "layers.7"): v for k, v in expert.expert_weights.items()}
    other = Expert(replace(expert.expert_info, expert_config=config), renamed)
    with pytest.raises(ValueError, match=r"no weight of module .*layers\.7.*\(2 such of 2\)"):
        merge_into_checkpoint(other, checkpoint, tmp_path / "made")
    narrow = {k: v[:, :8] if "lora_A" in k else v for k, v in expert.expert_weights.items()}
    with pytest.raises(ValueError, match=r"\(32, 32\) F32, expert 'e1' has \(32, 8\)|\(16, 32\)"):
        merge_into_checkpoint(Expert(expert.expert_info, narrow), checkpoint, tmp_path / "made")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_a_folder_that_is_there_is_left_alone_and_one_without_weights_named(make_expert, tmp_path):
    expert = make_expert("e1")
    with pytest.raises(FileExistsError, match="name a new folder"):
        merge_into_checkpoint(expert, tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        merge_into_checkpoint(expert, tmp_path, tmp_path / "made")


def test_a_break_leaves_nothing(mixed_experts, checkpoint, tmp_path):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_into_checkpoint(mixed_experts[0], checkpoint, tmp_path / "made", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    assert json.loads((checkpoint / "config.json").read_text())["hidden_size"] == 32
