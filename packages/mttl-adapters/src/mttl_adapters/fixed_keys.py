"""Keys that never change, kept in memory once, which may be followed by more."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class Room:
    """Rows in memory, and room for more below them.

    Whoever holds the first ``n`` rows is not disturbed by those that come after. Only when the room
    is used up, or another has used it, is all copied: an eighth more than is needed then.
    """

    def __init__(self, rows: Tensor) -> None:
        """Just these, not copied."""
        self.buffer = rows
        self.used = len(rows)
        self._lock = threading.Lock()

    def extended(self, n: int, more: Tensor) -> Room:
        """The first ``n`` rows and some more; itself where there is room after those."""
        total = n + len(more)
        with self._lock:
            if self.used == n and total <= len(self.buffer):
                self.buffer[n:total] = more
                self.used = total
                return self
        with torch.inference_mode(False):  # rows are written to it afterwards, too
            other = Room(self.buffer.new_empty(total + total // 8, *self.buffer.shape[1:]))
        other.buffer[:n] = self.buffer[:n]
        other.buffer[n:total] = more
        other.used = total
        return other


class Fixed:
    """Float32 keys (e, i) that never change, in memory once.

    They are kept as they were given until a screen first reads them, and from then on as the two
    halves of each number that it wants. Whoever gives them should let go of them.
    """

    def __init__(self, keys: Tensor) -> None:
        """Keep the keys themselves."""
        self.shape = keys.shape
        self.device = keys.device
        self._keys: Room | None = Room(keys.detach().float().contiguous())
        self._halves: tuple[Room, Room, Tensor] | None = None

    def __len__(self) -> int:
        """How many keys there are."""
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """What they take, without room for more."""
        keys = () if self._keys is None else (self.keys,)
        return sum(part.nbytes for part in (*keys, *(self.halves() if self._halves else ())))

    @property
    def keys(self) -> Tensor:
        """The numbers as a tensor, made anew if they were split, and then kept beside the halves.

        So one who reads both ways in turns does not wait each time.
        """
        keys = self._keys  # another thread may be splitting them
        if keys is None:
            keys = self._keys = Room(self.copied())
        return keys.buffer[: len(self)]

    def copied(self) -> Tensor:
        """The numbers as a tensor that is not kept if it was made for this."""
        from mttl_adapters.kernels import cpu

        keys = self._keys  # looked at first: the halves are there before it is not
        return (
            cpu.join_keys(self.halves(), self.shape[1])
            if keys is None
            else keys.buffer[: len(self)]
        )

    def halves(self) -> Any:
        """As the screen reads them."""
        from mttl_adapters.kernels import cpu

        found = self._halves
        if found is None:
            made = cpu.split_keys(self.copied())
            found = self._halves = Room(made.upper), Room(made.lower), made.norms
            self._keys = None  # after the halves are there for other threads
        upper, lower, norms = found
        return cpu.Halves(upper.buffer[: len(self)], lower.buffer[: len(self)], norms)

    def extended(self, more: Tensor) -> Fixed:
        """These keys and some more (m, i), which alone are copied as long as there is room."""
        n, more = len(self), more.detach().float().contiguous()
        other = object.__new__(Fixed)
        other.shape = torch.Size((n + len(more), self.shape[1]))
        other.device, other._keys, other._halves = self.device, None, None
        keys, halves = self._keys, self._halves
        if halves is None and keys is not None:
            other._keys = keys.extended(n, more)
        elif halves is not None:
            from mttl_adapters.kernels import cpu

            new = cpu.split_keys(more)
            other._halves = (
                halves[0].extended(n, new.upper),
                halves[1].extended(n, new.lower),
                cpu.joined_norms(halves[2], n, new.norms, len(more)),
            )
        return other

    def to(self, device: torch.device | str) -> Fixed:
        """The same keys on ``device``; themselves where they are there already."""
        return self if self.device == torch.device(device) else Fixed(self.copied().to(device))
