"""Models of many shapes, built in code, and quantised ones."""

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from mttl_experts import Expert, ExpertInfo, IncompatibleExpertError, UnsupportedAdapterError
from mttl_routing import RoutedModel, apply_expert
from mttl_routing.routers import Logo, Lorauter, Predictor, Retrieval
from mttl_routing.routers.embedding import BaseEmbedding

VOCABULARY = 61
SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LENGTH = {"max_new_tokens": 5, "do_sample": False}

# Name to its classes, what its config is given, and the modules that experts adapt.
MODELS = {
    "gpt_neox": ("GPTNeoX", {k: v for k, v in SHAPE.items() if "key_value" not in k},
                 ("attention.query_key_value", "mlp.dense_4h_to_h")),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
             ("attn.c_attn", "mlp.c_proj")),
    "phi": ("Phi", SHAPE, ("self_attn.q_proj", "mlp.fc2")),
    "mistral": ("Mistral", SHAPE | {"sliding_window": 8}, ("self_attn.v_proj", "mlp.up_proj")),
    "qwen2": ("Qwen2", SHAPE | {"tie_word_embeddings": True}, ("self_attn.k_proj", "lm_head")),
    "qwen3": ("Qwen3", SHAPE | {"head_dim": 8}, ("self_attn.o_proj", "mlp.gate_proj")),
    "mixtral": ("Mixtral", SHAPE | {"num_local_experts": 4}, ("self_attn.q_proj",)),
}  # fmt: skip


def built(name: str):
    torch.manual_seed(0)
    kind, shape, _ = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**shape, **SMALL, initializer_range=0.3)
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")
    return model(config).eval().requires_grad_(False)


def expert_for(model, name: str, targets, rank: int = 3) -> Expert:
    """A random LoRA expert on every module whose path ends so."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    weights, conv = {}, False
    for path, module in model.named_modules():
        if path.endswith(tuple(targets)):
            conv = isinstance(module, Conv1D)
            i, o = (module.nx, module.nf) if conv else (module.in_features, module.out_features)
            for part, shape in (("A", (rank, i)), ("B", (o, rank))):
                drawn = torch.randn(shape, generator=generator) * 0.3
                weights[f"base_model.model.{path}.lora_{part}.weight"] = drawn
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": list(targets),
              "fan_in_fan_out": conv}  # fmt: skip
    return Expert(ExpertInfo(name, expert_task_name=name, expert_config=config), weights)


def with_weights_added(model, experts: dict[Expert, float]):
    """A copy whose own weights have each expert's ΔW added, times its share."""
    added = copy.deepcopy(model)
    for expert, share in experts.items():
        weights = dict(expert.expert_weights)
        for name in [name for name in weights if "lora_A" in name]:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank = weights[name].shape[0]
            delta = share * 4 / rank * weights[name.replace("lora_A", "lora_B")] @ weights[name]
            module = added.get_submodule(path)
            old = module.weight
            module.weight = torch.nn.Parameter(
                old + (delta.T if isinstance(module, Conv1D) else delta), requires_grad=False
            )
    return added


@torch.no_grad()
def logits_of(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


class ByPrompt:
    def decide(self, prompt):
        lengths = prompt.attention_mask.sum(dim=1)
        n = len(prompt.experts)
        return torch.nn.functional.one_hot(lengths % n, n).float()


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_another_shape_is_routed(name, tokens):
    model, targets = built(name), MODELS[name][2]
    experts = [expert_for(model, "anna", targets), expert_for(model, "bert", targets[:1], rank=5)]
    expected = with_weights_added(model, dict.fromkeys(experts, 0.5))
    rows = [tokens[0], tokens[1, :5]]
    before = logits_of(model, tokens)
    with RoutedModel.from_experts(experts, "uniform", base_model=model) as routed:
        found = logits_of(routed, tokens)
    torch.testing.assert_close(found, logits_of(expected, tokens), **CLOSE)
    assert (found - before).abs().max() > 1e-2
    for router in ("arrow", ByPrompt()):
        with RoutedModel.from_experts(experts, router, top_k=1, base_model=model) as routed:
            cached = routed.generate(**left_padded(rows), **LENGTH)
            plain = routed.generate(**left_padded(rows), **LENGTH, use_cache=False)
            assert torch.equal(cached, plain)
            for index, row in enumerate(rows):
                alone = routed.generate(row[None], **LENGTH)
                assert torch.equal(cached[index, -5:], alone[0, -5:])
    assert torch.equal(logits_of(model, tokens), before)


def test_a_head_that_is_tied_to_the_embeddings_changes_alone(tokens):
    model = built("qwen2")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    kept = model.lm_head.weight.clone()
    expert = expert_for(model, "anna", ("lm_head",))
    with apply_expert(model, expert):
        found = logits_of(model, tokens)
    torch.testing.assert_close(
        found, logits_of(with_weights_added(model, {expert: 1.0}), tokens), **CLOSE
    )
    assert torch.equal(model.get_input_embeddings().weight, kept)


def test_the_experts_of_a_sparse_base_are_one_parameter_and_refused_by_name():
    model = built("mixtral")
    path = "base_model.model.model.layers.0.mlp.experts"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [],
              "target_parameters": ["mlp.experts.gate_up_proj"]}  # fmt: skip
    weights = {f"{path}.lora_A.weight": torch.randn(8, 32),
               f"{path}.lora_B.weight": torch.randn(96, 8)}  # fmt: skip
    expert = Expert(ExpertInfo("fused", expert_config=config), weights)
    with pytest.raises(UnsupportedAdapterError, match="'fused' has target_parameters"):
        RoutedModel.from_experts([expert], base_model=model)


def test_an_adapter_of_a_sparse_layer_s_experts_one_by_one_says_what_to_do():
    model = built("mixtral")
    path = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["w1"]}
    weights = {f"{path}.lora_A.weight": torch.randn(2, 32),
               f"{path}.lora_B.weight": torch.randn(48, 2)}  # fmt: skip
    expert = Expert(ExpertInfo("older", expert_config=config), weights)
    with pytest.raises(IncompatibleExpertError, match="one parameter, which is not routed") as one:
        RoutedModel.from_experts([expert], base_model=model)
    assert "\n" not in str(one.value)


# Encoder and decoder


def built_t5(initializer_factor: float):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
        initializer_factor=initializer_factor,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def t5():
    return built_t5(3.0)  # less, and it says one token for ever


T5_TARGETS = ("SelfAttention.q", "EncDecAttention.v", "EncDecAttention.q", "DenseReluDense.wo")


@pytest.fixture(scope="module")
def t5_experts(t5) -> list[Expert]:
    return [expert_for(t5, name, T5_TARGETS) for name in ("anna", "bert", "cleo")]


def test_an_encoder_decoder_is_routed(t5_experts, tokens):
    model = built_t5(1.0)
    expected = with_weights_added(model, dict.fromkeys(t5_experts, 1 / 3))
    before = logits_of(model, tokens, decoder_input_ids=tokens[:, :4])
    with RoutedModel.from_experts(t5_experts, "uniform", base_model=model) as routed:
        found = logits_of(routed, tokens, decoder_input_ids=tokens[:, :4])
    wanted = logits_of(expected, tokens, decoder_input_ids=tokens[:, :4])
    torch.testing.assert_close(found, wanted, **CLOSE)
    assert (found - before).abs().max() > 1e-2


MODES = [{}, {"num_beams": 4, "num_return_sequences": 2}]


@pytest.mark.parametrize("mode", MODES, ids=["greedy", "beam"])
@pytest.mark.parametrize("router", ["arrow", "oracle", ByPrompt()], ids=["arrow", "oracle", "own"])
@pytest.mark.parametrize("granularity", ["layer", "block", "model"])
def test_a_decision_by_the_encoder_s_prompt_serves_the_decoder(
    t5, t5_experts, tokens, router, mode, granularity
):
    rows = [tokens[0], tokens[1, :5], tokens[2, :7]]
    names = ["bert", "anna", None]
    ids, mask = torch.zeros(2, 3, 9, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    with RoutedModel.from_experts(
        t5_experts, router, top_k=2, granularity=granularity, base_model=t5
    ) as routed:
        inputs = {"input_ids": ids, "attention_mask": mask, "task_names": names}
        cached = routed.generate(**inputs, **LENGTH | mode)
        assert torch.equal(cached, routed.generate(**inputs, **LENGTH | mode, use_cache=False))
        n = len(cached) // 3
        for index, row in enumerate(rows):
            alone = routed.generate(row[None], **LENGTH | mode, task_names=[names[index]])
            assert torch.equal(cached[index * n : (index + 1) * n], alone)
    base = t5.generate(input_ids=ids, attention_mask=mask, **LENGTH | mode)
    assert not torch.equal(cached, base)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_is_embedded_by_what_the_encoder_s_last_block_makes_of_it(t5, tokens, side):
    rows = [tokens[0], tokens[1, :5], tokens[2, :7]]
    ids, mask = torch.zeros(2, 3, 11, dtype=torch.long)
    expected = []
    for index, row in enumerate(rows):
        span = slice(0, len(row)) if side == "right" else slice(11 - len(row), 11)
        ids[index, span], mask[index, span] = row, 1
        seen = []
        hook = t5.encoder.block[-1].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(output[0])
        )
        t5.encoder(row[None])
        hook.remove()
        expected.append(seen[0][0].double().mean(0).float())
    found = BaseEmbedding(t5).of_examples([{"input_ids": ids, "attention_mask": mask}])
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("router", ["predictor", "lorauter", "retrieval", "logo"])
def test_an_encoder_s_prompt_is_routed_to_the_expert_whose_examples_it_is_like(
    t5, t5_experts, tokens, router
):
    examples = {
        expert.name: [{"input_ids": tokens[row : row + 1]}] for row, expert in enumerate(t5_experts)
    }
    made = {
        "predictor": lambda: Predictor.fit(t5_experts, examples, features="hidden", base_model=t5),
        "lorauter": lambda: Lorauter.fit(
            t5_experts, examples, pairs={name: [name] for name in examples}, base_model=t5, top_k=1
        ),
        "retrieval": lambda: Retrieval.fit(t5_experts, examples, base_model=t5, top_k=1),
        "logo": lambda: Logo(t5_experts, top_k=1),
    }[router]()
    with RoutedModel.from_experts(t5_experts, made, base_model=t5) as routed:
        with routed.trace() as trace:
            found = routed.generate(tokens, **LENGTH)
        assert torch.equal(found, routed.generate(tokens, **LENGTH, use_cache=False))
    of_row = dict(zip(trace.table()["row"], trace.table()["expert"], strict=True))
    if router != "logo":
        assert of_row == dict(enumerate(examples))
    for row, name in of_row.items():
        expert = next(each for each in t5_experts if each.name == name)
        with apply_expert(t5, expert) as alone:
            assert torch.equal(found[row], alone.generate(tokens[row : row + 1], **LENGTH)[0])


def test_a_decoder_goes_on_from_what_the_encoder_s_states_carry(t5, t5_experts, tokens):
    with RoutedModel.from_experts(t5_experts, ByPrompt(), base_model=t5) as routed:
        expected = logits_of(routed, tokens, decoder_input_ids=tokens[:, :4])
        with torch.no_grad():
            states = t5.get_encoder()(tokens)
            found = routed(encoder_outputs=states, decoder_input_ids=tokens[:, :4]).logits
        torch.testing.assert_close(found, expected)
        assert torch.equal(t5.generate(tokens, **LENGTH), routed.generate(tokens, **LENGTH))
        states.last_hidden_state = states.last_hidden_state.clone()
        with pytest.raises(ValueError, match="encoder_outputs alone"):
            routed(encoder_outputs=states, decoder_input_ids=tokens[:, :4])


# Quantised


def torchao_config(bits: int):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if bits == 8:
        return quantization.Int8WeightOnlyConfig()
    return quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4, granularity=quantization.PerGroup(16)
    )


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="torchao is not installed")
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_base_is_routed(base, mixed_experts, tokens, bits):
    from torchao.quantization import quantize_

    quantised = copy.deepcopy(base)
    quantize_(quantised, torchao_config(bits))
    plain = copy.deepcopy(base)
    for path, module in quantised.named_modules():
        if isinstance(module, torch.nn.Linear):
            plain.get_submodule(path).weight.copy_(module.weight.dequantize())
    before = logits_of(quantised, tokens)
    assert not torch.allclose(before, logits_of(base, tokens), atol=1e-4)
    for router in ("uniform", "arrow"):
        found = []
        for model in (quantised, plain):
            with RoutedModel.from_experts(mixed_experts, router, base_model=model) as routed:
                found.append(logits_of(routed, tokens))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits_of(quantised, tokens), before)


def test_a_module_of_two_paths_is_one_layer_or_refused(base, make_expert, tokens):
    """A block that stands twice in the model."""
    twice = copy.deepcopy(base)
    twice.model.layers[1] = twice.model.layers[0]
    one, two, both = (make_expert("e", layers=layers) for layers in ((0,), (1,), (0, 1)))
    with RoutedModel.from_experts([one], "uniform", base_model=twice) as routed:
        expected = routed(tokens, use_cache=False).logits
        assert not torch.equal(expected, base(tokens, use_cache=False).logits)
        other = replace(two, expert_info=replace(two.expert_info, expert_name="f"))
        with pytest.raises(IncompatibleExpertError, match=r"layers.0.*layers.1.*are one module"):
            routed.add_expert(other)
        torch.testing.assert_close(routed(tokens, use_cache=False).logits, expected)
    weights = {n.replace("layers.0", "layers.1"): w for n, w in one.expert_weights.items()}
    same = Expert(two.expert_info, weights)
    with RoutedModel.from_experts([same], "uniform", base_model=twice) as routed:
        torch.testing.assert_close(routed(tokens, use_cache=False).logits, expected)
    with pytest.raises(IncompatibleExpertError, match=r"layers.0.*layers.1.*are one module"):
        RoutedModel.from_experts([both], "uniform", base_model=twice)
