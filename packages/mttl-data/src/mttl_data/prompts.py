"""Rows to token ids: prompts, and answers with labels.

A prompt is the tokenizer's chat template where it has one, and plain text where it has none.
Nothing is cut without being counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mttl_data.errors import PromptError
from mttl_data.rows import Row

ANSWER_ONLY = "Reply with the answer only."
IGNORED = -100  # the label that torch's cross entropy leaves out
_MARK = "\u241fmttl\u241f"


@dataclass(frozen=True)
class Prompt:
    """Token ids that ask for one answer, and how many tokens of the row's text were left out."""

    input_ids: list[int]
    source_tokens_cut: int = 0
    target_tokens_cut: int = 0


@dataclass(frozen=True)
class Example:
    """A prompt and its answer; ``labels`` is -100 on the prompt and ends with the end token."""

    input_ids: list[int]
    labels: list[int]
    source_tokens_cut: int = 0
    target_tokens_cut: int = 0


@dataclass(frozen=True)
class Truncation:
    """How much of a set of rows did not fit: rows touched, and tokens lost on each side."""

    rows: int
    source_tokens: int
    target_tokens: int

    def __str__(self) -> str:
        """A sentence for people."""
        return (
            f"{self.rows} rows were too long and lost {self.source_tokens} tokens of their prompts "
            f"and {self.target_tokens} of their answers"
        )


class PromptWriter:
    """Turns rows into token ids for one tokenizer, one instruction and one set of solved examples.

    Args:
        tokenizer: A transformers tokenizer.
        shots: Solved examples, shown as earlier turns. None may ask what a row asks.
        instruction: A line that goes before everything; empty for none.
        max_length: Most tokens that one prompt or example may have. The source then loses its
            first tokens, never the instruction, the examples or the answer's place.
        max_input_length: Most tokens of a prompt without its examples, cut in the same way: so a
            question is the same with examples and without.
        max_output_length: Most tokens of an answer, its end token among them.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        shots: Sequence[Row] = (),
        instruction: str = ANSWER_ONLY,
        max_length: int | None = None,
        max_input_length: int | None = None,
        max_output_length: int | None = None,
    ) -> None:
        """Set up the parts that all rows share."""
        self.tokenizer = tokenizer
        self.shots = tuple(shots)
        self.instruction = instruction
        self.max_length = max_length
        self.max_input_length = max_input_length
        self.max_output_length = max_output_length
        self.end_id = end_token_id(tokenizer)
        self._shot_sources = {shot.source for shot in self.shots}
        self._system_turn = True
        if tokenizer.chat_template and instruction:
            self._system_turn = _takes_system_turn(tokenizer, instruction)

    def text(self, source: str) -> str:
        """The prompt for one source as the tokenizer will see it."""
        return self._text(source, self.shots)

    def prompt(self, row: Row, room: int = 0) -> Prompt:
        """The ids that ask for the row's answer, with ``room`` tokens kept free after them."""
        if row.source in self._shot_sources:
            raise ValueError(
                f"a solved example of task {row.task_name!r} asks the same as a row that is put to "
                "the model; take the examples from another split"
            )
        source, cut = row.source, 0
        if self.max_input_length is not None:
            source, cut = self._cut(source, (), self.max_input_length)
        if self.max_length is not None:
            source, more = self._cut(source, self.shots, self.max_length - room)
            cut += more
        return Prompt(self._ids(self.text(source)), cut)

    def example(self, row: Row) -> Example:
        """The row's prompt and answer, labelled for training."""
        answer = [*_plain_ids(self.tokenizer, row.target), self.end_id]
        most = self.max_output_length or len(answer)
        if self.max_length is not None:
            most = min(most, self.max_length - len(self._ids(self.text(""))))
            if most < 1:
                raise self._no_room(self.max_length, self.shots)
        target_cut = max(0, len(answer) - most)
        answer = answer[:most]
        prompt = self.prompt(row, room=len(answer))
        return Example(
            input_ids=prompt.input_ids + answer,
            labels=[IGNORED] * len(prompt.input_ids) + answer,
            source_tokens_cut=prompt.source_tokens_cut,
            target_tokens_cut=target_cut,
        )

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """``example`` of every row, in order."""
        return [self.example(row) for row in rows]

    def _text(self, source: str, shots: Sequence[Row]) -> str:
        if not self.tokenizer.chat_template:
            parts = [self.instruction] if self.instruction else []
            parts += [f"{shot.source}\n{shot.target}" for shot in shots]
            return "\n\n".join([*parts, f"{source}\n"])
        return _render(self.tokenizer, self._messages(source, shots), add_generation_prompt=True)

    def _messages(self, source: str, shots: Sequence[Row]) -> list[dict[str, str]]:
        turns = []
        for shot in shots:
            turns.append({"role": "user", "content": shot.source})
            turns.append({"role": "assistant", "content": shot.target})
        turns.append({"role": "user", "content": source})
        if not self.instruction:
            return turns
        if self._system_turn:
            return [{"role": "system", "content": self.instruction}, *turns]
        first = {"role": "user", "content": f"{self.instruction}\n\n{turns[0]['content']}"}
        return [first, *turns[1:]]

    def _ids(self, text: str) -> list[int]:
        if self.tokenizer.chat_template:  # the template has written its own special tokens
            return _plain_ids(self.tokenizer, text)
        ids = list(self.tokenizer(text).input_ids)
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def _cut(self, source: str, shots: Sequence[Row], most: int) -> tuple[str, int]:
        """The source with as little as need be taken from its left, and how many tokens that is."""

        def over(text: str) -> int:
            return len(self._ids(self._text(text, shots))) - most

        cut = over(source)
        if cut <= 0:
            return source, 0
        encoded = self.tokenizer(source, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        while cut < len(starts):
            kept = source[starts[cut] :]
            if (more := over(kept)) <= 0:
                return kept, cut
            cut += more
        if over("") > 0:
            raise self._no_room(most, shots)
        return "", len(starts)

    def _no_room(self, most: int, shots: Sequence[Row] = ()) -> PromptError:
        return PromptError(
            f"{most} tokens are too few: a prompt without any text of its row takes "
            f"{len(self._ids(self._text('', shots)))}, with {len(shots)} solved examples; "
            "allow more tokens or give fewer examples"
        )


def truncation(items: Sequence[Example | Prompt]) -> Truncation:
    """What was cut from these in all."""
    source = [item.source_tokens_cut for item in items]
    target = [item.target_tokens_cut for item in items]
    touched = sum(bool(a or b) for a, b in zip(source, target, strict=True))
    return Truncation(touched, sum(source), sum(target))


def end_token_id(tokenizer: Any) -> int:
    """The token that ends an answer: what the chat template writes there, else end-of-text."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        after = _render(tokenizer, turns).rpartition(_MARK)[2].lstrip()
        ids = _plain_ids(tokenizer, after)
        if ids and ids[0] in tokenizer.all_special_ids:
            return ids[0]
    if tokenizer.eos_token_id is None:
        raise PromptError("the tokenizer has no end-of-text token, so no answer could ever end")
    return int(tokenizer.eos_token_id)


def _plain_ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _takes_system_turn(tokenizer: Any, instruction: str) -> bool:
    """Whether the template shows a system turn; some refuse it, some leave it out."""
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": instruction}, {"role": "user", "content": "?"}]
    try:
        return instruction in _render(tokenizer, turns)
    except TemplateError:
        return False
