"""The arithmetic of a bank of experts, and which implementation does it.

``torch`` is plain torch, on any device. ``cpu`` is C, compiled once on the machine that runs it.
``triton`` is for NVIDIA GPUs. All give the same results within rounding.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

from torch import Tensor, cuda, version
from torch import device as torch_device

from mttl_adapters.kernels import build, cpu

KERNELS = ("auto", "torch", "cpu", "triton")

_CHOICE: ContextVar[str | None] = ContextVar("kernels", default=None)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within the block, in this thread: ``auto``, plain ``torch``, ``cpu`` or ``triton``.

    ``cpu`` must compile and ``triton`` be there, wherever tensors are that it could take.

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


def no_triton(device: torch_device) -> str | None:
    """Why Triton's kernels do not run on a device, in one line; None where they do."""
    return _no_triton(device.type, device.index or 0)


def compiled(*tensors: Tensor) -> ModuleType | None:
    """The compiled kernel, if it is to take these tensors."""
    asked = choice()
    if asked == "triton" or (asked == "auto" and all(tensor.is_cuda for tensor in tensors)):
        return _triton(tensors[0].device, asked)
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


def _triton(device: torch_device, asked: str) -> ModuleType | None:
    reason = no_triton(device)
    if reason is None:
        return importlib.import_module("mttl_adapters.kernels.triton")
    if asked == "triton":
        raise RuntimeError(f"Triton was asked for, but {reason}; ask for 'auto' or 'torch'")
    return None


@cache
def _no_triton(kind: str, index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "it is not installed"
    if kind == "cuda":
        if version.cuda is None:
            return "this torch is not built for NVIDIA GPUs"
        if cuda.get_device_capability(index) < (8, 0):
            return f"{cuda.get_device_name(index)} does not multiply bfloat16"
        return None
    # Set before Triton is imported, this runs kernels one program after the other, for tests.
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {kind!r}"


def _known(name: str, what: str) -> str:
    if name not in KERNELS:
        raise ValueError(f"{what} is {name!r}; it takes {', '.join(map(repr, KERNELS))}")
    return name
