"""Merge methods as their papers have them: dense, in float64, one entry or matrix at a time."""

import hashlib
import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Given:
    """One expert in one module, for a slow version."""

    delta: Tensor
    weight: float
    a: Tensor
    b: Tensor  # with the scaling in it
    source: str = ""


def slow_sum(given: list[Given], scale: float = 1.0) -> Tensor:
    return scale * sum(g.delta * g.weight for g in given)


def slow_ties(given: list[Given], density: float = 0.2) -> Tensor:
    """Entry by entry."""
    trimmed = []
    for g in given:
        keep = max(1, round(density * g.delta.numel()))
        least = sorted(g.delta.abs().flatten().tolist(), reverse=True)[keep - 1]
        trimmed.append(g.delta * (g.delta.abs() >= least))
    return slow_agreement(trimmed, [g.weight for g in given])


def slow_agreement(deltas: list[Tensor], weights: list[float]) -> Tensor:
    out = torch.zeros_like(deltas[0])
    for place in itertools.product(*map(range, out.shape)):
        values = [(float(d[place]), w) for d, w in zip(deltas, weights, strict=True)]
        total = sum(v * w for v, w in values)
        agreeing = [(v, w) for v, w in values if v * total > 0]
        if agreeing:
            out[place] = sum(v * w for v, w in agreeing) / sum(w for _, w in agreeing)
    return out


def slow_draws(given: Given, seed: int = 0) -> Tensor:
    """Element by element, each from its own place in the stream."""
    key = hashlib.sha256(f"{seed}/{given.source}".encode()).digest()[:16]
    numbers = []
    for element in range(given.delta.numel()):
        stream = np.random.Philox(key=int.from_bytes(key, "little"))
        stream.advance(element // 8)  # a step is four words of 64 bits
        word = int(stream.random_raw(4)[element // 2 % 4])
        numbers.append((word >> 32 if element % 2 else word & 0xFFFFFFFF) / 2**32)
    return torch.tensor(numbers, dtype=torch.float64).reshape(given.delta.shape)


def slow_dropped(given: list[Given], density: float = 0.5) -> list[Tensor]:
    return [torch.where(slow_draws(g) < density, g.delta / density, 0.0) for g in given]


def slow_dare_linear(given: list[Given]) -> Tensor:
    dropped = slow_dropped(given)
    return 0.4 * sum(d * g.weight for d, g in zip(dropped, given, strict=True))


def slow_dare_ties(given: list[Given]) -> Tensor:
    dropped = slow_dropped(given)
    return slow_ties([replace(g, delta=d) for g, d in zip(given, dropped, strict=True)])


def slow_della(given: list[Given], density: float = 0.7, epsilon: float = 0.07) -> Tensor:
    thinned = []
    for g in given:
        draws, out = slow_draws(g), torch.zeros_like(g.delta)
        columns = g.delta.shape[1]
        for row, values in enumerate(g.delta.float().abs().tolist()):
            for rank, column in enumerate(sorted(range(columns), key=values.__getitem__)):
                chance = density - epsilon + 2 * epsilon * rank / (columns - 1)
                if draws[row, column] < chance:
                    out[row, column] = g.delta[row, column] / chance
        thinned.append(out)
    return slow_agreement(thinned, [g.weight for g in given])


def slow_breadcrumbs(given: list[Given], density: float = 0.15, gamma: float = 0.006) -> Tensor:
    """Place by place, from the largest entry down."""
    total = torch.zeros_like(given[0].delta)
    for g in given:
        places = list(itertools.product(*map(range, g.delta.shape)))
        places.sort(key=lambda place, delta=g.delta: -abs(float(delta[place])))
        outliers = round(gamma * len(places))
        for place in places[outliers : outliers + round(density * len(places))]:
            total[place] += g.weight * g.delta[place]
    return 0.4 * total


def slow_sparse_uniform(given: list[Given]) -> Tensor:
    stacked = torch.stack([g.delta for g in given])
    return stacked.sum(0) / (stacked != 0).sum(0).clamp(min=1)


def slow_linear_factors(given: list[Given]) -> Tensor:
    return sum(g.weight * g.b for g in given) @ sum(g.weight * g.a for g in given)


def slow_slerp(given: list[Given]) -> Tensor:
    if len(given) == 1:
        return given[0].weight * given[0].delta
    (one, other), t = (g.delta / g.delta.norm() for g in given), given[1].weight
    angle = torch.arccos((one * other).sum())
    direction = (((1 - t) * angle).sin() * one + (t * angle).sin() * other) / angle.sin()
    return direction * sum(g.weight * g.delta.norm() for g in given)


def slow_multislerp(given: list[Given]) -> Tensor:
    """By what it is: the least sum of squared distances along the sphere, found by L-BFGS."""
    if len(given) == 1:
        return given[0].weight * given[0].delta
    points = torch.stack([g.delta.flatten() / g.delta.norm() for g in given])
    shares = torch.tensor([g.weight for g in given], dtype=torch.float64)
    place = points.mean(0).clone().requires_grad_()
    search = torch.optim.LBFGS(
        [place],
        max_iter=500,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        search.zero_grad()
        found: Tensor = (shares * torch.arccos(points @ place / place.norm()).square()).sum()
        found.backward()
        return found

    search.step(loss)
    length = sum(g.weight * g.delta.norm() for g in given)
    return (place / place.norm() * length).detach().reshape(given[0].delta.shape)


def slow_rank(sigma: Tensor) -> int:
    return int((sigma > 1e-5 * sigma[0]).sum())


def slow_orthonormal(columns: Tensor) -> Tensor:
    p, sigma, qh = torch.linalg.svd(columns, full_matrices=False)
    return p[:, : slow_rank(sigma)] @ qh[: slow_rank(sigma)]


def slow_tsv(given: list[Given]) -> Tensor:
    share = max(1, min(given[0].delta.shape) // len(given))
    lefts, sigmas, rights = [], [], []
    for g in given:
        u, sigma, vh = torch.linalg.svd(g.delta, full_matrices=False)
        k = min(share, slow_rank(sigma))
        lefts, sigmas = [*lefts, u[:, :k]], [*sigmas, g.weight * sigma[:k]]
        rights.append(vh[:k].T)
    u, v = slow_orthonormal(torch.cat(lefts, 1)), slow_orthonormal(torch.cat(rights, 1))
    return u @ torch.cat(sigmas).diag() @ v.T


def slow_iso(given: list[Given]) -> Tensor:
    u, sigma, vh = torch.linalg.svd(slow_sum(given), full_matrices=False)
    rank = slow_rank(sigma)
    return u[:, :rank] @ vh[:rank] * sigma[:rank].mean()


def slow_iso_cts(given: list[Given], common: float = 0.8) -> Tensor:
    u, sigma, vh = torch.linalg.svd(slow_sum(given), full_matrices=False)
    rank = slow_rank(sigma)
    each = round((rank - int(common * rank)) / len(given))
    first = rank - each * len(given)
    u, sigma, vh = u[:, :first], sigma[:first], vh[:first]
    lefts, sigmas, rights = [u], [sigma], [vh.T]
    outside = torch.eye(len(u)) - u @ u.T
    for g in given:
        own = torch.linalg.svd(outside @ (g.weight * g.delta), full_matrices=False)
        lefts, sigmas = [*lefts, own.U[:, :each]], [*sigmas, own.S[:each]]
        rights.append(own.Vh[:each].T)
    u, v = slow_orthonormal(torch.cat(lefts, 1)), slow_orthonormal(torch.cat(rights, 1))
    return u @ v.T * torch.cat(sigmas).mean()


def slow_core_tsv(given: list[Given]) -> Tensor:
    """On the cores, as the paper has it."""
    u = torch.linalg.svd(torch.cat([g.b for g in given], 1), full_matrices=False).U
    v = torch.linalg.svd(torch.cat([g.a for g in given]).T, full_matrices=False).U
    cores = [replace(g, delta=u.T @ g.delta @ v) for g in given]
    return u @ slow_tsv(cores) @ v.T


def slow_knots(given: list[Given]) -> Tensor:
    """From the singular value decomposition of all ΔW beside each other."""
    u, sigma, vh = torch.linalg.svd(torch.cat([g.delta for g in given], 1), full_matrices=False)
    rank = slow_rank(sigma)
    parts = (sigma[:rank, None] * vh[:rank]).split(given[0].delta.shape[1], dim=1)
    return u[:, :rank] @ slow_ties([replace(g, delta=d) for g, d in zip(given, parts, strict=True)])


def slow_compress_then_merge(given: list[Given]) -> Tensor:
    """On ΔW itself, by an unfolding and its singular value decomposition for every step."""
    rank = max(g.a.shape[0] for g in given)
    mean = sum(g.delta.norm() for g in given) / len(given)
    stack = torch.stack([g.delta * mean / g.delta.norm() for g in given])

    def leading(matrices: Tensor) -> Tensor:
        flat = matrices.transpose(0, 1).flatten(1)
        return torch.linalg.svd(flat, full_matrices=False).U[:, :rank]

    u, v, errors = leading(stack), leading(stack.mT), []
    for _ in range(1000):
        u = leading(stack @ v)
        v = leading(stack.mT @ u)
        kept = (u.T @ stack @ v).square().sum() / stack.square().sum()
        errors.append(float((1 - kept).clamp(min=0).sqrt()))
        if len(errors) > 1 and abs(errors[-2] - errors[-1]) < 1e-6:
            break
    return u @ slow_ties([replace(g, delta=u.T @ g.delta @ v) for g in given]) @ v.T


def slow_pico(given: list[Given]) -> Tensor:
    u, sigma, _ = torch.linalg.svd(torch.cat([g.b for g in given], 1), full_matrices=False)
    damping = 1 / (1 + (len(given) - 1) * sigma**2 / (sigma**2).sum())
    outside = torch.eye(len(u)) - u @ u.T
    merged = slow_sum([replace(g, delta=(outside + u * damping @ u.T) @ g.delta) for g in given])
    return merged * sum(g.delta.norm() for g in given) / len(given) / merged.norm()


def slow_wudi(given: list[Given]) -> Tensor:
    """By autograd on the loss as it is written."""
    deltas = torch.stack([g.delta for g in given])
    merged = deltas.sum(0).float().clone().requires_grad_()
    optimizer = torch.optim.Adam([merged], lr=1e-5)
    for _ in range(300):
        products = (merged.double() - deltas) @ deltas.mT
        loss = (products.square().sum((1, 2)) / deltas.square().sum((1, 2))).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return merged.detach().double()
