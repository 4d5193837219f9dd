"""What a router decided for a row stays with the row, whatever generation does to the batch."""

import copy
import threading

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from mttl_routing import Prompt, RoutedModel

NAMES = ("bert", "anna", "cleo")
SHORT = {"max_new_tokens": 6, "do_sample": False}


@torch.no_grad()
def logits_of(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :], mask[index, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def base(base):
    """A copy, as transformers leaves hooks of its own on a model that was assisted."""
    return copy.deepcopy(base)


class ByPrompt:
    """The expert whose number the sum of the prompt's ids gives; keeps the prompts it was asked."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    def decide(self, prompt: Prompt) -> Tensor:
        self.prompts.append(prompt)
        sums = (prompt.input_ids * prompt.attention_mask).sum(dim=1)
        return torch.nn.functional.one_hot(sums % len(prompt.experts), len(prompt.experts)).float()


class AmongTwo(ByPrompt):
    """Two experts by the prompt, and each token's own share of them."""

    def decide(self, prompt: Prompt) -> Tensor:
        one = super().decide(prompt)
        return one + one.roll(1, dims=1)

    def gates(self, x, layer, rows):
        share = torch.sigmoid(x.float().sum(dim=1, keepdim=True))
        first = torch.arange(len(layer.experts)) % 2 == 0
        return rows.spread(rows.decision) * torch.where(first, share, 1 - share)


ROUTERS = [ByPrompt, AmongTwo]


@pytest.fixture
def rows(tokens) -> list[Tensor]:
    rows = [tokens[0], tokens[1, :4], tokens[2, :7]]
    assert len({int(row.sum()) % 4 for row in rows}) > 1  # or no test here could fail
    return rows


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(
    "mode",
    [
        {},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
    ],
    ids=["greedy", "beam", "beams", "sampled", "static", "chunked"],
)
def test_every_mode_equals_the_same_without_a_cache_and_row_by_row(
    base, mixed_experts, rows, router, mode
):
    together = left_padded(rows)
    plain = {
        k: v for k, v in mode.items() if k not in ("cache_implementation", "prefill_chunk_size")
    }
    with RoutedModel.from_experts(mixed_experts, router(), base_model=base) as routed:
        cached = routed.generate(**together, **SHORT | mode)
        assert torch.equal(cached, routed.generate(**together, **SHORT | plain, use_cache=False))
        for index, row in enumerate(rows):
            alone = routed.generate(row[None], **SHORT | plain)
            n = alone.shape[0]
            assert torch.equal(cached[index * n : (index + 1) * n, -6:], alone[:, -6:])
    assert not torch.equal(cached, base.generate(**together, **SHORT | plain))


def test_a_prompt_is_decided_once_and_not_again_for_its_beams(base, mixed_experts, rows):
    router = ByPrompt()
    together = left_padded(rows)
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
        for use_cache in (True, False):
            routed.generate(**together, **SHORT, num_beams=4, use_cache=use_cache)
    assert len(router.prompts) == 2
    for prompt in router.prompts:
        assert torch.equal(prompt.input_ids, together["input_ids"])
        assert torch.equal(prompt.attention_mask, together["attention_mask"])


@pytest.mark.parametrize("router", ROUTERS)
def test_assisted_generation_equals_greedy(base, mixed_experts, rows, router):
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight += 0.05 * torch.randn(other.lm_head.weight.shape)
    with RoutedModel.from_experts(mixed_experts, router(), base_model=base) as routed:
        for row in rows:
            greedy = routed.generate(row[None], **SHORT)
            for assistant in (copy.deepcopy(other), routed.model, routed):
                found = routed.generate(row[None], **SHORT, assistant_model=assistant)
                assert torch.equal(found, greedy)


def test_a_row_s_task_survives_assisted_generation(base, mixed_experts, tokens):
    with RoutedModel.from_experts(mixed_experts, "oracle", base_model=base) as routed:
        for name in NAMES:
            greedy = routed.generate(tokens[:1], **SHORT, task_names=[name])
            found = routed.generate(
                tokens[:1], **SHORT, task_names=[name], assistant_model=copy.deepcopy(base)
            )
            assert torch.equal(found, greedy)


@pytest.mark.parametrize("router", ROUTERS)
def test_two_threads_at_once_do_not_see_each_other_s_rows(base, mixed_experts, rows, router):
    found: dict[int, Tensor] = {}
    with RoutedModel.from_experts(mixed_experts, router(), base_model=base) as routed:
        expected = [routed.generate(row[None], **SHORT) for row in rows]
        started = threading.Barrier(len(rows))

        def run(index: int) -> None:
            started.wait()
            found[index] = routed.generate(rows[index][None], **SHORT)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(rows))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, tokens in enumerate(expected):
        assert torch.equal(found[index], tokens)


# A loop of one's own over forward


def step(routed, ids: Tensor, kept) -> Tensor:
    with torch.no_grad():
        return routed(ids, past_key_values=kept, use_cache=True).logits[:, -1]


def static(base) -> StaticCache:
    return StaticCache(config=base.config, max_cache_len=16)


def dynamic(base) -> DynamicCache:
    return DynamicCache(config=base.config)


@pytest.mark.parametrize("make", [dynamic, static, lambda base: DynamicCache()])
@pytest.mark.parametrize("router", [ByPrompt, AmongTwo, "oracle"])
def test_a_cache_carries_its_rows_through_every_change(base, mixed_experts, tokens, router, make):
    router = router if isinstance(router, str) else router()
    prompt, new = tokens[:, :6], tokens[:, 6:7]
    named = {"task_names": NAMES} if router == "oracle" else {}
    order = torch.tensor([2, 0, 1])
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:

        def kept():
            cache = make(base)
            with torch.no_grad():
                routed(prompt, past_key_values=cache, use_cache=True, **named)
            return cache

        expected = step(routed, new, kept())
        changed = kept()
        changed.reorder_cache(order)
        torch.testing.assert_close(step(routed, new[order], changed), expected[order])
        if make is static:
            return
        changed = kept()
        changed.batch_repeat_interleave(2)
        found = step(routed, new.repeat_interleave(2, dim=0), changed)
        torch.testing.assert_close(found, expected.repeat_interleave(2, dim=0))
        changed.batch_select_indices(torch.tensor([5, 1]))
        with torch.no_grad():
            changed.crop(-1)
        torch.testing.assert_close(step(routed, new[[2, 0]], changed), expected[[2, 0]])
        torch.testing.assert_close(step(routed, new, copy.deepcopy(kept())), expected)


def test_a_cache_that_was_emptied_is_another_prompt_s(base, mixed_experts, rows):
    router = ByPrompt()
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
        for empty in (lambda cache: cache.reset(), lambda cache: cache.crop(-4)):
            cache = DynamicCache()
            step(routed, rows[0][None, :4], cache)
            empty(cache)
            found = step(routed, rows[2][None], cache)
            torch.testing.assert_close(found, step(routed, rows[2][None], None))


def test_a_cache_is_still_of_its_class(base, mixed_experts, tokens):
    with RoutedModel.from_experts(mixed_experts, ByPrompt(), base_model=base) as routed:
        cache = routed(tokens).past_key_values
    assert isinstance(cache, DynamicCache)
    assert type(cache).__name__ == "DynamicCache"


def test_a_generation_goes_on_from_a_cache_with_what_was_decided_before(base, mixed_experts, rows):
    router, row = ByPrompt(), rows[0][None]
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
        whole = routed.generate(row, **SHORT | {"max_new_tokens": 9})
        first = routed.generate(row, **SHORT | {"max_new_tokens": 5}, return_dict_in_generate=True)
        rest = routed.generate(
            first.sequences, past_key_values=first.past_key_values, **SHORT | {"max_new_tokens": 4}
        )
    assert torch.equal(rest, whole)
    assert len(router.prompts) == 2


def test_a_forward_without_a_cache_decides_by_what_it_is_given(base, mixed_experts, rows):
    router = ByPrompt()
    with RoutedModel.from_experts(mixed_experts, router, base_model=base) as routed:
        for row in rows:
            logits_of(routed, row[None], use_cache=False)
    assert [prompt.input_ids.tolist() for prompt in router.prompts] == [[r.tolist()] for r in rows]


# What a prompt tells


def test_a_prompt_has_its_texts_and_what_the_base_makes_of_it(base, mixed_experts, rows):
    class Tokenizer:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    paths = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    seen = []

    class Looks(ByPrompt):
        def decide(self, prompt):
            seen.append((prompt.texts(), prompt.activations(paths), prompt.activations(paths[:1])))
            return super().decide(prompt)

    expected = {}
    handles = [
        base.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: expected.setdefault(path, args[0])
        )
        for path in paths
    ]
    logits_of(base, rows[1][None])
    for handle in handles:
        handle.remove()
    with (
        RoutedModel.from_experts(
            mixed_experts, Looks(), base_model=base, tokenizer=Tokenizer()
        ) as routed,
        torch.no_grad(),
    ):
        routed(**left_padded(rows))
    texts, found, again = seen[0]
    assert texts == [" ".join(map(str, row.tolist())) for row in rows]
    for path in paths:
        torch.testing.assert_close(found[path][1, -4:], expected[path][0], rtol=1e-4, atol=1e-4)
    assert again[paths[0]] is found[paths[0]]


def test_a_router_of_texts_without_a_tokenizer_is_told_so(base, mixed_experts, tokens):
    class Reads(ByPrompt):
        def decide(self, prompt):
            return prompt.texts()

    with (
        RoutedModel.from_experts(mixed_experts, Reads(), base_model=base) as routed,
        pytest.raises(ValueError, match="needs a tokenizer"),
    ):
        routed(tokens)


# Refusals


def test_what_cannot_be_decided_by_gets_one_clear_line(base, mixed_experts, tokens):
    class Wide(ByPrompt):
        def decide(self, prompt):
            return super().decide(prompt)[:, :2]

    embedded = base.get_input_embeddings()(tokens)
    with RoutedModel.from_experts(mixed_experts, ByPrompt(), base_model=base) as routed:
        with pytest.raises(ValueError, match="gives embeddings alone; give input_ids"):
            routed(inputs_embeds=embedded)
        with pytest.raises(ValueError, match="a call of the whole model"):
            base.model.layers[0].self_attn.q_proj(embedded)
        cache = routed(tokens).past_key_values
        with pytest.raises(ValueError, match="chosen for 3 rows, the batch has 2"):
            routed(tokens[:2, :1], past_key_values=cache)
        logits_of(routed, tokens)  # and it goes on working
    with (
        RoutedModel.from_experts(mixed_experts, Wide(), base_model=base) as routed,
        pytest.raises(ValueError, match=r"gates \(3, 2\); this model wants \(3, 4\)"),
    ):
        routed(tokens)
