"""Calls of the compiled kernels on tensors in this machine's memory, and their gradients.

Everything is checked before it gets here. Plain torch gives the same within rounding; sums over
features and experts are kept in float32 at least.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mttl_adapters.kernels.build import library
from mttl_adapters.kernels.torch import sorted_pairs

if TYPE_CHECKING:
    from mttl_adapters.bank import Bank
    from mttl_adapters.chosen import Chosen
    from mttl_adapters.scores import Keys

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
MOST = 64  # largest k of top_k

# Output columns that threads share where tokens are too few to be shared: timed, 8 tokens. With
# more, whole rows are 1.2 to 3 times faster than blocks of 64 to 256 columns.
COLUMNS = 256
FEW_TOKENS = 64


class Halves(NamedTuple):
    """Keys (e, i) in two halves, their rows padded; together they take what the keys take.

    Attributes:
        upper: the numbers, rounded to bfloat16.
        lower: what the bits of those lack of the bits of the numbers.
        norms: of each key, and of what rounding took from it.
    """

    upper: Tensor
    lower: Tensor
    norms: Tensor


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels know these dtypes and strides."""
    return all(tensor.dtype in DTYPES and _rows(tensor) for tensor in tensors)


def apply(x: Tensor, bank: Bank, chosen: Chosen) -> Tensor:
    """Sum of the chosen experts for each token, (t, o), with gradients.

    They reach x, the weights of the chosen, and the factors where those want any.
    """
    chosen = chosen.each()
    learned = (bank.a, bank.b) if bank.requires_grad else (None, None)
    return _Apply.apply(x, chosen.weights, *learned, bank, chosen.experts)  # type: ignore[no-any-return]


def add_to(
    out: Tensor,
    x: Tensor,
    bank: Bank,
    experts: Tensor,
    weights: Tensor,
    *,
    swapped: bool = False,
) -> Tensor:
    """Adds to ``out`` (t, o) in place what the chosen make of x (t, i), rounding each sum once.

    Args:
        out: whose rows are runs of memory.
        x: the same.
        bank: in this machine's memory.
        experts: (t, k) int64.
        weights: (t, k).
        swapped: take B for A and A for B.

    Returns:
        What each expert's A made of x, without weights, sorted by expert: the first numbers of a
        tensor that may be longer.
    """
    wide = torch.float64 in (out.dtype, x.dtype, bank.dtype)
    real = torch.float64 if wide else torch.float32
    table, experts = bank.table, experts.contiguous()
    weights = weights.to(real).contiguous()
    t, k = experts.shape
    hidden = torch.empty(t * k * bank.widest, dtype=real)
    columns = out.shape[1] if t > FEW_TOKENS else min(COLUMNS, out.shape[1])
    resident = bank.resident
    fresh = (_functions().mttl_apply_f64 if wide else _functions().mttl_apply_f32)(
        table.data_ptr(),
        table.shape[0],
        DTYPES[bank.dtype],
        swapped,
        x.data_ptr(),
        DTYPES[x.dtype],
        x.stride(0),
        x.shape[1],
        out.shape[1],
        experts.data_ptr(),
        weights.data_ptr(),
        t,
        k,
        out.data_ptr(),
        DTYPES[out.dtype],
        out.stride(0),
        hidden.data_ptr(),
        resident.tick() if resident else 1,
        max(1, columns),
        torch.get_num_threads(),
    )
    if fresh == -2:
        raise IndexError(f"an expert above {table.shape[0] - 1} was chosen; the bank has no such")
    if fresh < 0:
        raise MemoryError("no memory for the working space of a bank of experts")
    if resident and fresh:
        resident.grown(bank, int(fresh))
    return hidden


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        a: Tensor | None,
        b: Tensor | None,
        bank: Bank,
        experts: Tensor,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, bank.dtype)
        out = x.new_zeros((x.shape[0], bank.out_features), dtype=dtype)
        hidden = add_to(out, x, bank, experts, weights)
        ctx.save_for_backward(x, weights, experts, hidden, a, b)
        ctx.bank = bank
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, experts, hidden, a, _ = ctx.saved_tensors
        grad = grad if _rows(grad) else grad.contiguous()
        from_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        # Through the transposes: A and B change places, and B' grad comes back in place of A x.
        back = add_to(from_x, grad, ctx.bank, experts, weights, swapped=True)
        order, found, sizes = sorted_pairs(experts)
        from_weights = None
        if ctx.needs_input_grad[1]:
            from_weights = _weights_gradient(ctx.bank, weights, order, found, sizes, hidden, back)
        from_factors: tuple[Tensor | None, Tensor | None] = (None, None)
        if a is not None:
            from_factors = _factors_gradient(
                ctx.bank, x, grad, weights, order, found, sizes, hidden, back
            )
        return from_x, from_weights, *from_factors, None, None


def _weights_gradient(
    bank: Bank,
    weights: Tensor,
    order: Tensor,
    found: list[int],
    sizes: list[int],
    hidden: Tensor,
    back: Tensor,
) -> Tensor:
    """s_e <A_e x, B_e' grad> of each pair."""
    ranks = torch.tensor([bank.ranks[e] for e in found], dtype=torch.int64)
    scalings = torch.tensor([bank.scalings[e] for e in found], dtype=back.dtype)
    counts = torch.tensor(sizes, dtype=torch.int64)
    pair_of = torch.repeat_interleave(ranks.repeat_interleave(counts))  # of each number
    products = hidden[: len(pair_of)].to(back.dtype) * back[: len(pair_of)]
    dots = back.new_zeros(len(order)).index_add_(0, pair_of, products)
    dots *= scalings.repeat_interleave(counts)
    return back.new_zeros(weights.numel()).index_copy_(0, order, dots).view_as(weights).to(weights)


def _factors_gradient(
    bank: Bank,
    x: Tensor,
    grad: Tensor,
    weights: Tensor,
    order: Tensor,
    found: list[int],
    sizes: list[int],
    hidden: Tensor,
    back: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the stacks A (R, i) and B (o, R)."""
    a, b = torch.zeros_like(bank.a), torch.zeros_like(bank.b.T)
    starts = bank.starts
    token_of, flat, start, first = order // weights.shape[1], weights.flatten(), 0, 0
    for expert, size in zip(found, sizes, strict=True):
        rank = bank.ranks[expert]
        mine = slice(start, start := start + size)
        numbers = slice(first, first := first + size * rank)
        scaled = (flat[order[mine]] * bank.scalings[expert]).unsqueeze(1).to(back.dtype)
        rows, tokens = slice(starts[expert], starts[expert] + rank), token_of[mine]
        sent = (back[numbers].view(size, rank) * scaled).T
        a[rows] = (sent @ x[tokens].to(back.dtype)).to(a.dtype)
        sent = (hidden[numbers].view(size, rank).to(back.dtype) * scaled).T
        b[rows] = (sent @ grad[tokens].to(back.dtype)).to(b.dtype)
    return a, b.T


def select(scores: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (t, e) float32: signed values and indices, (t, k)."""
    t, e = scores.shape
    values, indices = torch.empty(t, k), torch.empty(t, k, dtype=torch.int64)
    _functions().mttl_select(
        scores.data_ptr(),
        scores.stride(0),
        t,
        e,
        k,
        absolute,
        indices.data_ptr(),
        values.data_ptr(),
        torch.get_num_threads(),
    )
    return values, indices


def has_screen() -> bool:
    """Whether the processor multiplies bfloat16, so that :func:`top_k` is there."""
    return bool(_functions().mttl_has_screen())


def split_keys(keys: Tensor) -> Halves:
    """Float32 keys (e, i) as the screen reads them."""
    e, i = keys.shape
    width = -(-i // 32) * 32
    halves = Halves(
        torch.empty(e, width, dtype=torch.bfloat16),
        torch.empty(e, width, dtype=torch.int16),
        torch.empty(2, -(-e // 16) * 16),
    )
    _functions().mttl_split_keys(
        keys.data_ptr(), e, i, *(part.data_ptr() for part in halves), torch.get_num_threads()
    )
    return halves


def joined_norms(norms: Tensor, e: int, more: Tensor, m: int) -> Tensor:
    """Of :class:`Halves`, those of e keys and of m more, side by side."""
    joined = torch.zeros(2, -(-(e + m) // 16) * 16)
    joined[:, :e], joined[:, e : e + m] = norms[:, :e], more[:, :m]
    return joined


def join_keys(halves: Halves, in_features: int) -> Tensor:
    """The keys that :func:`split_keys` was given, bit for bit."""
    keys = torch.empty(len(halves.upper), in_features)
    _functions().mttl_join_keys(
        halves.upper.data_ptr(),
        halves.lower.data_ptr(),
        *keys.shape,
        keys.data_ptr(),
        torch.get_num_threads(),
    )
    return keys


def top_k(x: Tensor, keys: Keys, k: int, absolute: bool) -> list[tuple[Tensor, Tensor]]:
    """Signed values and indices, (t, k), of each key set's largest, screened in bfloat16."""
    t = x.shape[0]
    found, pointers = [], keys.pointers
    for size in keys.sizes:
        some = min(k, size)
        found.append((torch.empty(t, some), torch.empty(t, some, dtype=torch.int64)))
    array = ctypes.c_int64 * len(found)
    again = _functions().mttl_top_k(
        x.data_ptr(),
        DTYPES[x.dtype],
        x.stride(0),
        t,
        x.shape[1],
        len(found),
        pointers.sizes,
        array(*(min(k, size) for size in keys.sizes)),
        pointers.upper,
        pointers.lower,
        pointers.norms,
        absolute,
        array(*(indices.data_ptr() for _, indices in found)),
        array(*(values.data_ptr() for values, _ in found)),
        torch.get_num_threads(),
    )
    if again < 0:
        raise MemoryError("no memory for the working space of top_k")
    return found


def _rows(tensor: Tensor) -> bool:
    """Whether each row is a run of memory."""
    return tensor.dim() == 2 and (tensor.stride(1) == 1 or tensor.shape[1] <= 1)


@cache
def _functions() -> ctypes.CDLL:
    functions = library().functions
    if functions is None:
        raise RuntimeError(f"the compiled kernel was called, but {library().reason}")
    pointer: Any = ctypes.c_void_p
    number: Any = ctypes.c_int64
    flag: Any = ctypes.c_int
    factors = [pointer, number, flag, flag]
    tensors = [pointer, flag, number, number, number, pointer, pointer, number, number]
    for function in (functions.mttl_apply_f32, functions.mttl_apply_f64):
        function.argtypes = [
            *factors, *tensors, pointer, flag, number, pointer, number, number, flag
        ]  # fmt: skip
        function.restype = number
    functions.mttl_select.argtypes = [
        pointer, number, number, number, number, flag, pointer, pointer, flag
    ]  # fmt: skip
    functions.mttl_select.restype = None
    if functions.mttl_has_screen():
        functions.mttl_split_keys.argtypes = [pointer, number, number, *[pointer] * 3, flag]
        functions.mttl_split_keys.restype = None
        functions.mttl_join_keys.argtypes = [pointer, pointer, number, number, pointer, flag]
        functions.mttl_join_keys.restype = None
        functions.mttl_top_k.argtypes = [
            pointer, flag, number, number, number, number, *[pointer] * 5, flag, pointer, pointer,
            flag,
        ]  # fmt: skip
        functions.mttl_top_k.restype = number
    return functions
