"""Examples to padded batches, in an order that a seed decides.

Moving batches to a device is left to whoever trains.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from mttl_data.prompts import IGNORED, Example

# Batches of like length are cut from this many batches' worth of shuffled rows.
_POOL_BATCHES = 8


def collate(examples: Sequence[Example], pad_id: int) -> dict[str, Tensor]:
    """``input_ids``, ``attention_mask`` and ``labels``, each (b, s) int64, padded on the right."""
    longest = max(len(example.input_ids) for example in examples)
    shape = (len(examples), longest)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for index, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[index, :length] = torch.tensor(example.input_ids)
        labels[index, :length] = torch.tensor(example.labels)
        attention_mask[index, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


class Batches:
    """Padded batches of like length, in an order that the seed and the epoch alone decide.

    Iterating gives one epoch, the first; ``stream`` goes on for ever and can begin at any batch.

    Args:
        examples: What to learn from.
        batch_size: Rows in a batch; the last one of an epoch may have fewer.
        pad_id: Any token id; padding is masked.
        seed: Decides which rows meet in a batch and in which order batches come.
        shuffle: Without it rows keep their order, and so do batches.
        tasks: Of each example; batches then have ``task_names`` as well, one a row.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        *,
        pad_id: int,
        seed: int = 0,
        shuffle: bool = True,
        tasks: Sequence[str] | None = None,
    ) -> None:
        """Keep the examples; nothing is padded before it is asked for."""
        if not examples:
            raise ValueError("no examples to make batches of")
        if batch_size < 1:
            raise ValueError(f"a batch needs at least 1 row, {batch_size!r} was asked for")
        if tasks is not None and len(tasks) != len(examples):
            raise ValueError(f"{len(tasks)} tasks are named for {len(examples)} examples")
        self.examples = examples
        self.tasks = tasks
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Batches in one epoch."""
        return -(-len(self.examples) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One epoch."""
        return self.epoch(0)

    def epoch(self, number: int, skip: int = 0) -> Iterator[dict[str, Any]]:
        """The batches of one epoch without the first ``skip``."""
        for indices in self._order(number)[skip:]:
            batch: dict[str, Any] = {}
            batch.update(collate([self.examples[index] for index in indices], self.pad_id))
            if self.tasks is not None:
                batch["task_names"] = tuple(self.tasks[index] for index in indices)
            yield batch

    def stream(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """Epoch after epoch, from batch number ``start``: where an interrupted run goes on."""
        first, skip = divmod(start, len(self))
        for number in count(first):
            yield from self.epoch(number, skip)
            skip = 0

    def _order(self, epoch: int) -> list[list[int]]:
        indices = list(range(len(self.examples)))
        size = self.batch_size
        if not self.shuffle:
            return [indices[at : at + size] for at in range(0, len(indices), size)]
        generator = random.Random(f"{self.seed}:{epoch}")  # noqa: S311
        generator.shuffle(indices)
        batches = []
        for at in range(0, len(indices), size * _POOL_BATCHES):
            pool = sorted(
                indices[at : at + size * _POOL_BATCHES],
                key=lambda index: len(self.examples[index].input_ids),
            )
            batches += [pool[start : start + size] for start in range(0, len(pool), size)]
        generator.shuffle(batches)
        return batches
