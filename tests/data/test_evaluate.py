from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from mttl_data.errors import EmptyTaskError
from mttl_data.evaluate import evaluate_task, generate_answers, greedy
from mttl_data.prompts import PromptWriter, Truncation
from mttl_data.rows import Row

STOPS = [0, 17, 40, 77, 99, 120, 150, 180, 200, 230]


def prompts(n: int, prefix: int, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(3, 259, (prefix,), generator=generator).tolist()
    lengths = torch.randint(1, 20, (n,), generator=generator).tolist()
    return [shared + torch.randint(3, 259, (k,), generator=generator).tolist() for k in lengths]


def one_by_one(model, asked: list[list[int]], n: int) -> list[list[int]]:
    """The plain way: transformers' own greedy generation, one prompt at a time."""
    answers = []
    for ids in asked:
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=STOPS,
            pad_token_id=0,
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


def ended(ids: list[int]) -> bool:
    return ids[-1] in STOPS


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batched_greedy_is_plain_greedy(model, share_prefix, batch_size):
    asked = prompts(17, prefix=12)
    answers = greedy(
        model, asked, 10, ended=ended, batch_size=batch_size, share_prefix=share_prefix
    )
    assert answers == one_by_one(model, asked, 10)
    assert len({len(answer) for answer in answers}) > 3  # some ended early, some did not


def test_equal_prompts_and_a_prompt_that_is_all_prefix(model):
    first = prompts(1, prefix=9)[0]
    asked = [first, first, first[:6], first[:7]]
    assert greedy(model, asked, 5, ended=ended) == one_by_one(model, asked, 5)


def test_a_shared_prefix_is_run_once(model):
    asked = prompts(6, prefix=40)
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, options: seen.append(options["input_ids"].numel()), with_kwargs=True
    )
    try:
        greedy(model, asked, 1, ended=ended)
    finally:
        hook.remove()
    longest = max(len(ids) for ids in asked) - 40
    assert seen == [40, 6 * longest]


def test_only_the_last_position_meets_the_head(model):
    rows = []
    hook = model.lm_head.register_forward_hook(
        lambda module, args, output: rows.append(output.shape[1])
    )
    try:
        greedy(model, prompts(4, prefix=5), 3, ended=ended)
    finally:
        hook.remove()
    assert set(rows) == {1}


def test_ended_rows_leave_the_batch(model):
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, options: sizes.append(len(options["input_ids"])), with_kwargs=True
    )
    try:
        greedy(model, prompts(16, prefix=0), 10, ended=ended, share_prefix=False)
    finally:
        hook.remove()
    assert sizes[0] == 16
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 16


def test_a_sliding_window_model_gives_plain_greedy():
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        sliding_window=8,
        eos_token_id=0,
        pad_token_id=0,
    )
    window = MistralForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in window.parameters():
            parameter.mul_(6)
    asked = prompts(7, prefix=10)
    assert greedy(window, asked, 6, ended=ended, batch_size=4) == one_by_one(window, asked, 6)


def test_a_model_with_learned_positions_gives_plain_greedy():
    torch.manual_seed(0)
    config = GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        vocab_size=259,
        attention_types=[[["global", "local"], 1]],
        window_size=64,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=0,
    )
    neo = GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in neo.parameters():
            parameter.mul_(6)
    asked = prompts(7, prefix=10)
    assert greedy(neo, asked, 6, ended=ended, batch_size=4) == one_by_one(neo, asked, 6)


def test_a_peft_model_gives_its_own_plain_greedy(tiny_llama):
    peft = pytest.importorskip("peft")

    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, r=4)
    adapted = peft.get_peft_model(tiny_llama(), config).eval()
    asked = prompts(5, prefix=8)
    assert greedy(adapted, asked, 5, ended=ended) == one_by_one(adapted, asked, 5)


def test_training_mode_comes_back(model):
    model.train()
    try:
        greedy(model, prompts(2, prefix=2), 2, ended=ended)
        assert model.training
    finally:
        model.eval()


def test_progress_counts_every_prompt(model):
    done = []
    asked = prompts(13, prefix=3)
    greedy(model, asked, 6, ended=ended, batch_size=4, progress=lambda *told: done.append(told))
    assert done == sorted(done)
    assert done[-1] == ("", 13, 13)
    assert len(done) > 1


@pytest.mark.parametrize(("asked", "n"), [([[]], 3), ([[5]], 0)])
def test_nothing_to_run_is_an_error(model, asked, n):
    with pytest.raises(ValueError, match="at least"):
        greedy(model, asked, n, ended=ended)


class Scripted:
    """Answers as told: after ``<prompt>`` comes the text that ``replies`` has for its last line."""

    def __init__(self, tokenizer, replies: dict[str, str]) -> None:
        self.tokenizer, self.replies = tokenizer, replies
        self.device = torch.device("cpu")

    def forward(self, input_ids, attention_mask, past_key_values=None, use_cache=True):
        raise NotImplementedError

    def __call__(self, input_ids, attention_mask, past_key_values=None, use_cache=True):
        cache = past_key_values if past_key_values is not None else DynamicCache()
        states = input_ids[:, None, :, None].float()
        keys, _ = cache.update(states, states, 0)
        logits = torch.zeros(len(input_ids), 1, 259)
        for row, (ids, mask) in enumerate(zip(keys[:, 0, :, 0], attention_mask, strict=True)):
            text = self.tokenizer.decode(ids[mask.bool()].long().tolist())
            question, _, so_far = text.rpartition("<|im_start|>assistant\n")
            for asked, reply in self.replies.items():
                if asked in question.rpartition("<|im_start|>user\n")[2]:
                    ids = self.tokenizer(reply).input_ids
                    logits[row, 0, ids[len(self.tokenizer(so_far).input_ids)]] = 1
        return type("Output", (), {"logits": logits, "past_key_values": cache})()


ROWS = [Row("one?", "1", "t"), Row("two?", "2", "t"), Row("three, at length?", "3", "t")]


def test_a_task_is_scored_on_what_was_answered(tokenizer):
    scripted = Scripted(
        tokenizer, {"one?": "1<|im_end|>", "two?": "7<|im_end|>", "three": "3.<|im_end|>"}
    )
    score = evaluate_task(scripted, tokenizer, ROWS, "exact_match", batch_size=2)
    assert score.answers == ("1", "7", "3.")
    assert score.scores == (1.0, 0.0, 1.0)
    assert score.n == 3
    assert score.mean == pytest.approx(2 / 3)
    assert score.ci95[0] < score.mean < score.ci95[1]
    assert score.truncation.rows == 0


def test_answers_can_end_at_a_line_break(tokenizer):
    scripted = Scripted(tokenizer, {"one?": "\n1\nBecause it is.<|im_end|>"})
    ids = [PromptWriter(tokenizer).prompt(ROWS[0]).input_ids]
    assert generate_answers(scripted, tokenizer, ids, 30) == ["1\nBecause it is."]
    assert generate_answers(scripted, tokenizer, ids, 30, stop_at_newline=True) == ["1"]


def test_the_longest_target_decides_how_long_an_answer_may_be(tokenizer):
    scripted = Scripted(tokenizer, {"one?": "a" * 100 + "<|im_end|>"})
    score = evaluate_task(scripted, tokenizer, [Row("one?", "a" * 20, "t")], "exact_match")
    assert 20 < len(score.answers[0]) < 30


def test_solved_examples_come_before_every_question(tokenizer):
    shots = [Row("zero?", "0", "t")]
    scripted = Scripted(tokenizer, {row.source[:4]: f"{row.target}<|im_end|>" for row in ROWS})
    assert evaluate_task(scripted, tokenizer, ROWS, "exact_match", shots).mean == 1


def test_a_prompt_longer_than_the_context_is_cut_and_counted(model, tokenizer):
    rows = [Row("w" * 700, "yes", "t"), Row("w", "yes", "t")]
    score = evaluate_task(model, tokenizer, rows, "exact_match")
    assert score.truncation.rows == 1
    assert score.truncation.source_tokens > 150


def test_prompts_and_answers_are_cut_as_they_were_in_training(tokenizer):
    scripted = Scripted(tokenizer, {"one?": "a" * 100 + "<|im_end|>"})
    rows = [Row("x" * 50 + "one?", "a" * 20, "t")]
    score = evaluate_task(
        scripted, tokenizer, rows, "exact_match", max_input_length=110, max_output_length=7
    )
    assert score.answers == ("a" * 7,)
    whole = len(PromptWriter(tokenizer).prompt(rows[0]).input_ids)
    assert score.truncation == Truncation(1, whole - 110, 20 + 1 - 7)


def test_a_target_as_long_as_the_context_leaves_room_for_the_question(tiny_llama, tokenizer):
    model = tiny_llama(max_position_embeddings=256)
    rows = [Row("w", "y" * 400, "t"), Row("q?", "yes", "t")]
    score = evaluate_task(model, tokenizer, rows, "exact_match")
    assert score.n == 2
    assert score.truncation == Truncation(1, 0, 401 - 128)


def test_a_task_without_rows_is_named_so(model, tokenizer):
    with pytest.raises(EmptyTaskError, match="no rows"):
        evaluate_task(model, tokenizer, [], "exact_match")


def test_a_model_may_have_no_bound_on_its_context():
    from types import SimpleNamespace

    from mttl_data.forward import context_length

    assert context_length(SimpleNamespace(config=SimpleNamespace(hidden_size=3))) is None
    assert context_length(SimpleNamespace(config=SimpleNamespace(n_positions=9))) == 9
    assert (
        context_length(
            GPTNeoForCausalLM(
                GPTNeoConfig(
                    hidden_size=8,
                    num_layers=1,
                    num_heads=1,
                    vocab_size=9,
                    attention_types=[[["global"], 1]],
                    max_position_embeddings=17,
                )
            )
        )
        == 17
    )
