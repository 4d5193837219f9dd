from __future__ import annotations

import pytest

from mttl_data.errors import PromptError
from mttl_data.prompts import ANSWER_ONLY, IGNORED, PromptWriter, end_token_id, truncation
from mttl_data.rows import Row

ROW = Row("What is 2 + 2?", "4", "sums")
SHOTS = (Row("What is 1 + 1?", "2", "sums"), Row("What is 1 + 2?", "3", "sums"))


def test_a_prompt_is_the_chat_template_of_instruction_examples_and_question(tokenizer):
    writer = PromptWriter(tokenizer, shots=SHOTS)
    text = tokenizer.decode(writer.prompt(ROW).input_ids)
    assert text == (
        f"<|im_start|>system\n{ANSWER_ONLY}<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_template_a_prompt_is_plain_text(raw_tokenizer):
    writer = PromptWriter(raw_tokenizer, shots=SHOTS[:1])
    text = raw_tokenizer.decode(writer.prompt(ROW).input_ids)
    assert text == f"{ANSWER_ONLY}\n\nWhat is 1 + 1?\n2\n\nWhat is 2 + 2?\n"


def test_a_template_that_takes_no_system_turn_gets_the_instruction_in_the_question(tokenizer):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + tokenizer.chat_template
    )
    text = strict.decode(PromptWriter(strict, shots=SHOTS).prompt(ROW).input_ids)
    assert "system" not in text
    assert text.startswith(f"<|im_start|>user\n{ANSWER_ONLY}\n\nWhat is 1 + 1?")
    assert text.count(ANSWER_ONLY) == 1


def test_labels_are_the_answer_and_its_end_alone(tokenizer):
    example = PromptWriter(tokenizer).example(ROW)
    prompt = PromptWriter(tokenizer).prompt(ROW)
    at = len(prompt.input_ids)
    assert example.input_ids[:at] == prompt.input_ids
    assert example.labels[:at] == [IGNORED] * at
    assert example.labels[at:] == example.input_ids[at:]
    assert tokenizer.decode(example.labels[at:]) == "4<|im_end|>"


def test_the_end_token_is_what_the_template_writes_else_end_of_text(tokenizer, raw_tokenizer):
    assert end_token_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_token_id(raw_tokenizer) == raw_tokenizer.eos_token_id


def test_a_solved_example_never_asks_the_question_itself(tokenizer):
    with pytest.raises(ValueError, match="another split"):
        PromptWriter(tokenizer, shots=[ROW]).prompt(ROW)


def test_a_long_source_loses_its_first_tokens_and_they_are_counted(tokenizer):
    row = Row("x" * 300 + " What is 2 + 2?", "four", "sums")
    whole = PromptWriter(tokenizer).example(row)
    example = PromptWriter(tokenizer, max_length=200).example(row)
    assert len(example.input_ids) == 200
    assert example.source_tokens_cut == len(whole.input_ids) - 200
    text = tokenizer.decode(example.input_ids)
    assert text.startswith(f"<|im_start|>system\n{ANSWER_ONLY}<|im_end|>\n<|im_start|>user\nxx")
    assert text.endswith("What is 2 + 2?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>")


def test_what_was_cut_is_added_up(tokenizer):
    rows = [Row("y" * n, "yes", "t") for n in (5, 300, 400)]
    writer = PromptWriter(tokenizer, max_length=200)
    examples = writer.examples(rows)
    cut = truncation(examples)
    whole = PromptWriter(tokenizer).examples(rows)
    assert cut.rows == 2
    assert cut.source_tokens == sum(max(0, len(e.input_ids) - 200) for e in whole)
    assert cut.target_tokens == 0


def test_a_target_longer_than_the_room_is_cut_and_counted(tokenizer):
    writer = PromptWriter(tokenizer, max_length=200)
    example = writer.example(Row("short", "z" * 400, "t"))
    assert len(example.input_ids) == 200
    assert example.target_tokens_cut > 0
    assert truncation([example]).rows == 1


def test_too_little_room_for_the_prompt_itself_is_one_clear_error(tokenizer):
    with pytest.raises(PromptError, match="give fewer examples"):
        PromptWriter(tokenizer, shots=SHOTS, max_length=40).prompt(ROW)


def test_a_question_is_cut_the_same_with_examples_and_without(tokenizer):
    row = Row("x" * 300 + " What is 2 + 2?", "four", "sums")
    alone = PromptWriter(tokenizer, max_input_length=150).prompt(row)
    shown = PromptWriter(tokenizer, shots=SHOTS, max_input_length=150).prompt(row)
    assert len(alone.input_ids) == 150
    assert shown.source_tokens_cut == alone.source_tokens_cut
    question = tokenizer.decode(alone.input_ids).rpartition("<|im_start|>user\n")[2]
    assert tokenizer.decode(shown.input_ids).endswith(f"<|im_start|>user\n{question}")
