"""The arithmetic of a bank of experts, and which implementation does it.

``torch`` is plain torch, on any device. ``cpu`` is C, compiled once on the machine that runs it.
Both give the same results within rounding. On other devices than the CPU there is plain torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

from torch import Tensor

from mttl_adapters.kernels import build, cpu

KERNELS = ("auto", "torch", "cpu")

_CHOICE: ContextVar[str | None] = ContextVar("kernels", default=None)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within the block, in this thread: ``auto``, plain ``torch``, or ``cpu``, which must compile.

    Outside of any block the variable ``MTTL_KERNELS`` of the environment says which.
    """
    token = _CHOICE.set(_known(name, "kernels"))
    try:
        yield
    finally:
        _CHOICE.reset(token)


def choice() -> str:
    """Which of :data:`KERNELS` is asked for here."""
    return _CHOICE.get() or _known(os.environ.get("MTTL_KERNELS", "auto"), "MTTL_KERNELS")


def missing() -> str | None:
    """Why there is no compiled kernel on this machine, in one line; None where there is one."""
    return build.library().reason


def compiled(*tensors: Tensor) -> ModuleType | None:
    """The compiled kernel, if it is to take these tensors."""
    asked = choice()
    if asked == "torch" or not all(tensor.is_cpu for tensor in tensors):
        return None
    reason = build.library().reason
    if reason is None:
        return cpu
    if asked == "cpu":
        raise RuntimeError(
            f"the compiled kernel was asked for, but {reason}; ask for 'auto' or 'torch'"
        )
    return None


def _known(name: str, what: str) -> str:
    if name not in KERNELS:
        raise ValueError(f"{what} is {name!r}; it takes {', '.join(map(repr, KERNELS))}")
    return name
