"""What one program of each Triton kernel does; ``triton.py`` beside this file launches them.

A pair is a token and one of its k choices, counted as ``token * k + place``. Of each expert a row
of the table tells where its factors lie: ``Bank.table``. Factors are masked by the expert's own
rank, so that of a narrow expert nothing is read in vain. What an expert's A makes of a token lies
at its pair, (pairs, widest rank), unweighted.

``F`` is the dtype of the factors, ``C`` that of products and ``S`` that of sums.
"""

import triton
import triton.language as tl


@triton.jit
def order_pairs(experts, order, offsets, pairs, N: tl.constexpr):
    """Expert e's pairs in order[offsets[e]:offsets[e + 1]], rising. One program an expert."""
    mine = tl.program_id(0)
    lanes = tl.arange(0, N)
    below = tl.zeros((N,), tl.int32)
    for start in range(0, pairs, N):
        expert = tl.load(experts + start + lanes, mask=start + lanes < pairs, other=-1)
        below += ((expert >= 0) & (expert < mine)).to(tl.int32)
    place = tl.sum(below, 0)
    tl.store(offsets + mine, place)
    for start in range(0, pairs, N):
        expert = tl.load(experts + start + lanes, mask=start + lanes < pairs, other=-1)
        own = expert == mine
        ahead = tl.cumsum(own.to(tl.int32), 0)
        tl.store(order + place + ahead - 1, start + lanes, mask=own)
        place += tl.sum(own.to(tl.int32), 0)
    if mine == tl.num_programs(0) - 1:
        tl.store(offsets + mine + 1, place)


@triton.jit
def _factors(table, expert, SIDE: tl.constexpr, F: tl.constexpr, ALIGNED: tl.constexpr):
    """Where an expert's A (0) or B by rows (1) begins."""
    factors = tl.load(table + 5 * expert + SIDE).to(tl.pointer_type(F), bitcast=True)
    return tl.multiple_of(factors, 16) if ALIGNED else factors


@triton.jit
def _scaling(table, expert, S: tl.constexpr):
    return tl.load(table + 5 * expert + 4).to(tl.float64, bitcast=True).to(S)


@triton.jit
def _tile(offsets, experts, M: tl.constexpr, E: tl.constexpr):
    """Expert and sorted pairs, from and to, of the tile that this program takes; none at the end.

    Tiles are of M pairs of one expert, so a launch has room for pairs / M and one an expert.
    """
    lanes = tl.arange(0, E)
    known = lanes < experts
    first = tl.load(offsets + lanes, mask=known, other=0)
    last = tl.load(offsets + lanes + 1, mask=known, other=0)
    tiles = (last - first + M - 1) // M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tl.program_id(0)).to(tl.int32), 0)
    nth = tl.program_id(0) - tl.sum(tl.where(lanes < expert, tiles, 0), 0)
    first = tl.load(offsets + expert, mask=expert < experts, other=0) + nth * M
    last = tl.load(offsets + expert + 1, mask=expert < experts, other=0)
    return expert, first, last


@triton.jit
def down(
    x, x_row, order, offsets, table, hidden,
    features, experts, k, widest,
    SIDE: tl.constexpr, ALIGNED: tl.constexpr, F: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A x of a tile's pairs, for R of the ranks. Programs (tiles, ranks / R)."""
    expert, first, last = _tile(offsets, experts, M, E)
    if expert < experts:
        rank = tl.load(table + 5 * expert + 2)
        row = tl.program_id(1) * R + tl.arange(0, R)
        if tl.program_id(1) * R < rank:
            place = first + tl.arange(0, M)
            pair = tl.load(order + place, mask=place < last, other=0)
            token = (pair // k).to(tl.int64)
            factors = _factors(table, expert, SIDE, F, ALIGNED)
            sums = tl.zeros((M, R), S)
            for start in range(0, features, N):
                column = start + tl.arange(0, N)
                given = tl.load(
                    x + token[:, None] * x_row + column[None, :],
                    mask=(place < last)[:, None] & (column < features)[None, :],
                    other=0.0,
                )
                factor = tl.load(
                    factors + row[None, :] * features + column[:, None],
                    mask=(row < rank)[None, :] & (column < features)[:, None],
                    other=0.0,
                )
                sums = tl.dot(given.to(C), factor.to(C), sums, input_precision="ieee", out_dtype=S)
            tl.store(
                hidden + pair.to(tl.int64)[:, None] * widest + row[None, :],
                sums,
                mask=(place < last)[:, None] & (row < widest)[None, :],
            )


@triton.jit
def up(
    hidden, weights, order, offsets, table, updates,
    features, experts, widest, begin, width,
    SIDE: tl.constexpr, ALIGNED: tl.constexpr, F: tl.constexpr, C: tl.constexpr, S: tl.constexpr,
    E: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Weighted updates of a tile's pairs, columns from ``begin`` on. Programs (tiles, width / N).

    ``updates`` is (pairs, width).
    """
    expert, first, last = _tile(offsets, experts, M, E)
    if expert < experts:
        rank = tl.load(table + 5 * expert + 2).to(tl.int32)
        place = first + tl.arange(0, M)
        live = place < last
        pair = tl.load(order + place, mask=live, other=0).to(tl.int64)
        weight = tl.load(weights + pair, mask=live, other=0.0) * _scaling(table, expert, S)
        factors = _factors(table, expert, SIDE, F, ALIGNED)
        local = tl.program_id(1) * N + tl.arange(0, N)
        inside = (local < width) & (begin + local < features)
        sums = tl.zeros((M, N), S)
        for start in range(0, rank, R):
            row = start + tl.arange(0, R)
            own = tl.load(
                hidden + pair[:, None] * widest + row[None, :],
                mask=live[:, None] & (row < rank)[None, :],
                other=0.0,
            )
            factor = tl.load(
                factors + row.to(tl.int64)[:, None] * features + begin + local[None, :],
                mask=(row < rank)[:, None] & inside[None, :],
                other=0.0,
            )
            own = own * weight[:, None]
            sums = tl.dot(own.to(C), factor.to(C), sums, input_precision="ieee", out_dtype=S)
        tl.store(
            updates + pair[:, None] * width + local[None, :],
            sums.to(updates.dtype.element_ty),
            mask=live[:, None] & inside[None, :],
        )


@triton.jit
def gather(
    updates, chosen, out, out_row,
    features, experts, k, begin, width,
    S: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A token's updates added to its output in turn, columns from ``begin`` on.

    Programs (tokens, width / N).
    """
    token = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1) * N + tl.arange(0, N)
    inside = (local < width) & (begin + local < features)
    place = out + token * out_row + begin + local
    sums = tl.load(place, mask=inside, other=0.0).to(S)
    for nth in range(0, k):
        pair = token * k + nth
        expert = tl.load(chosen + pair)
        if (expert >= 0) & (expert < experts):
            sums += tl.load(updates + pair * width + local, mask=inside, other=0.0).to(S)
    tl.store(place, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def outer(
    hidden, weights, x, x_row, order, offsets, table,
    starts, out, features, k, widest,
    C: tl.constexpr, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Weighted hidden' x over an expert's pairs: the gradient of a factor, at its rows of ``out``.

    Programs (experts, features / N, ranks / R).
    """
    expert = tl.program_id(0)
    rank = tl.load(table + 5 * expert + 2)
    column = tl.program_id(1) * N + tl.arange(0, N)
    row = tl.program_id(2) * R + tl.arange(0, R)
    scaling = _scaling(table, expert, S)
    last = tl.load(offsets + expert + 1)
    sums = tl.zeros((R, N), S)
    for start in range(tl.load(offsets + expert), last, M):
        place = start + tl.arange(0, M)
        live = place < last
        pair = tl.load(order + place, mask=live, other=0).to(tl.int64)
        weight = tl.load(weights + pair, mask=live, other=0.0) * scaling
        own = tl.load(
            hidden + pair[None, :] * widest + row[:, None],
            mask=live[None, :] & (row < rank)[:, None],
            other=0.0,
        )
        given = tl.load(
            x + (pair // k)[:, None] * x_row + column[None, :],
            mask=live[:, None] & (column < features)[None, :],
            other=0.0,
        )
        own = own * weight[None, :]
        sums = tl.dot(own.to(C), given.to(C), sums, input_precision="ieee", out_dtype=S)
    tl.store(
        out + (tl.load(starts + expert) + row)[:, None] * features + column[None, :],
        sums.to(out.dtype.element_ty),
        mask=(row < rank)[:, None] & (column < features)[None, :],
    )


@triton.jit
def down_few(
    x, x_row, chosen, table, hidden,
    features, experts, k, widest, share,
    ALIGNED: tl.constexpr, F: tl.constexpr, S: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A x of one pair over ``share`` of the features. Programs (pairs, parts).

    ``hidden`` is (parts, pairs, widest).
    """
    pair = tl.program_id(0).to(tl.int64)
    expert = tl.load(chosen + pair)
    if (expert >= 0) & (expert < experts):
        rank = tl.load(table + 5 * expert + 2).to(tl.int32)
        factors = _factors(table, expert, 0, F, ALIGNED)
        line = x + (pair // k) * x_row
        begin = tl.program_id(1) * share
        target = hidden + (tl.program_id(1) * tl.num_programs(0) + pair) * widest
        for first in range(0, rank, R):
            row = first + tl.arange(0, R)
            sums = tl.zeros((R, N), S)
            for start in range(begin, begin + share, N):
                column = start + tl.arange(0, N)
                given = tl.load(line + column, mask=column < features, other=0.0)
                factor = tl.load(
                    factors + row.to(tl.int64)[:, None] * features + column[None, :],
                    mask=(row < rank)[:, None] & (column < features)[None, :],
                    other=0.0,
                )
                sums += factor.to(S) * given.to(S)[None, :]
            tl.store(target + row, tl.sum(sums, 1), mask=row < rank)


@triton.jit
def up_few(
    hidden, weights, chosen, table, out, out_row,
    features, experts, k, widest, pairs,
    ALIGNED: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    N: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Columns of a token's output with all that its experts add. Programs (tokens, columns / N)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    part = tl.arange(0, PARTS)
    place = out + token * out_row + column
    sums = tl.load(place, mask=column < features, other=0.0).to(S)
    for nth in range(0, k):
        pair = token * k + nth
        expert = tl.load(chosen + pair)
        known = (expert >= 0) & (expert < experts)
        expert = tl.where(known, expert, 0)
        rank = tl.where(known, tl.load(table + 5 * expert + 2), 0).to(tl.int32)
        factors = _factors(table, expert, 1, F, ALIGNED)
        weight = tl.load(weights + pair) * _scaling(table, expert, S)
        for first in range(0, rank, R):
            row = first + tl.arange(0, R)
            own = tl.load(
                hidden + (part[:, None] * pairs + pair) * widest + row[None, :],
                mask=(row < rank)[None, :],
                other=0.0,
            )
            own = tl.sum(own, 0) * weight
            factor = tl.load(
                factors + row.to(tl.int64)[:, None] * features + column[None, :],
                mask=(row < rank)[:, None] & (column < features)[None, :],
                other=0.0,
            )
            sums += tl.sum(own[:, None] * factor.to(S), 0)
    tl.store(place, sums.to(out.dtype.element_ty), mask=column < features)


@triton.jit
def select(
    parts, x_step, key_step, row, keys, k, values, indices,
    ABSOLUTE: tl.constexpr, OF_X: tl.constexpr, OF_KEYS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The k largest of a token's scores and their places. One program a token.

    A score is the sum of its parts, the small ones first. Of equal scores the first place wins.
    """
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, N)
    inside = lane < keys
    scores = tl.zeros((N,), tl.float32)
    for of_both in tl.static_range(OF_X + OF_KEYS - 2, -1, -1):
        for of_x in tl.static_range(0, OF_X):
            if of_both - of_x >= 0 and of_both - of_x < OF_KEYS:
                place = parts + of_x * x_step + token * row + (of_both - of_x) * key_step
                scores += tl.load(place + lane, mask=inside, other=0.0)
    ranked = tl.abs(scores) if ABSOLUTE else scores
    ranked = tl.where(scores != scores, float("inf"), ranked)
    # What is outside or was taken is below all that there can be.
    ranked = tl.where(inside, tl.maximum(ranked, -3.4028234663852886e38), -float("inf"))
    for nth in range(0, k):
        best = tl.argmax(ranked, 0)
        tl.store(values + token * k + nth, tl.sum(tl.where(lane == best, scores, 0.0), 0))
        tl.store(indices + token * k + nth, best.to(tl.int64))
        ranked = tl.where(lane == best, -float("inf"), ranked)
