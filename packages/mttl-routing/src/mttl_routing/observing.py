"""What chosen modules of a transformers model are given when it reads a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


class _AllSeenError(Exception):
    """Ends a forward pass of which nothing more is wanted."""


def inputs_of(
    model: Any, paths: Sequence[str], entry: Any = None, **inputs: Any
) -> dict[str, Tensor]:
    """Inputs of the modules at ``paths`` in one forward pass, which ends where the last was seen.

    So the language model's head, whose input the last hidden states are, is never computed.

    Args:
        model: a transformers model.
        paths: of modules in it, as ``named_modules`` has them.
        entry: the part of the model that is run, an encoder for one; None is all of it.
        inputs: to its ``forward``.

    Returns:
        (b, s, i) by path, without gradient, as they were in the module's first call.

    Raises:
        ValueError: naming the modules that the model lacks, or that did not run.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    absent = sorted(set(paths).difference(modules))
    if absent:
        raise ValueError(f"the {type(model).__name__} has no modules {absent!r}; name others")
    seen: dict[str, Tensor] = {}

    def see(path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()))
        seen.setdefault(path, value.detach())
        if len(seen) == len(set(paths)):
            raise _AllSeenError

    with ExitStack() as hooks, torch.no_grad():
        for path in set(paths):
            handle = modules[path].register_forward_pre_hook(_hook(see, path), with_kwargs=True)
            hooks.callback(handle.remove)
        try:
            (model if entry is None else entry)(**inputs)
        except _AllSeenError:
            return seen
    silent = sorted(set(paths).difference(seen))
    raise ValueError(f"modules {silent!r} of the {type(model).__name__} did not run; name others")


def _hook(see: Any, path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(path, args, kwargs)

    return hook
