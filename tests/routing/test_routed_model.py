import copy
import itertools
import threading

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from mttl_adapters import kernels
from mttl_experts import (
    Expert,
    ExpertInfo,
    ExpertLibrary,
    lora_modules,
)
from mttl_routing import RoutedModel, apply_expert, merge

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture
def library(mixed_experts, tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/library", create=True)
    for expert in mixed_experts:
        library.add_expert(expert)
    return library


def peft_logits(base, expert: Expert, folder, tokens: Tensor) -> Tensor:
    for name, content in expert.files().items():
        (folder / name).write_bytes(content)
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    with torch.no_grad():
        return model(tokens).logits


@torch.no_grad()
def logits_of(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


def padded(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


# Equal to something else that is known to be right


def test_oracle_equals_each_row_under_peft_with_its_own_expert(
    base, mixed_experts, tokens, tmp_path
):
    names = [expert.name for expert in mixed_experts[:3]]
    with RoutedModel.from_experts(mixed_experts, "oracle", base_model=base) as routed:
        found = logits_of(routed, tokens, task_names=names)
    for row, expert in enumerate(mixed_experts[:3]):
        expected = peft_logits(base, expert, tmp_path, tokens[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected, **CLOSE)


@pytest.mark.parametrize("index", range(4))
def test_one_expert_equals_peft(base, mixed_experts, tokens, tmp_path, index):
    expert = mixed_experts[index]
    with apply_expert(base, expert) as routed:
        found, inner = logits_of(routed, tokens), logits_of(base, tokens)
    torch.testing.assert_close(found, peft_logits(base, expert, tmp_path, tokens), **CLOSE)
    torch.testing.assert_close(inner, found, rtol=0, atol=0)
    assert not torch.allclose(found, logits_of(base, tokens), atol=1e-2)


@pytest.mark.parametrize("method", ["uniform", "ties"])
def test_a_merged_expert_equals_peft(base, mixed_experts, tokens, tmp_path, method):
    merged = merge(mixed_experts, method)
    with apply_expert(base, merged):
        found = logits_of(base, tokens)
    torch.testing.assert_close(found, peft_logits(base, merged, tmp_path, tokens), **CLOSE)


def test_uniform_routing_equals_the_uniform_merge(base, mixed_experts, tokens):
    with RoutedModel.from_experts(mixed_experts, "uniform", base_model=base) as routed:
        found = logits_of(routed, tokens)
    with apply_expert(base, merge(mixed_experts)) as merged:
        torch.testing.assert_close(found, logits_of(merged, tokens), **CLOSE)


def slow_arrow_hook(layers, experts: list[Expert], top_k: int, temperature: float):
    """Arrow as the paper says it, one token and one expert at a time, ΔW formed, by a full SVD."""

    def hook(path):
        here = [(e, layers[e.name].get(path)) for e in experts]
        deltas = [f.scaling * f.b.double() @ f.a.double() for _, f in here if f is not None]
        prototypes = [torch.linalg.svd(delta).Vh[0] for delta in deltas]

        def add(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            output = output.clone()
            for place in itertools.product(*map(range, args[0].shape[:-1])):
                x = args[0][place]
                scores = [abs(float(x @ v)) / temperature for v in prototypes]
                kept = sorted(range(len(scores)), key=lambda e: -scores[e])[:top_k]
                weights = torch.tensor([scores[e] for e in kept]).double().softmax(0)
                for weight, chosen in zip(weights, kept, strict=True):
                    output[place] += weight * (deltas[chosen] @ x)
            return output

        return add

    return hook


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.7), (4, 1.0)])
def test_arrow_equals_a_slow_loop_over_tokens_and_experts(
    base, mixed_experts, tokens, top_k, temperature
):
    exact = copy.deepcopy(base).double()
    layers = {e.name: lora_modules(e) for e in mixed_experts}
    hook = slow_arrow_hook(layers, mixed_experts, top_k, temperature)
    paths = sorted(set().union(*layers.values()))
    handles = [exact.get_submodule(p).register_forward_hook(hook(p)) for p in paths]
    expected = logits_of(exact, tokens)
    for handle in handles:
        handle.remove()
    options = {"top_k": top_k, "temperature": temperature}
    with RoutedModel.from_experts(mixed_experts, "arrow", base_model=exact, **options) as routed:
        torch.testing.assert_close(logits_of(routed, tokens), expected, rtol=1e-5, atol=1e-5)
    with RoutedModel.from_experts(mixed_experts, "arrow", base_model=base, **options) as routed:
        found = logits_of(routed, tokens)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_arrow_on_triton_equals_plain_torch(base, mixed_experts):
    if reason := kernels.no_triton(base.device):
        pytest.skip(f"no Triton: {reason}")
    ids = torch.tensor([[3, 9, 4]])
    with RoutedModel.from_experts(mixed_experts, "arrow", 2, base_model=base) as routed:
        with kernels.using("torch"):
            expected = logits_of(routed, ids)
        with kernels.using("triton"):
            found = logits_of(routed, ids)
    torch.testing.assert_close(found, expected, **CLOSE)


def test_before_equals_its_dense_formula_and_is_another_function_than_after(
    base, make_expert, tokens
):
    experts = [make_expert(name, targets=("q_proj",)) for name in ("e1", "e2", "e3")]
    expected = copy.deepcopy(base)
    for path in lora_modules(experts[0]):
        factors = [lora_modules(e)[path] for e in experts]
        mean_a = sum(f.a for f in factors) / 3
        mean_b = sum(f.scaling * f.b for f in factors) / 3
        expected.get_submodule(path).weight += mean_b @ mean_a
    found = {}
    for combine in ("before", "after"):
        with RoutedModel.from_experts(
            experts, "uniform", combine=combine, base_model=base
        ) as routed:
            found[combine] = logits_of(routed, tokens)
    torch.testing.assert_close(found["before"], logits_of(expected, tokens), **CLOSE)
    assert (found["before"] - found["after"]).abs().max() > 1e-2


# Independent of what must not matter


ROUTED = [("arrow", {"top_k": 2}), ("uniform", {}), ("oracle", {})]


@pytest.mark.parametrize(("router", "options"), ROUTED)
def test_the_order_of_the_experts_makes_no_difference(base, mixed_experts, tokens, router, options):
    found = []
    for order in (mixed_experts, mixed_experts[::-1]):
        with RoutedModel.from_experts(order, router, base_model=base, **options) as routed:
            found.append(logits_of(routed, tokens, task_names=["anna", "bert", None]))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize(("router", "options"), ROUTED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_the_rest_of_the_batch_make_no_difference(
    base, mixed_experts, tokens, router, options, side
):
    rows = [tokens[0], tokens[1, :4], tokens[2, :7]]
    names = ["bert", "anna", "cleo"]
    with RoutedModel.from_experts(mixed_experts, router, base_model=base, **options) as routed:
        together = padded(rows, side)
        positions = (together["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            found = routed(**together, position_ids=positions, task_names=names).logits
        for index, row in enumerate(rows):
            alone = logits_of(routed, row[None], task_names=[names[index]])[0]
            kept = together["attention_mask"][index].bool()
            torch.testing.assert_close(found[index][kept], alone, **CLOSE)


# generate


@pytest.mark.parametrize(("router", "options"), ROUTED)
def test_generate_with_a_cache_equals_without_and_a_batch_equals_its_rows(
    base, mixed_experts, tokens, router, options
):
    rows = [tokens[0], tokens[1, :4], tokens[2, :7]]
    names = ["bert", "anna", "cleo"]
    length = {"max_new_tokens": 8, "do_sample": False}
    with RoutedModel.from_experts(mixed_experts, router, base_model=base, **options) as routed:
        together = padded(rows, "left")
        cached = routed.generate(**together, **length, task_names=names)
        plain = routed.generate(**together, **length, task_names=names, use_cache=False)
        assert torch.equal(cached, plain)
        for index, row in enumerate(rows):
            alone = routed.generate(row[None], **length, task_names=names[index])
            assert torch.equal(cached[index, -8:], alone[0, -8:])
    assert not torch.equal(cached, base.generate(**together, **length))


@pytest.mark.parametrize(
    "expansion", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}]
)
def test_a_row_keeps_its_task_through_beams(base, mixed_experts, tokens, expansion):
    names = ["bert", "anna", "cleo"]
    length = {"max_new_tokens": 6, "do_sample": False}
    with RoutedModel.from_experts(mixed_experts, "oracle", base_model=base) as routed:
        with routed.tasks(names):
            together = routed.generate(tokens, **length, **expansion)
        apart = [
            routed.generate(tokens[row : row + 1], **length, **expansion, task_names=[names[row]])
            for row in range(3)
        ]
    assert torch.equal(together, torch.cat(apart))


def test_sampled_sequences_keep_their_row_s_task(base, mixed_experts, tokens):
    with RoutedModel.from_experts(mixed_experts, "oracle", base_model=base) as routed:
        found = routed.generate(
            tokens, task_names=["bert", "anna", None], max_new_tokens=3, do_sample=True, top_k=1,
            num_return_sequences=2,
        )  # fmt: skip
        greedy = routed.generate(
            tokens, task_names=["bert", "anna", None], max_new_tokens=3, do_sample=False
        )
    assert torch.equal(found, greedy.repeat_interleave(2, dim=0))


def test_tasks_are_of_the_thread_that_names_them(base, mixed_experts, tokens):
    found: dict[str, Tensor] = {}
    started = threading.Barrier(2)
    with RoutedModel.from_experts(mixed_experts, "oracle", base_model=base) as routed:

        def run(task: str) -> None:
            with routed.tasks(task):
                started.wait()
                found[task] = logits_of(routed, tokens)

        threads = [threading.Thread(target=run, args=(task,)) for task in ("anna", "bert")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for task in ("anna", "bert"):
            expected = logits_of(routed, tokens, task_names=task)
            torch.testing.assert_close(found[task], expected, rtol=0, atol=0)
        with pytest.raises(ValueError, match="needs the task of each row"):
            routed(tokens)


def test_tasks_named_inside_others_end_with_their_block(base, mixed_experts, tokens):
    with RoutedModel.from_experts(mixed_experts, "oracle", base_model=base) as routed:
        with routed.tasks("anna"):
            outer = logits_of(routed, tokens)
            with routed.tasks("bert"):
                inner = logits_of(routed, tokens)
            assert torch.equal(outer, logits_of(routed, tokens))
        assert torch.equal(inner, logits_of(routed, tokens, task_names="bert"))


@pytest.mark.parametrize("names", [["anna"], ["anna"] * 4, []])
def test_tasks_for_another_number_of_rows_are_an_error(base, mixed_experts, tokens, names):
    message = f"for {len(names)} rows, the batch has 3"
    with (
        RoutedModel.from_experts(mixed_experts, "oracle", base_model=base) as routed,
        pytest.raises(ValueError, match=message),
    ):
        routed(tokens, task_names=names)


# Around the base


def test_the_base_is_restored_bit_for_bit(base, mixed_experts, tokens):
    before = {name: value.clone() for name, value in base.state_dict().items()}
    expected = logits_of(base, tokens)
    routed = RoutedModel.from_experts(mixed_experts, base_model=base)
    assert not torch.equal(logits_of(base, tokens), expected)
    routed.remove()
    routed.remove()
    assert torch.equal(logits_of(base, tokens), expected)
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    assert not any(module._forward_hooks for module in base.modules())


def test_a_copy_of_the_base_is_the_base_alone(base, mixed_experts, tokens, tmp_path):
    expected = logits_of(base, tokens)
    with RoutedModel.from_experts(mixed_experts, base_model=base):
        copied = copy.deepcopy(base)
        torch.save(base, tmp_path / "model.pt")
    assert torch.equal(logits_of(copied, tokens), expected)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(loaded, tokens), expected)
    with apply_expert(copied, mixed_experts[0]):
        assert not torch.equal(logits_of(copied, tokens), expected)


def test_the_base_is_restored_when_the_block_raises(base, mixed_experts, tokens):
    expected = logits_of(base, tokens)
    with pytest.raises(KeyError), apply_expert(base, mixed_experts[0]):
        raise KeyError
    assert torch.equal(logits_of(base, tokens), expected)


def test_a_refused_expert_leaves_the_base_alone(base, make_expert, tokens):
    for experts in (
        [make_expert("e1"), make_expert("e1", seed=7)],
        [make_expert("e1", bias="all")],
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            RoutedModel.from_experts(experts, base_model=base)
    assert not any(module._forward_hooks for module in base.modules())
    with apply_expert(base, make_expert("e1")):
        pass


def test_a_base_carries_one_routed_model_at_a_time(base, mixed_experts):
    message = r"carries a routed model already.*remove\(\)"
    with apply_expert(base, mixed_experts[0]), pytest.raises(ValueError, match=message):
        RoutedModel.from_experts(mixed_experts, base_model=base)
    RoutedModel.from_experts(mixed_experts, base_model=base).remove()


def test_it_is_used_like_the_base(base, mixed_experts):
    with RoutedModel.from_experts(mixed_experts, base_model=base) as routed:
        assert routed.config is base.config
        assert routed.device == base.device
        assert routed.get_input_embeddings() is base.get_input_embeddings()
        assert routed.train().training
        assert routed.eval() is routed
        assert routed.to("cpu") is routed
        assert "4 experts" in repr(routed)
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = routed.no_such_thing
        with pytest.raises(AttributeError, match=r"push_to_hub.*leave the experts out"):
            routed.push_to_hub("nowhere")


def test_gradients_reach_the_input_through_the_experts(base, mixed_experts, tokens):
    embedded = base.get_input_embeddings()(tokens).detach().requires_grad_()
    grads = []
    with RoutedModel.from_experts(mixed_experts, base_model=base) as routed:
        for model in (routed, None):
            if model is None:
                routed.remove()
                model = base
            model(inputs_embeds=embedded).logits.sum().backward()
            grads.append(embedded.grad.clone())
            embedded.grad = None
    assert not torch.allclose(*grads, atol=1e-2)


def test_a_bfloat16_base_meets_float32_experts_and_stays_bfloat16(base, mixed_experts, tokens):
    half = copy.deepcopy(base).bfloat16()
    with RoutedModel.from_experts(mixed_experts, "uniform", base_model=base) as routed:
        exact = logits_of(routed, tokens)
    for dtype in (None, torch.bfloat16):
        with RoutedModel.from_experts(
            mixed_experts, "uniform", base_model=half, dtype=dtype
        ) as routed:
            found = logits_of(routed, tokens)
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).norm() < 0.1 * exact.norm()


def test_a_base_with_conv1d_layers_equals_peft(make_expert, tmp_path, tokens):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    gpt2 = GPT2LMHeadModel(config).eval().requires_grad_(False)
    shapes = {"attn.c_attn": (96, 32), "mlp.c_proj": (32, 128)}
    weights = {}
    for layer, (name, (o, i)) in itertools.product(range(2), shapes.items()):
        path = f"base_model.model.transformer.h.{layer}.{name}"
        weights[f"{path}.lora_A.weight"] = torch.randn(3, i)
        weights[f"{path}.lora_B.weight"] = torch.randn(o, 3)
    adapter = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 2,
        "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True,
    }  # fmt: skip
    expert = Expert(ExpertInfo("conv", expert_config=adapter), weights)
    for candidate in (expert, merge([expert]), merge([expert], "ties", density=0.5)):
        with apply_expert(gpt2, candidate):
            found = logits_of(gpt2, tokens)
        expected = peft_logits(gpt2, candidate, tmp_path, tokens)
        torch.testing.assert_close(found, expected, **CLOSE)


def test_a_quantised_layer_is_routed_by_its_input_and_output_alone(base, mixed_experts, tokens):
    class Rounded(nn.Module):
        """A linear layer that keeps int8 and has no ``weight`` to add to."""

        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            self.scale = float(linear.weight.abs().max()) / 127
            self.kept = (linear.weight / self.scale).round().to(torch.int8)

        def forward(self, input: Tensor) -> Tensor:
            return input @ (self.kept.to(input.dtype) * self.scale).T

    rounded, reference = copy.deepcopy(base), copy.deepcopy(base)
    for path in ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]:
        parent, _, name = path.rpartition(".")
        layer = Rounded(base.get_submodule(path))
        setattr(rounded.get_submodule(parent), name, layer)
        reference.get_submodule(path).weight.copy_(layer.kept * layer.scale)
    found = []
    for model in (rounded, reference):
        with RoutedModel.from_experts(mixed_experts, base_model=model) as routed:
            found.append(logits_of(routed, tokens))
    torch.testing.assert_close(*found, **CLOSE)


# From a library


def must_not_run(expert: Expert) -> dict[str, Tensor]:
    raise AssertionError(f"the prototypes of {expert.name} were computed again")


def test_from_library_equals_from_experts_and_keeps_its_prototypes(
    base, library, mixed_experts, tokens, monkeypatch
):
    with RoutedModel.from_experts(mixed_experts, top_k=2, base_model=base) as routed:
        expected = logits_of(routed, tokens)
    with RoutedModel.from_library(library, top_k=2, base_model=base) as routed:
        assert routed.experts == tuple(sorted(library))
        torch.testing.assert_close(logits_of(routed, tokens), expected, rtol=0, atol=0)
    monkeypatch.setattr("mttl_routing.routers.arrow.arrow_prototypes", must_not_run)
    with RoutedModel.from_library(library, top_k=2, base_model=base) as routed:
        torch.testing.assert_close(logits_of(routed, tokens), expected, rtol=0, atol=0)


def test_a_replaced_expert_is_not_routed_by_its_predecessor_s_prototype(
    base, library, make_expert, tokens
):
    with RoutedModel.from_library(library, base_model=base):
        pass
    library.replace_expert(make_expert("anna", seed=99))
    with RoutedModel.from_library(library, top_k=1, base_model=base) as routed:
        found = logits_of(routed, tokens)
    with RoutedModel.from_experts(library, top_k=1, base_model=base) as routed:
        torch.testing.assert_close(found, logits_of(routed, tokens), rtol=0, atol=0)


def test_prototypes_of_a_library_that_is_only_read_are_computed_and_not_kept(base, library, tokens):
    reader = ExpertLibrary(library.uri, read_only=True)
    generation = reader.generation
    with RoutedModel.from_library(reader, base_model=base) as routed:
        logits_of(routed, tokens)
    assert ExpertLibrary(library.uri).generation == generation


def test_merge_takes_a_library(library, mixed_experts):
    assert merge(library).digest == merge(mixed_experts).digest
