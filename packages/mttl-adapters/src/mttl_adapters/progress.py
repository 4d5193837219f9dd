"""How far a piece of work has come, in the one form in which all of this package tells it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int | None], object]
"""Told what is done ("" for the work as asked), how far it is, and how far it goes if known."""


def download_bar(progress: Progress | None) -> type | None:
    """A class of bars for the hub's client that draw nothing and tell ``progress`` of megabytes."""
    if progress is None:
        return None
    from huggingface_hub.utils.tqdm import tqdm

    tell = progress

    class Told(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))  # type: ignore[no-untyped-call]
            self.bytes = int(options.get("initial") or 0)
            file = str(options.get("desc")).rpartition("/")[2]
            # Other bars count files.
            self.what = f"downloading {file}, MB" if options.get("unit") == "B" else ""

        def update(self, n: float | None = 1) -> None:
            self.bytes += int(n or 0)
            if self.what:
                total = None if self.total is None else round(self.total / 1e6)
                tell(self.what, round(self.bytes / 1e6), total)

    return Told
