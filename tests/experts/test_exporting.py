"""What is exported does what the expert does: equal logits, equal ΔW, and refusals by name."""

import json

import gguf
import numpy as np
import pytest
import torch

from mttl_experts import (
    Expert,
    ExpertInfo,
    IncompatibleExpertError,
    UnsupportedAdapterError,
    lora_modules,
)
from mttl_experts.interop import export_dense, export_gguf
from mttl_experts.interop.dense import RECORD

UNMERGEABLE = {"prompt", "prefix", "poly", "lora_bias"}


def expert_of(model, name="one"):
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"].to_dict()
    weights = get_peft_model_state_dict(model)
    return Expert(ExpertInfo(name, expert_config=config, expert_model="test/base"), weights)


@pytest.fixture
def base(llama, tmp_path):
    """A folder with the two-layer model, and one with tied embeddings."""

    def make(tied=False, dtype=torch.float32):
        folder = tmp_path / f"base-{tied}-{dtype}"
        model = llama().to(dtype)
        if tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        return folder

    return make


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_dense_checkpoint_has_the_logits_of_base_and_adapter(
    kind, tied, base, adapted, logits, tmp_path
):
    folder = base(tied)
    model = adapted(kind, lambda: loaded(folder))
    if kind in UNMERGEABLE:
        with pytest.raises(UnsupportedAdapterError, match="'one' is of kind"):
            export_dense(expert_of(model), folder, tmp_path / "out")
        assert list(tmp_path.glob("*out*")) == []
        return
    want = logits(model)
    assert not torch.allclose(want, logits(loaded(folder)), atol=2e-5)
    export_dense(expert_of(model), folder, tmp_path / "out")
    torch.testing.assert_close(logits(loaded(tmp_path / "out")), want, atol=2e-6, rtol=1e-5)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_is_tied_is_parted_where_the_adapter_changes_it_alone(base, logits, tmp_path):
    import peft

    folder = base(tied=True)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    model = peft.get_peft_model(loaded(folder), config).eval()
    export_dense(expert_of(model), folder, tmp_path / "out")
    torch.testing.assert_close(
        logits(loaded(tmp_path / "out")), logits(model), atol=2e-5, rtol=1e-4
    )


def test_a_dense_checkpoint_is_streamed_in_shards_and_names_what_it_was_made_of(
    base, make_expert, logits, tmp_path, monkeypatch
):
    import transformers

    folder, expert = base(), make_expert()
    with monkeypatch.context() as patch:  # no model is loaded for a plain LoRA
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
        assert export_dense(expert, folder, tmp_path / "a")
        assert export_dense(expert, folder, tmp_path / "b", shard_bytes=2000)
        assert not export_dense(expert, folder, tmp_path / "b")
    assert len(list((tmp_path / "b").glob("model-*.safetensors"))) > 5
    assert torch.equal(logits(loaded(tmp_path / "a")), logits(loaded(tmp_path / "b")))
    record = json.loads((tmp_path / "a" / RECORD).read_text())
    assert record["experts"] == [{"name": "e1", "digest": expert.digest, "weight": 1.0}]
    with pytest.raises(FileExistsError, match="is there already"):
        export_dense(make_expert(seed=9), folder, tmp_path / "a")


def test_a_dense_bfloat16_checkpoint_is_rounded_once(base, make_expert, tmp_path):
    folder, expert = base(dtype=torch.bfloat16), make_expert()
    export_dense(expert, folder, tmp_path / "out")
    before, after = loaded(folder), loaded(tmp_path / "out")
    for module, factors in lora_modules(expert).items():
        want = before.get_submodule(module).weight.float() + factors.scaling * factors.b @ factors.a
        assert torch.equal(after.get_submodule(module).weight, want.bfloat16())


def test_an_expert_that_does_not_fit_the_base_is_refused(base, make_expert, tmp_path):
    wrong = make_expert(shapes={"self_attn.q_proj": (8, 8)})
    with pytest.raises(IncompatibleExpertError, match=r"q_proj.*made for another base"):
        export_dense(wrong, base(), tmp_path / "out")
    elsewhere = make_expert(shapes={"attention.query": (8, 8)})
    with pytest.raises(IncompatibleExpertError, match="does not fit"):
        export_dense(elsewhere, base(), tmp_path / "out")
    folder = base()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"b": 4}}))
    with pytest.raises(UnsupportedAdapterError, match="quantised"):
        export_dense(make_expert(), folder, tmp_path / "out")


# GGUF.


def read_gguf(path):
    """Alpha, and tensors by name as numpy has them: (r, i) and (o, r)."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    return fields, {t.name: np.array(t.data) for t in reader.tensors}


def llama_cpp_delta(fields, tensors, name):
    """ΔW as llama.cpp computes it: alpha / rank · B A, and no scaling where alpha is 0."""
    a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
    assert a.shape[0] == b.shape[1]
    alpha = fields["adapter.lora.alpha"]
    return (alpha / b.shape[1] if alpha else 1.0) * b @ a


def paired_rows(weight, heads):
    """Row 2j of a head is j of its first half, row 2j+1 is j of its second: written out."""
    head = weight.shape[0] // heads
    order = [h * head + half * head // 2 + j for h in range(heads) for j in range(head // 2)
             for half in (0, 1)]  # fmt: skip
    return weight[order]


@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "regex", "all-linear"])
def test_a_gguf_lora_has_the_expert_s_delta_where_llama_cpp_looks(kind, adapted, llama, tmp_path):
    expert = expert_of(adapted(kind))
    config = llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    export_gguf(expert, config, tmp_path / "one.gguf")
    fields, tensors = read_gguf(tmp_path / "one.gguf")
    assert fields["general.architecture"] == "llama"
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    modules = lora_modules(expert)
    assert len(tensors) == 2 * len(modules)
    for module, factors in modules.items():
        _, _, layer, _, leaf = module.split(".")
        want = factors.scaling * (factors.b @ factors.a).numpy()
        if leaf in ("q_proj", "k_proj"):
            want = paired_rows(want, {"q_proj": 2, "k_proj": 1}[leaf])
        found = llama_cpp_delta(fields, tensors, f"blk.{layer}.{short[leaf]}.weight")
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-7)


def test_a_gguf_lora_that_does_not_fit_the_base_is_refused(make_expert, llama, tmp_path):
    config = llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    wrong = make_expert(shapes={"self_attn.k_proj": (16, 16)})  # the base has one head of 8
    with pytest.raises(IncompatibleExpertError, match=r"16 rows of .*k_proj.* 1 heads of 8"):
        export_gguf(wrong, config, tmp_path / "one.gguf")


def test_a_plain_lora_keeps_its_alpha_and_its_factors_bit_for_bit(make_expert, tmp_path):
    expert = make_expert(shapes={"self_attn.v_proj": (8, 16)})
    config = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2}
    export_gguf(expert, config, tmp_path / "one.gguf")
    fields, tensors = read_gguf(tmp_path / "one.gguf")
    assert fields["adapter.lora.alpha"] == 4.0
    assert fields["general.architecture"] == "qwen2"
    for module, factors in lora_modules(expert).items():
        name = f"blk.{module.split('.')[2]}.attn_v.weight"
        np.testing.assert_array_equal(tensors[f"{name}.lora_a"], factors.a.numpy())
        np.testing.assert_array_equal(tensors[f"{name}.lora_b"], factors.b.numpy())


def test_an_alpha_of_zero_is_not_taken_for_no_scaling(make_expert, tmp_path):
    expert = make_expert(shapes={"self_attn.v_proj": (8, 16)}, lora_alpha=0)
    config = {"architectures": ["Qwen2ForCausalLM"], "num_hidden_layers": 2}
    export_gguf(expert, config, tmp_path / "one.gguf")
    fields, tensors = read_gguf(tmp_path / "one.gguf")
    assert not llama_cpp_delta(fields, tensors, "blk.0.attn_v.weight").any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "config", "word"),
    [
        ("dora", {}, "DoRA"),
        ("modules_to_save", {}, "modules_to_save"),
        ("ia3", {}, "IA3"),
        ("lora", {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ("lora", {"num_hidden_layers": 1}, "layers.1.*no tensor"),
    ],
)
def test_what_has_no_place_in_a_gguf_file_is_refused_by_name(
    kind, config, word, adapted, llama, tmp_path
):
    expert = expert_of(adapted(kind))
    known = llama().config.to_dict() | {"architectures": ["LlamaForCausalLM"]} | config
    with pytest.raises(UnsupportedAdapterError, match=word):
        export_gguf(expert, known, tmp_path / "one.gguf")
    assert list(tmp_path.iterdir()) == []


# What llama.cpp's own converter made of a real Llama.

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "tie_word_embeddings": True,
}
SMOLLM2_MODULES = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576), "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
}  # fmt: skip


def lora_of(deltas):
    """An expert whose ΔW are the given matrices, as B = ΔW and A = 1."""
    weights = {}
    for module, delta in deltas.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = torch.eye(delta.shape[1])
        weights[f"base_model.model.{module}.lora_B.weight"] = delta
    ranks = {module: delta.shape[1] for module, delta in deltas.items()}
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": sorted(ranks),
              "rank_pattern": ranks, "alpha_pattern": dict(ranks)}  # fmt: skip
    return Expert(ExpertInfo("all", expert_config=config), weights)


def test_every_tensor_is_one_that_the_real_base_has_with_its_shape(make_expert, tmp_path):
    from mttl_adapters.embedded import embedded_gguf

    real = {t.name: t.shape.tolist() for t in gguf.GGUFReader(embedded_gguf()).tensors}
    expert = make_expert(shapes=SMOLLM2_MODULES)
    export_gguf(expert, SMOLLM2, tmp_path / "one.gguf")
    _, tensors = read_gguf(tmp_path / "one.gguf")
    assert len(tensors) == 2 * 2 * 7
    for name in {name.rpartition(".")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert [a.shape[1], b.shape[0]] == real[name]  # llama.cpp names the inputs first
    with pytest.raises(UnsupportedAdapterError, match="lm_head"):
        export_gguf(lora_of({"lm_head": torch.ones(8, 8)}), SMOLLM2, tmp_path / "x.gguf")


@pytest.mark.slow
def test_rows_are_where_the_real_base_has_them(tmp_path):
    from safetensors.torch import load_file

    from mttl_adapters.embedded import embedded_folder, embedded_gguf

    weights = load_file(embedded_folder() / "model.safetensors")
    modules = [f"model.layers.3.{module}" for module in SMOLLM2_MODULES]
    deltas = {module: weights[f"{module}.weight"].float() for module in modules}
    export_gguf(lora_of(deltas), SMOLLM2, tmp_path / "all.gguf")
    fields, tensors = read_gguf(tmp_path / "all.gguf")
    real = {t.name: t for t in gguf.GGUFReader(embedded_gguf()).tensors}
    for name in {name.rpartition(".")[0] for name in tensors}:
        want = gguf.dequantize(real[name].data, real[name].tensor_type)
        found = llama_cpp_delta(fields, tensors, name)
        np.testing.assert_allclose(found, want, rtol=1e-6)
