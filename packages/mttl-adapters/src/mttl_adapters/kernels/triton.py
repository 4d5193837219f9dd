"""Calls of the Triton kernels on tensors of one GPU, and their gradients.

Nothing here waits for the device, so all of it can be captured in a CUDA graph. The order of every
sum is fixed, so results do not differ between runs. An expert beyond the bank counts as none: to
raise an error the device would have to be waited for.

Few tokens, as in decoding, are two launches: each pair of token and expert reads its own factors.
From some tokens on pairs are sorted by expert, so that a tile of them reads an expert's factors
once; what they make of them is written by pair, and added up token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import cdiv, knobs, next_power_of_2

from mttl_adapters.kernels import pieces, programs

if TYPE_CHECKING:
    from mttl_adapters.bank import Bank
    from mttl_adapters.chosen import Chosen
    from mttl_adapters.scores import Keys

DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
MOST = 64  # largest k that is selected here
MOST_KEYS = 8192

# None of these numbers has been timed. Where each pair reads its own factors, an expert that two
# tokens chose is read twice; sorting, and writing the updates and reading them again, costs some 30
# microseconds, in which an H200 reads so many bytes.
FEW_BYTES = 1 << 27
PARTS = 4  # among which the features of a pair are divided there
# Updates of pairs that wait to be added up: no more than half of an H200's second-level cache.
UPDATES_BYTES = 24 << 20
NARROWEST = 256  # columns that they have at least
PRODUCTS_BYTES = 1 << 25  # of top_k, at a time


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels know these dtypes and strides."""
    return all(
        tensor.dtype in DTYPES
        and tensor.dim() == 2
        and (tensor.stride(1) == 1 or tensor.shape[1] <= 1)
        for tensor in tensors
    )


def apply(x: Tensor, bank: Bank, chosen: Chosen) -> Tensor:
    """Sum of the chosen experts for each token, (t, o), with gradients.

    They reach x, the weights of the chosen, and the factors where those want any.
    """
    chosen = chosen.each()
    wanted = bank.requires_grad or x.requires_grad or chosen.weights.requires_grad
    if torch.is_grad_enabled() and wanted:
        learned = (bank.a, bank.b) if bank.requires_grad else (None, None)
        return _Apply.apply(x, chosen.weights, *learned, bank, chosen.experts)  # type: ignore[no-any-return]
    dtype = torch.promote_types(x.dtype, bank.dtype)
    out = x.new_zeros((x.shape[0], bank.out_features), dtype=dtype)
    add_to(out, x, bank, chosen.experts, chosen.weights)
    return out


def add_to(out: Tensor, x: Tensor, bank: Bank, experts: Tensor, weights: Tensor) -> None:
    """Adds to ``out`` (t, o) in place what the chosen make of x (t, i), rounding each sum once."""
    pairs = experts.numel()
    if not pairs or not bank.widest:
        return
    own = bank.widest * (bank.in_features + bank.out_features) * bank.dtype.itemsize
    with torch.cuda.device(x.get_device()):
        if pairs * own <= FEW_BYTES:
            _add_few(out, x, bank, experts.contiguous(), weights)
            return
        call = _Call.of(bank, experts, x, out)
        hidden = call.down(x, 0, x.new_empty((pairs, bank.widest), dtype=call.real))
        call.up(out, hidden, weights.to(call.real).contiguous(), 1)


def _add_few(out: Tensor, x: Tensor, bank: Bank, experts: Tensor, weights: Tensor) -> None:
    real = _real(x, out, bank)
    (t, k), e, widest = experts.shape, len(bank), bank.widest
    i, o = bank.in_features, bank.out_features
    weights = weights.to(real).contiguous()
    hidden = x.new_empty((PARTS, t * k, widest), dtype=real)
    of_all: dict[str, Any] = {
        "ALIGNED": bank.aligned,
        "F": DTYPES[bank.dtype],
        "S": DTYPES[real],
        "N": 256,
        "R": min(16, next_power_of_2(widest)),
    }
    share = cdiv(cdiv(i, PARTS), of_all["N"]) * of_all["N"]
    programs.down_few[(t * k, PARTS)](
        x, x.stride(0), experts, bank.device_table, hidden, i, e, k, widest, share, **of_all
    )
    programs.up_few[(t, cdiv(o, of_all["N"]))](
        hidden, weights, experts, bank.device_table, out, out.stride(0), o, e, k, widest, t * k,
        **of_all, PARTS=PARTS,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Call:
    """Pairs sorted by expert, and how large the blocks of the programs are."""

    bank: Bank
    experts: Tensor
    order: Tensor
    offsets: Tensor
    real: torch.dtype
    product: torch.dtype
    tile: int
    common: dict[str, Any]

    @classmethod
    def of(cls, bank: Bank, experts: Tensor, x: Tensor, out: Tensor) -> _Call:
        """Of what a bank's experts (t, k) are to make of x."""
        pairs, e, experts = experts.numel(), len(bank), experts.contiguous()
        order = torch.empty(pairs, dtype=torch.int32, device=x.device)
        offsets = torch.empty(e + 1, dtype=torch.int32, device=x.device)
        programs.order_pairs[(e,)](experts, order, offsets, pairs, N=1024)
        real = _real(x, out, bank)
        product = torch.promote_types(x.dtype, bank.dtype)
        narrow = product.itemsize == 2 and not knobs.runtime.interpret  # no bfloat16 is there
        tile = min(64, max(16, next_power_of_2(pairs // max(1, e))))
        common = {
            "ALIGNED": bank.aligned,
            "F": DTYPES[bank.dtype],
            "C": DTYPES[product if narrow else real],
            "S": DTYPES[real],
            "E": next_power_of_2(e),
            "M": tile,
            "N": 128 if product.itemsize == 2 else 256 // product.itemsize,
            "R": min(256 // real.itemsize, max(16, next_power_of_2(bank.widest))),
        }
        return cls(bank, experts, order, offsets, real, product, tile, common)

    @property
    def _tiles(self) -> int:
        pairs = self.experts.numel()
        return min(pairs, pairs // self.tile + len(self.bank))

    @property
    def _blocks(self) -> int:
        return -(-self.bank.widest // int(self.common["R"]))

    def down(self, x: Tensor, side: int, hidden: Tensor) -> Tensor:
        """``hidden`` (pairs, widest), with what A (0) or B' (1) makes of x; rows of none stay."""
        programs.down[(self._tiles, self._blocks)](
            x, x.stride(0), self.order, self.offsets, self.bank.device_table, hidden,
            x.shape[1], len(self.bank), self.experts.shape[1], self.bank.widest,
            SIDE=side, **self.common,
        )  # fmt: skip
        return hidden

    def up(self, out: Tensor, hidden: Tensor, weights: Tensor, side: int) -> None:
        """Adds to ``out``, in place, what B (1) or A' (0) makes of hidden with weights."""
        (t, k), features, n = self.experts.shape, out.shape[1], self.common["N"]
        widest = max(NARROWEST, UPDATES_BYTES // (t * k * self.product.itemsize) // n * n)
        width = min(widest, features)
        updates = out.new_empty((t * k, width), dtype=self.product)
        for begin in range(0, features, width):
            programs.up[(self._tiles, cdiv(width, n))](
                hidden, weights, self.order, self.offsets, self.bank.device_table, updates,
                features, len(self.bank), self.bank.widest, begin, width,
                SIDE=side, **self.common,
            )  # fmt: skip
            programs.gather[(t, cdiv(width, 512))](
                updates, self.experts, out, out.stride(0), features, len(self.bank), k, begin,
                width, S=self.common["S"], N=512,
            )  # fmt: skip

    def outer(self, hidden: Tensor, weights: Tensor, x: Tensor, like: Tensor) -> Tensor:
        """Gradient of a stack of factors by rows, (R, features): weighted hidden' x an expert."""
        ranks = self.bank.device_table[:, 2]
        starts = ranks.cumsum(0) - ranks
        out = torch.zeros_like(like, memory_format=torch.contiguous_format)
        common = {name: self.common[name] for name in ("C", "S", "M", "N", "R")}
        programs.outer[(len(self.bank), cdiv(x.shape[1], common["N"]), self._blocks)](
            hidden, weights, x, x.stride(0), self.order, self.offsets, self.bank.device_table,
            starts, out, x.shape[1], self.experts.shape[1], self.bank.widest, **common,
        )  # fmt: skip
        return out


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
        hidden = None
        if experts.numel() and bank.widest:
            with torch.cuda.device(x.get_device()):
                call = _Call.of(bank, experts, x, out)
                hidden = x.new_zeros((experts.numel(), bank.widest), dtype=call.real)
                call.down(x, 0, hidden)
                call.up(out, hidden, weights.to(call.real).contiguous(), 1)
        ctx.save_for_backward(x, weights, experts, hidden, a, b)
        ctx.bank = bank
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, experts, hidden, a, b = ctx.saved_tensors
        bank, (to_x, to_weights) = ctx.bank, ctx.needs_input_grad[:2]
        from_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
        from_a, from_b = (None if part is None else torch.zeros_like(part) for part in (a, b))
        if hidden is None:
            return from_x, torch.zeros_like(weights), from_a, from_b, None, None
        grad = grad if takes(grad) else grad.contiguous()
        with torch.cuda.device(x.get_device()):
            call = _Call.of(bank, experts, grad, from_x)
            # Through the transposes: A and B change places, and B' grad comes in place of A x.
            back = call.down(grad, 1, torch.zeros_like(hidden))
            scaled = weights.to(call.real).contiguous()
            if to_x:
                call.up(from_x, back, scaled, 0)
            if a is not None:
                from_a = call.outer(back, scaled, x, a)
                from_b = call.outer(hidden, scaled, grad, b.T).T
        from_weights = None
        if to_weights:  # s_e <A_e x, B_e' grad>; pairs of none have zeros
            scalings = bank.device_table[:, 4].contiguous().view(torch.float64).to(call.real)
            known = torch.where((experts < 0) | (experts >= len(bank)), 0, experts)
            dots = (hidden * back).sum(1).view_as(weights)
            from_weights = (dots * scalings[known]).to(weights.dtype)
        return from_x if to_x else None, from_weights, from_a, from_b, None, None


def _real(x: Tensor, out: Tensor, bank: Bank) -> torch.dtype:
    """What sums are kept in."""
    wide = torch.float64 in (x.dtype, out.dtype, bank.dtype)
    return torch.float64 if wide else torch.float32


def has_screen() -> bool:
    """Whether :func:`top_k` is there."""
    return hasattr(torch.ops.aten.mm, "dtype")


def top_k(x: Tensor, keys: Keys, k: int, absolute: bool) -> list[tuple[Tensor, Tensor]]:
    """Signed values and indices, (t, k), of each set's largest, from products of float32."""
    t, split = x.shape[0], keys.split
    places = [min(k, size) for size in keys.sizes]
    values = [x.new_empty((t, some), dtype=torch.float32) for some in places]
    indices = [x.new_empty((t, some), dtype=torch.int64) for some in places]
    together = max(1, PRODUCTS_BYTES // (split.shape[0] * split.shape[1] * 4))
    for first in range(0, t, together):
        lines = slice(first, first + together)
        products = pieces.parts(x[lines], split)
        for part, value, index in zip(
            torch.split(products, list(keys.sizes), dim=3), values, indices, strict=True
        ):
            _select(part, absolute, value[lines], index[lines])
    return list(zip(values, indices, strict=True))


def select(scores: Tensor, k: int, absolute: bool) -> tuple[Tensor, Tensor]:
    """The k largest of each row of scores (t, e) float32: signed values and indices, (t, k)."""
    values = scores.new_empty((len(scores), k))
    indices = scores.new_empty((len(scores), k), dtype=torch.int64)
    _select(scores.contiguous().view(1, len(scores), 1, -1), absolute, values, indices)
    return values, indices


def _select(parts: Tensor, absolute: bool, values: Tensor, indices: Tensor) -> None:
    (m, t, n, e), k = parts.shape, values.shape[1]
    if not t or not k:
        return
    if e > MOST_KEYS:
        scores = parts.sum(dim=(0, 2))
        indices.copy_((scores.abs() if absolute else scores).topk(k, dim=1).indices)
        values.copy_(scores.gather(1, indices))
        return
    with torch.cuda.device(parts.get_device()):
        programs.select[(t,)](
            parts, parts.stride(0), parts.stride(2), parts.stride(1), e, k, values, indices,
            ABSOLUTE=absolute, OF_X=m, OF_KEYS=n, N=next_power_of_2(e), num_warps=2,
        )  # fmt: skip
