"""The keys that a token lines up with most: scores of a router, and only those that count.

Several sets of keys are scored together where several layers share one input, as q, k and v do.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mttl_adapters import kernels
from mttl_adapters.fixed_keys import Fixed
from mttl_adapters.kernels import pieces

# From so many keys on, screening in bfloat16 is ahead of float32 products: timed on 2 cores with
# AVX512-bf16, 576 and 1536 features, 1 to 3 sets, 8 and 2048 tokens.
SCREENED_KEYS = 128


class TopK(NamedTuple):
    """Scores of the best keys of each token, (t, k), the largest first, and their indices."""

    values: Tensor
    indices: Tensor


@dataclass(frozen=True)
class _Pointers:
    """What the compiled kernel is told of the keys; ``owned`` is from this version of them."""

    version: tuple[int, ...]
    owned: tuple[Any, ...]
    sizes: Any
    upper: Any
    lower: Any
    norms: Any


class Keys:
    """Sets of keys of one input, each (e, i); what a kernel derives from them is kept here.

    Args:
        sets: of the same i; their numbers of keys may differ. Kept in float32 at least, and copied
            only if they are not. Changing one in place is seen at the next use; those that are
            :class:`Fixed` never change, and take no more memory when they are screened.
    """

    def __init__(self, sets: Tensor | Sequence[Tensor | Fixed]) -> None:
        """Check the shapes."""
        given = [sets] if isinstance(sets, Tensor) else list(sets)
        if not given or any(
            len(keys.shape) != 2 or keys.shape[1] != given[0].shape[1] for keys in given
        ):
            shapes = [tuple(keys.shape) for keys in given]
            raise ValueError(f"got keys of shapes {shapes!r}; they want (e, i) with one i")
        self._sets = tuple(
            keys
            if isinstance(keys, Fixed)
            else keys.to(torch.promote_types(keys.dtype, torch.float32)).contiguous()
            for keys in given
        )
        self._stack: tuple[tuple[int, ...], Tensor] | None = None
        self._split: tuple[tuple[int, ...], Tensor] | None = None
        self._pointers: _Pointers | None = None

    @property
    def sets(self) -> tuple[Tensor, ...]:
        """Each set as a tensor."""
        return tuple(keys.keys if isinstance(keys, Fixed) else keys for keys in self._sets)

    @property
    def changing(self) -> tuple[Tensor, ...]:
        """The sets that are not :class:`Fixed`."""
        return tuple(keys for keys in self._sets if isinstance(keys, Tensor))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Keys of each set."""
        return tuple(keys.shape[0] for keys in self._sets)

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self._sets[0].shape[1]

    def to(self, device: torch.device | str) -> Keys:
        """The same keys on ``device``; themselves where they are there already."""
        if self._sets[0].device == torch.device(device):
            return self
        return Keys([keys.to(device) for keys in self._sets])

    @property
    def stack(self) -> Tensor:
        """All keys below one another."""
        if len(self._sets) == 1:
            return self.sets[0].detach()
        kept = self._stack
        if kept is None or kept[0] != self._version:
            kept = self._stack = (self._version, torch.cat([keys.detach() for keys in self.sets]))
        return kept[1]

    @property
    def split(self) -> Tensor:
        """All keys below one another, in pieces of bfloat16 (3, e, i); for float32 keys alone."""
        kept = self._split
        if kept is None or kept[0] != self._version:
            split = [pieces.split(keys.detach()) for keys in self.sets]  # no stack is kept for it
            kept = self._split = (self._version, torch.cat(split, dim=1))
        return kept[1]

    @property
    def pointers(self) -> _Pointers:
        """What the compiled kernel is told, computed again if a set was changed in place."""
        kept = self._pointers
        if kept is None or kept.version != self._version:
            from mttl_adapters.kernels import cpu

            version = self._version
            owned = tuple(
                keys.halves() if isinstance(keys, Fixed) else cpu.split_keys(keys)
                for keys in self._sets
            )
            array = ctypes.c_int64 * len(owned)
            kept = self._pointers = _Pointers(
                version,
                owned,
                array(*self.sizes),
                *(array(*(halves[part].data_ptr() for halves in owned)) for part in range(3)),
            )
        return kept

    @property
    def _version(self) -> tuple[int, ...]:
        return tuple(0 if keys.is_inference() else keys._version for keys in self.changing)


def top_k(x: Tensor, keys: Keys, k: int, *, absolute: bool = False) -> tuple[TopK, ...]:
    """The k keys of largest ⟨x, v⟩ for each token, for every set of ``keys``.

    Where many keys meet a processor that multiplies bfloat16, a product in bfloat16 screens, and
    every key that its error bound leaves in doubt is scored again, so that the set is the one of
    full float32 always: the scores are then float64 sums rounded to float32, and do not depend on
    what else is in the batch. Elsewhere they are float32 products; on a GPU they are computed from
    bfloat16 pieces, so that no setting of torch rounds their factors. Of equal scores the lower
    index comes first where the kernel is compiled.

    Args:
        x: (t, i), any float dtype.
        keys: each set (e, i).
        k: keys a token gets; all of a set's, where it has fewer.
        absolute: compare, and give back, absolute values.

    Returns:
        For each set its best, float32 (float64 if x or a key is). Gradients go through the chosen
        scores into x and the keys.
    """
    if x.dim() != 2 or x.shape[1] != keys.in_features:
        raise ValueError(f"got x {tuple(x.shape)}; these keys want (t, {keys.in_features})")
    if isinstance(k, bool) or k < 1:
        raise ValueError(f"k is {k!r}; it takes a whole number from 1")
    with torch.no_grad():
        found = _found(x.detach(), keys, k, absolute)
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *keys.changing))
    if learns:
        found = [
            (_Gathered.apply(x, vectors, values, indices), indices)
            if x.requires_grad or vectors.requires_grad
            else (values, indices)
            for vectors, (values, indices) in zip(keys.sets, found, strict=True)
        ]
    return tuple(TopK(values.abs() if absolute else values, each) for values, each in found)


def _found(x: Tensor, keys: Keys, k: int, absolute: bool) -> list[tuple[Tensor, Tensor]]:
    """Signed values and indices."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    for vectors in keys.changing:
        dtype = torch.promote_types(dtype, vectors.dtype)
    kernel = kernels.compiled(x, *keys.changing)
    if kernel is None or dtype != torch.float32 or k > kernel.MOST or not all(keys.sizes):
        return _plain(_products(x, keys, dtype), keys, k, absolute)
    if (
        sum(keys.sizes) >= (SCREENED_KEYS if x.is_cpu else 1)
        and kernel.has_screen()
        and kernel.takes(x)
        and not any(vectors.requires_grad for vectors in keys.changing)
    ):
        return kernel.top_k(x, keys, k, absolute)  # type: ignore[no-any-return]
    scores = torch.split(_products(x, keys, dtype), list(keys.sizes), dim=1)
    return [kernel.select(score, min(k, score.shape[1]), absolute) for score in scores]


def _products(x: Tensor, keys: Keys, dtype: torch.dtype) -> Tensor:
    """(t, e) of x with all keys."""
    if x.is_cuda and dtype == torch.float32:
        return pieces.product(x, keys.split)
    return x.to(dtype) @ keys.stack.to(dtype).T


def _plain(scores: Tensor, keys: Keys, k: int, absolute: bool) -> list[tuple[Tensor, Tensor]]:
    if len(set(keys.sizes)) > 1:
        return [_best(some, k, absolute) for some in torch.split(scores, list(keys.sizes), dim=1)]
    values, indices = _best(scores.view(len(scores), len(keys.sizes), keys.sizes[0]), k, absolute)
    return list(zip(values.unbind(1), indices.unbind(1), strict=True))


def _best(scores: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    """The k largest of the last dimension: signed values and indices."""
    ranked = scores.abs() if absolute else scores
    indices = torch.topk(ranked, min(k, scores.shape[-1]), dim=-1).indices
    return scores.gather(-1, indices), indices


class _Gathered(torch.autograd.Function):
    """The chosen scores, as if only they had been computed; nothing of size (t, k, i) is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, keys, indices)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, keys, indices = ctx.saved_tensors
        from_x = x.new_zeros(x.shape, dtype=grad.dtype) if ctx.needs_input_grad[0] else None
        from_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        for place in range(indices.shape[1]):
            column, weight = indices[:, place], grad[:, place].unsqueeze(1)
            if from_x is not None:
                from_x.addcmul_(weight, keys.detach()[column].to(grad.dtype))
            if from_keys is not None:
                from_keys.index_add_(0, column, (weight * x).to(keys.dtype))
        return None if from_x is None else from_x.to(x.dtype), from_keys, None, None
