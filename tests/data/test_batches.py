from __future__ import annotations

from itertools import islice

import pytest
import torch

from mttl_data.batches import Batches, collate
from mttl_data.prompts import IGNORED, PromptWriter
from mttl_data.rows import Row

ROW = Row("What is 2 + 2?", "4", "sums")


def test_collate_pads_on_the_right_and_masks_it(tokenizer):
    writer = PromptWriter(tokenizer)
    examples = writer.examples([ROW, Row("A longer question?", "longer", "sums")])
    batch = collate(examples, pad_id=0)
    for index, example in enumerate(examples):
        n = len(example.input_ids)
        assert batch["input_ids"][index, :n].tolist() == example.input_ids
        assert batch["labels"][index, :n].tolist() == example.labels
        assert batch["attention_mask"][index].tolist() == [1] * n + [0] * (
            batch["input_ids"].shape[1] - n
        )
        assert (batch["labels"][index, n:] == IGNORED).all()


@pytest.fixture
def examples(tokenizer):
    writer = PromptWriter(tokenizer)
    return writer.examples([Row("q" * (1 + 7 * n % 60), str(n), "t") for n in range(50)])


def rows_of(batch) -> list[tuple[int, ...]]:
    return [
        tuple(ids[mask.bool()].tolist())
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once(examples, shuffle):
    batches = Batches(examples, 8, pad_id=0, seed=3, shuffle=shuffle)
    seen = [row for batch in batches for row in rows_of(batch)]
    assert len(batches) == 7 == len(list(batches))
    assert sorted(seen) == sorted(tuple(example.input_ids) for example in examples)


def test_the_seed_and_the_epoch_decide_the_order(examples):
    def order(seed, epoch):
        return [rows_of(batch) for batch in Batches(examples, 8, pad_id=0, seed=seed).epoch(epoch)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(2, 0)
    assert order(1, 0) != order(1, 1)


def test_a_stream_begun_in_the_middle_goes_on_as_it_would_have(examples):
    batches = Batches(examples, 8, pad_id=0, seed=1)
    whole = list(islice(batches.stream(), 20))
    rest = list(islice(batches.stream(start=9), 11))
    for a, b in zip(whole[9:], rest, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])


def test_batches_of_like_length_pad_less(examples):
    def padding(shuffle):
        batches = Batches(examples, 8, pad_id=0, seed=1, shuffle=shuffle)
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    assert padding(True) < padding(False) / 2


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="no examples"):
        Batches([], 8, pad_id=0)


def test_batches_name_the_tasks_of_their_rows_where_they_are_told(examples):
    tasks = [f"task {len(example.input_ids)}" for example in examples]
    batches = list(Batches(examples, 8, pad_id=0, tasks=tasks))
    for batch in batches:
        lengths = batch["attention_mask"].sum(1).tolist()
        assert batch["task_names"] == tuple(f"task {length}" for length in lengths)
    assert "task_names" not in next(iter(Batches(examples, 8, pad_id=0)))
    with pytest.raises(ValueError, match="1 tasks are named for 50 examples"):
        Batches(examples, 8, pad_id=0, tasks=["one"])
