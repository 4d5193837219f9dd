"""One example of one task, in the flat form that every collection here shares."""

from __future__ import annotations

from dataclasses import dataclass

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt text and the answer wanted for it.

    Attributes:
        source: The text put to the model.
        target: The answer that a model is trained on and scored against.
        task_name: The task it belongs to, unique in a collection.
        task_source: Where the task comes from, such as ``"NIv2"`` or ``"reasoning-gym"``.
        template_type: How the text was made, such as ``"zs_noopt"``.
        split: One of ``SPLITS``.
        metadata: JSON text with what the task's scorer needs; empty where it needs nothing.
    """

    source: str
    target: str
    task_name: str
    task_source: str = ""
    template_type: str = ""
    split: str = "train"
    metadata: str = ""
