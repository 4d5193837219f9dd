"""Every merge method against a slow dense version in float64, and against the laws that it has."""

import copy
import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given as each
from hypothesis import settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.utils.merge_utils import ties as peft_ties
from torch import Tensor

from mttl_experts import Expert, ExpertInfo, lora_modules
from mttl_routing import MERGES, merge
from mttl_routing.merges.breadcrumbs import mask
from mttl_routing.merges.della import chances
from mttl_routing.merges.rule import LowRank, Update
from mttl_routing.merges.spaces import core
from mttl_routing.merges.spherical import average_point

WHOLE = {"scale": 1.0}
"""Without a factor λ, under which no merge of one could be itself."""

UNTHINNED = {"density": 1.0, "ties_density": 1.0}

# What a merge of one, or of equals, is; how it goes with the experts' size; and whether the way in
# which ΔW is split into A and B counts. Options under which a law holds, or why it does not.
ONE, EQUAL, SIZE, SPLIT = "one", "equal", "size", "split"
NO_WEIGHT = "its weights are the caller's"
DIGEST = "its draws are keyed by the digest, which is another for other bytes"
SUM = "it is a sum, so n equal experts give n times that expert"


@dataclass(frozen=True)
class Given:
    """One expert in one module, for a slow version."""

    delta: Tensor
    weight: float
    a: Tensor
    b: Tensor  # with the scaling in it
    source: str = ""


@dataclass(frozen=True)
class Case:
    """One method: its slow version and its laws."""

    slow: Callable[..., Tensor]
    laws: Mapping[str, Mapping[str, Any] | str]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[int], list[float]] | None = None
    n_experts: int = 4
    tolerance: float = 1e-5


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


def uneven(n: int) -> list[float]:
    return [0.5 + 0.25 * position for position in range(n)]


CASES: dict[str, Case] = {
    "uniform": Case(slow_sum, {ONE: {}, EQUAL: {}, SIZE: {}, SPLIT: {}}),
    "weighted": Case(
        slow_sum, {ONE: NO_WEIGHT, EQUAL: NO_WEIGHT, SIZE: {}, SPLIT: {}}, weights=uneven
    ),
    "task_arithmetic": Case(
        lambda given: slow_sum(given, 0.4), {ONE: WHOLE, EQUAL: SUM, SIZE: {}, SPLIT: {}}
    ),
    "ties": Case(slow_ties, {ONE: {"density": 1.0}, EQUAL: {"density": 1.0}, SIZE: {}, SPLIT: {}}),
    "dare_linear": Case(
        slow_dare_linear,
        {ONE: {"density": 1.0} | WHOLE, EQUAL: SUM, SIZE: DIGEST, SPLIT: DIGEST},
    ),
    "dare_ties": Case(
        slow_dare_ties,
        # Equal experts are thinned alike, as they have one digest, and so do not become themselves.
        {ONE: UNTHINNED, EQUAL: UNTHINNED, SIZE: DIGEST, SPLIT: DIGEST},
    ),
    "della": Case(
        slow_della,
        {ONE: {"density": 1.0, "epsilon": 0.0}, EQUAL: {"density": 1.0, "epsilon": 0.0}}
        | {SIZE: DIGEST, SPLIT: DIGEST},
    ),
    "breadcrumbs": Case(
        slow_breadcrumbs,
        {ONE: WHOLE | {"density": 1.0, "gamma": 0.0}, EQUAL: SUM, SIZE: {}, SPLIT: {}},
    ),
    "sparse_uniform": Case(slow_sparse_uniform, {ONE: {}, EQUAL: {}, SIZE: {}, SPLIT: {}}),
    "linear_factors": Case(
        slow_linear_factors,
        {ONE: {}, EQUAL: {}, SIZE: {}, SPLIT: "it adds A and B apart"},
    ),
    "slerp": Case(
        slow_slerp,
        {ONE: "it takes two", EQUAL: {}, SIZE: {}, SPLIT: {}},
        n_experts=2,
    ),
    "multislerp": Case(slow_multislerp, {ONE: {}, EQUAL: {}, SIZE: {}, SPLIT: {}}),
    "tsv": Case(slow_tsv, {ONE: {}, EQUAL: {}, SIZE: {}, SPLIT: {}}),
    "iso": Case(
        slow_iso,
        {ONE: "it levels the singular values", EQUAL: "it levels the singular values"}
        | {SIZE: {}, SPLIT: {}},
    ),
    "iso_cts": Case(
        slow_iso_cts,
        {ONE: "it levels the singular values", EQUAL: "it levels the singular values"}
        | {SIZE: {}, SPLIT: {}},
    ),
    "core": Case(slow_core_tsv, {ONE: {}, EQUAL: {}, SIZE: {}, SPLIT: {}}),
    "knots": Case(
        slow_knots, {ONE: {"density": 1.0}, EQUAL: {"density": 1.0}, SIZE: {}, SPLIT: {}}
    ),
    "compress_then_merge": Case(
        slow_compress_then_merge,
        {ONE: {"density": 1.0}, EQUAL: {"density": 1.0}, SIZE: {}, SPLIT: {}},
    ),
    "pico": Case(
        slow_pico,
        {ONE: {}, EQUAL: "it damps what they share, which is all of each"}
        | {SIZE: {}, SPLIT: "it goes by B, and not by the update"},
    ),
    "wudi": Case(
        slow_wudi,
        {ONE: {}, EQUAL: "it starts from their sum and stops before it has come down to one"}
        | {SIZE: "Adam's steps have a length of their own", SPLIT: {}},
        tolerance=2e-5,
    ),
}

METHODS = sorted(CASES)


def deltas_of(expert: Expert) -> dict[str, Tensor]:
    """ΔW by module, in float64."""
    factors = lora_modules(expert)
    return {module: f.scaling * f.b.double() @ f.a.double() for module, f in factors.items()}


def default_weight(method: str, n: int) -> float:
    weight = MERGES[method].default_weight
    return 1.0 if weight is None else weight(n)


def slow_merge(experts: list[Expert], method: str) -> dict[str, Tensor]:
    case, n = CASES[method], len(experts)
    weights = case.weights(n) if case.weights else [default_weight(method, n)] * n
    by_digest = sorted(zip((e.digest for e in experts), experts, weights, strict=True), key=first)
    modules = sorted(set().union(*(lora_modules(e) for e in experts)))
    merged = {}
    for module in modules:
        given = []
        for digest, expert, weight in by_digest:
            f = lora_modules(expert).get(module)
            if f is not None:
                a, b = f.a.double(), f.b.double() * f.scaling
                given.append(Given(b @ a, weight, a, b, f"{digest}/{module}"))
        merged[module] = case.slow(given)
    return merged


def first(entry: tuple[Any, ...]) -> Any:
    return entry[0]


def do_merge(experts: list[Expert], method: str, **options: Any) -> Expert:
    case = CASES[method]
    weights = case.weights(len(experts)) if case.weights else None
    return merge(experts, method, weights=weights, **{**case.options, **options})


@pytest.fixture
def patterned(make_expert) -> list[Expert]:
    """Of one rank, as some methods need, and unlike in scaling, patterns and modules."""
    return [
        make_expert("ada"),
        make_expert("ben", alpha=5, rslora=True, targets=("q_proj", "down_proj")),
        make_expert("cyd", alpha_pattern={"v_proj": 3}),
        make_expert("dan", layers=(1,), targets=("v_proj", "up_proj")),
    ]


@pytest.fixture
def some(make_expert, mixed_experts, patterned) -> Callable[[str], list[Expert]]:
    def choose(method: str) -> list[Expert]:
        experts = patterned if method == "linear_factors" else mixed_experts
        return experts[: CASES[method].n_experts]

    return choose


def law(name: str) -> Any:
    """Runs a test for each method that has the law, with the options under which it has it."""
    having = [(m, c.laws[name]) for m, c in sorted(CASES.items())]
    rows = [(m, dict(options)) for m, options in having if not isinstance(options, str)]
    return pytest.mark.parametrize(("method", "options"), rows, ids=[m for m, _ in rows])


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        size = float(delta.abs().max()) or 1.0
        error = float((found[module] - delta).abs().max())
        assert error <= tolerance * max(1.0, size), f"{module}: {error} of {size}"


def test_every_method_has_a_case_and_says_of_every_law_whether_and_why():
    assert CASES.keys() == MERGES.keys()
    for method, case in CASES.items():
        assert case.laws.keys() == {ONE, EQUAL, SIZE, SPLIT}, method
        assert all(options != "" for options in case.laws.values()), method


@pytest.mark.parametrize("method", METHODS)
def test_a_slow_dense_version_agrees(some, method):
    experts = some(method)
    same(deltas_of(do_merge(experts, method)), slow_merge(experts, method), CASES[method].tolerance)


@law(ONE)
def test_a_merge_of_one_is_itself(make_expert, method, options):
    expert = make_expert("one", rslora=True, alpha_pattern={"q_proj": 5})
    same(deltas_of(do_merge([expert], method, **options)), deltas_of(expert), 1e-5)


@law(EQUAL)
def test_equal_experts_give_that_expert(make_expert, method, options):
    expert = make_expert("same")
    experts = [expert] * (2 if CASES[method].n_experts == 2 else 3)
    same(deltas_of(do_merge(experts, method, **options)), deltas_of(expert), 1e-5)


def scaled(expert: Expert, factor: float) -> Expert:
    return Expert(
        expert.expert_info,
        {k: v * factor if "lora_B" in k else v for k, v in expert.expert_weights.items()},
    )


@law(SIZE)
def test_twice_the_experts_give_twice_the_merge(some, method, options):
    experts = some(method)
    # Twice keeps every digit, so that nothing is decided otherwise because of rounding.
    one = deltas_of(do_merge(experts, method, **options))
    two = deltas_of(do_merge([scaled(e, 2.0) for e in experts], method, **options))
    same(two, {module: 2 * delta for module, delta in one.items()}, CASES[method].tolerance)


def split_otherwise(expert: Expert) -> Expert:
    """The same ΔW as another B and A."""
    weights = {}
    for key, a in expert.expert_weights.items():
        if "lora_A" in key:
            other = key.replace("lora_A", "lora_B")
            generator = torch.Generator().manual_seed(len(key))
            mix = torch.randn(a.shape[0], a.shape[0], generator=generator).double()
            mix = torch.linalg.qr(mix).Q * torch.linspace(0.5, 2.0, a.shape[0])
            weights[key] = (mix @ a.double()).float()
            b = expert.expert_weights[other].double()
            weights[other] = (b @ torch.linalg.inv(mix)).float()
    return Expert(expert.expert_info, weights)


@law(SPLIT)
def test_how_an_update_is_split_into_its_factors_does_not_matter(make_expert, method, options):
    n = CASES[method].n_experts
    experts = [make_expert(f"e{k}", rank=3) for k in range(n)]
    one = deltas_of(do_merge(experts, method, **options))
    weights = uneven(n) if CASES[method].weights else None
    other = deltas_of(
        merge(
            [split_otherwise(e) for e in experts],
            method,
            weights=weights,
            **{**CASES[method].options, **options},
        )
    )
    same(other, one, 1e-4)


def sha(expert: Expert) -> str:
    return hashlib.sha256(expert.files()["adapter_model.safetensors"]).hexdigest()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [None, 3])
def test_the_bytes_are_the_same_on_two_runs_and_on_shuffled_input(some, method, rank):
    experts = some(method)
    n = len(experts)
    weights = CASES[method].weights(n) if CASES[method].weights else None
    found = set()
    for order in [list(range(n)), list(range(n)), list(range(n))[::-1], [*range(1, n), 0]]:
        found.add(
            sha(
                merge(
                    [copy.deepcopy(experts[k]) for k in order],
                    method,
                    weights=weights and [weights[k] for k in order],
                    rank=rank,
                    **CASES[method].options,
                )
            )
        )
    assert len(found) == 1


@pytest.fixture(scope="module")
def larger() -> list[Expert]:
    """Of a module that is large enough for products of matrices to be shared among threads.

    They have a part in common, so that what goes on until it changes no more is soon there.
    """
    generator, experts = torch.Generator().manual_seed(0), []
    common = [torch.randn(size, generator=generator) for size in ((8, 256), (192, 8))]
    for n in range(4):
        a, b = (part + 0.7 * torch.randn(part.shape, generator=generator) for part in common)
        key = "base_model.model.up_proj.lora_{}.weight"
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["up_proj"]}
        info = ExpertInfo(f"e{n}", expert_config=config, expert_model="m")
        experts.append(Expert(info, {key.format("A"): a, key.format("B"): b}))
    return experts


@pytest.mark.parametrize("method", METHODS)
def test_one_thread_and_two_agree_within_the_stated_tolerance(larger, method):
    experts, before = larger[: CASES[method].n_experts], torch.get_num_threads()
    options = {"steps": 20} if method == "wudi" else {}  # threads wait for each other in each
    merged = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            merged.append(deltas_of(do_merge(experts, method, **options))["up_proj"])
    finally:
        torch.set_num_threads(before)
    one, two = merged
    assert float((one - two).norm()) <= 1e-5 * float(one.norm())


@pytest.mark.parametrize("method", METHODS)
def test_experts_of_bfloat16_are_merged_in_float32(some, method):
    experts = [
        replace(e, expert_weights={k: v.bfloat16() for k, v in e.expert_weights.items()})
        for e in some(method)
    ]
    merged = do_merge(experts, method)
    assert {w.dtype for w in merged.expert_weights.values()} == {torch.float32}
    same(deltas_of(merged), slow_merge(experts, method), CASES[method].tolerance)


@pytest.mark.parametrize("method", METHODS)
def test_experts_without_any_update_give_none(make_expert, method):
    n = CASES[method].n_experts
    blank = [scaled(make_expert(f"z{k}"), 0.0) for k in range(n)]
    for delta in deltas_of(do_merge(blank, method)).values():
        assert float(delta.abs().max()) == 0.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("config", [{"use_dora": True}, {"bias": "all"}, {"lora_bias": True}])
def test_dora_and_bias_are_refused_by_name(make_expert, method, config):
    n = CASES[method].n_experts
    experts = [make_expert("more", **config), *(make_expert(f"e{k}") for k in range(n - 1))]
    word = "DoRA" if "use_dora" in config else "bias"
    with pytest.raises(ValueError, match=word):
        do_merge(experts, method)


@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_every_merge_also_of_patterns_as_issue_3737_has_them(
    base, tokens, some, tmp_path, method
):
    merged = do_merge(some(method), method)
    for name, content in merged.files().items():
        (tmp_path / name).write_bytes(content)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for module, delta in deltas_of(merged).items():
            dense.get_submodule(module).weight += delta.float()
        torch.testing.assert_close(peft(tokens).logits, dense(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("density", [0.125, 0.5, 1.0])
def test_ties_is_that_of_peft_on_small_and_zero_heavy_updates(make_expert, zeros, density):
    """PEFT's rule on ΔW, where it agrees with the paper: equal weights, no entry of sum zero."""
    experts = [make_expert(f"e{n}", layers=(0,), rank=2, size=1.0) for n in range(5)]
    for n, expert in enumerate(experts):
        for key, value in expert.expert_weights.items():
            if "lora_B" in key:
                generator = torch.Generator().manual_seed(n)
                value[torch.rand(len(value), generator=generator) < zeros] = 0.0
            if "lora_A" in key:
                value[:, 5:] *= float(zeros < 0.9)
    found = deltas_of(merge(experts, "ties", density=density))
    for module, delta in found.items():
        updates = [deltas_of(expert)[module].float() for expert in experts]
        expected = peft_ties(updates, torch.ones(5), density, "total")
        torch.testing.assert_close(delta.float(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ties", "depth": 1}, "'ties' takes no depth, got depth=1; it takes density"),
        ({"method": "uniform", "scale": float("nan")}, "scale is nan"),
        ({"method": "uniform", "scale": True}, "scale is True"),
        ({"method": "dare_ties", "seed": 0.5}, "seed is 0.5"),
        ({"method": "dare_linear", "density": 1.5}, "density is 1.5"),
        ({"method": "della", "epsilon": 0.5}, "epsilon is 0.5 with density 0.7"),
        ({"method": "breadcrumbs", "gamma": 0.9}, "gamma is 0.9 with density 0.15; both are"),
        ({"method": "dare_ties", "ties_density": 0.0}, "ties_density is 0.0"),
        ({"method": "iso_cts", "common": 1.5}, "common is 1.5"),
        ({"method": "slerp", "weights": [1, -1]}, "'slerp' takes weights from zero up"),
        ({"method": "multislerp", "weights": [0, 0]}, "'multislerp' takes weights from zero up"),
        (
            {"method": "core", "inside": "della"},
            "'core' takes inside='tsv', 'iso', .*got 'della'",
        ),
        ({"method": "core", "density": 0.5}, "'core' with 'tsv' inside takes no density"),
        ({"method": "ties", "inside": "tsv"}, "'ties' takes no inside"),
        ({"method": "compress_then_merge", "beta": 2.0}, "beta is 2.0"),
        ({"method": "wudi", "steps": 1.5}, "steps is 1.5"),
        ({"method": "wudi", "learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"method": "dare_ties", "weights": [1, -1]}, "dare_ties takes weights above zero"),
    ],
)
def test_bad_options_get_one_clear_line(make_expert, arguments, message):
    with pytest.raises(ValueError, match=message):
        merge([make_expert("e1"), make_expert("e2")], **arguments)


def test_scale_multiplies_the_result_and_is_kept_in_the_recipe(make_expert):
    experts = [make_expert("e1"), make_expert("e2")]
    one = merge(experts, "task_arithmetic", scale=1.0)
    other = merge(experts, "task_arithmetic")
    same(deltas_of(other), {m: 0.4 * d for m, d in deltas_of(one).items()}, 1e-6)
    assert other.expert_info.training_config["scale"] == 0.4
    assert one.expert_info.recipe_digest != other.expert_info.recipe_digest


def test_draws_do_not_depend_on_the_other_experts_or_modules(make_expert):
    """Each expert's part in a sum is what it is alone."""
    experts = [make_expert("e1"), make_expert("e2", targets=("q_proj", "up_proj"))]
    apart = [deltas_of(merge([e], "dare_linear", seed=7)) for e in experts]
    both = deltas_of(merge(experts, "dare_linear", seed=7))
    expected = {m: sum(d[m] for d in apart if m in d) for m in both}
    same(both, expected, 1e-5)


def test_another_seed_draws_otherwise_and_a_method_without_draws_leaves_it_out(make_expert):
    experts = [make_expert("e1"), make_expert("e2")]
    digests = {merge(experts, "dare_ties", seed=seed).digest for seed in (0, 1, -5, 2**70)}
    assert len(digests) == 4
    one, other = merge(experts, "ties"), merge(experts, "ties", seed=1)
    assert one.expert_info.recipe_digest == other.expert_info.recipe_digest


def test_the_share_asked_for_is_kept_and_the_mean_stays(make_expert):
    """Over the draws: 32·32 entries, 4 standard deviations."""
    expert = make_expert("e1", layers=(0,), targets=("q_proj",))
    (delta,) = deltas_of(expert).values()
    merged = merge([expert], "dare_ties", density=0.25, ties_density=1.0)
    (found,) = deltas_of(merged).values()
    stayed = found != 0
    assert abs(float(stayed.double().mean()) - 0.25) < 4 * (0.25 * 0.75 / 1024) ** 0.5
    torch.testing.assert_close(found[stayed], delta[stayed] * 4, rtol=1e-5, atol=1e-6)


def test_a_larger_entry_stays_more_often():
    delta = torch.tensor([[0.1, -0.4, 0.0, 0.3], [1.0, 1.0, -1.0, 1.0]])
    expected = torch.tensor([[0.6333, 0.9, 0.5, 0.7667], [0.5, 0.6333, 0.7667, 0.9]])
    torch.testing.assert_close(chances(delta, 0.7, 0.2), expected, rtol=1e-4, atol=1e-4)


def test_an_entry_is_the_mean_of_those_that_change_it(make_expert):
    one, other = make_expert("one", layers=(0,)), make_expert("other", layers=(0,))
    for expert, rows in ((one, slice(0, 8)), (other, slice(4, 16))):
        for key, value in expert.expert_weights.items():
            if "lora_B" in key:
                value[rows] = 0.0
    module = "model.layers.0.self_attn.q_proj"
    found = deltas_of(merge([one, other], "sparse_uniform"))[module]
    first, second = deltas_of(one)[module], deltas_of(other)[module]
    torch.testing.assert_close(found[:4], second[:4], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[8:16], first[8:16], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[16:], (first + second)[16:] / 2, rtol=1e-5, atol=1e-6)


def test_a_method_for_two_says_so(make_expert):
    with pytest.raises(ValueError, match="'slerp' takes 2 experts, got 3; 'multislerp'"):
        merge([make_expert(f"e{n}") for n in range(3)], "slerp")


def test_factors_apart_need_one_rank(make_expert):
    with pytest.raises(ValueError, match=r"equal ranks; there are \[2, 4\] in module.*q_proj"):
        merge([make_expert("e1"), make_expert("e2", rank=2)], "linear_factors")


def test_factors_apart_are_not_the_mean(make_expert):
    experts = [make_expert(f"e{n}") for n in range(4)]
    found, mean = deltas_of(merge(experts, "linear_factors")), deltas_of(merge(experts))
    assert all(float((found[m] - mean[m]).norm() / mean[m].norm()) > 0.5 for m in mean)


def test_slerp_goes_from_one_expert_to_the_other_and_so_does_its_length(make_expert):
    one, other = (make_expert(f"e{n}", layers=(0,), targets=("q_proj",)) for n in range(2))
    (first,), (second,) = deltas_of(one).values(), deltas_of(other).values()
    for weights, expected in (([1, 0], one), ([0, 2], other)):
        same(deltas_of(merge([one, other], "slerp", weights=weights)), deltas_of(expected), 1e-5)
    (between,) = deltas_of(merge([one, other], "slerp", weights=[3, 1])).values()
    length = 0.75 * float(first.norm()) + 0.25 * float(second.norm())
    assert float(between.norm()) == pytest.approx(length, rel=1e-5)

    def angle(a: Tensor, b: Tensor) -> float:
        return float(torch.arccos((a * b).sum() / a.norm() / b.norm()))

    assert angle(first, between) == pytest.approx(angle(first, second) / 4, rel=1e-5)
    assert angle(between, second) == pytest.approx(angle(first, second) * 3 / 4, rel=1e-5)


@pytest.mark.parametrize("method", ["slerp", "multislerp"])
def test_between_updates_of_one_direction_the_weighted_mean_is_the_limit(make_expert, method):
    expert = make_expert("e")
    for near in (0.0, 1e-6, 1e-3):
        aside = {
            key: value + near * (value.flip(0) if "lora_B" in key else 0.0)
            for key, value in expert.expert_weights.items()
        }
        other = scaled(Expert(expert.expert_info, aside), 3.0)
        found = deltas_of(merge([expert, other], method, weights=[1, 3]))
        mean = deltas_of(merge([expert, other], "weighted", weights=[0.25, 0.75]))
        same(found, mean, 1e-6 + near)


def test_the_spherical_average_of_two_is_slerp(mixed_experts):
    for weights in ([1, 1], [5, 1], [0, 1]):
        two = [merge(mixed_experts[:2], m, weights=weights) for m in ("slerp", "multislerp")]
        same(*map(deltas_of, two), 1e-5)


@settings(max_examples=20, deadline=None)
@each(sizes=st.lists(st.floats(0.1, 10.0), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_the_pulls_towards_the_directions_cancel_at_their_average(sizes, seed):
    """The one critical point that Buss and Fillmore's theorem 1 proves, in vectors of any size."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(len(sizes), 7, generator=generator, dtype=torch.float64)  # one orthant
    points = points / points.norm(dim=1, keepdim=True)
    shares = torch.tensor(sizes, dtype=torch.float64)
    shares = shares / shares.sum()
    average = average_point(points @ points.T, shares) @ points
    assert float(average.norm()) == pytest.approx(1.0, abs=1e-9)
    cosines = points @ average
    angles = torch.arccos(cosines.clamp(max=1.0))
    pulls = (points - cosines[:, None] * average) * (angles / angles.sin())[:, None]
    assert float((shares @ pulls.nan_to_num()).norm()) < 1e-7


def test_a_direction_counts_once_however_long_its_update(make_expert):
    """The lengths, and they alone, go into the length of the result."""
    experts = [make_expert(f"e{n}", layers=(0,), targets=("q_proj",)) for n in range(3)]
    (one,) = deltas_of(merge(experts, "multislerp")).values()
    (other,) = deltas_of(merge([scaled(experts[0], 4.0), *experts[1:]], "multislerp")).values()
    torch.testing.assert_close(one / one.norm(), other / other.norm(), rtol=1e-5, atol=1e-6)
    lengths = [float(d.norm()) for e in experts for d in deltas_of(e).values()]
    assert float(other.norm() - one.norm()) == pytest.approx(lengths[0], rel=1e-4)


@pytest.mark.parametrize("method", ["slerp", "multislerp"])
def test_opposites_are_refused_with_their_module(make_expert, method):
    expert = make_expert("e")
    with pytest.raises(ValueError, match="(are opposite|cancel out) in module '.*_proj'"):
        merge([expert, scaled(expert, -1.0)], method)


def test_directions_that_cancel_out_are_refused_with_their_module(make_expert):
    one, two = make_expert("one"), make_expert("two")
    experts = [one, scaled(one, -1.0), two, scaled(two, -1.0)]
    with pytest.raises(ValueError, match="cancel out in module '.*_proj'; give other weights"):
        merge(experts, "multislerp")


def test_weights_on_a_sphere_are_shares(make_expert):
    experts = [make_expert(f"e{n}") for n in range(3)]
    one, two = (merge(experts, "multislerp", weights=w) for w in ([1, 2, 1], [2, 4, 2]))
    assert one.digest == two.digest


def test_breadcrumbs_keeps_the_middle_and_all_of_equals():
    def masked(delta: Tensor, density: float, gamma: float) -> Tensor:
        found = delta.clone()
        mask(found.numpy(), density, gamma)
        return found

    delta = torch.tensor([[9.0, -8.0, 7.0, 6.0, -5.0], [4.0, 3.0, -2.0, 1.0, 0.0]])
    expected = torch.tensor([[0.0, -8.0, 7.0, 6.0, 0.0], [0.0] * 5])
    assert torch.equal(masked(delta, 0.3, 0.1), expected)
    assert torch.equal(masked(delta, 0.9, 0.1), delta.where(delta != 9.0, 0.0))
    assert torch.equal(masked(delta, 1.0, 0.0), delta)
    level = torch.ones(4, 4)
    assert torch.equal(masked(level, 0.25, 0.25), level)


def test_ties_trims_what_dare_left(make_expert):
    expert = make_expert("e1", layers=(0,), targets=("q_proj",))
    shares = {}
    for share in (1.0, 0.1):
        merged = merge([expert], "dare_ties", density=0.25, ties_density=share)
        shares[share] = float((next(iter(deltas_of(merged).values())) != 0).double().mean())
    assert shares[0.1] == pytest.approx(0.1, abs=1 / 1024)
    assert shares[1.0] > 0.2


def test_with_all_in_common_iso_cts_is_iso_c(mixed_experts):
    found = merge(mixed_experts, "iso_cts", common=1.0)
    same(deltas_of(found), deltas_of(merge(mixed_experts, "iso")), 1e-5)


def test_more_experts_than_columns_keep_one_triple_each(make_expert):
    experts = [make_expert(f"e{n}", rank=2, layers=(0,), targets=("v_proj",)) for n in range(20)]
    merged = merge(experts, "tsv")
    same(deltas_of(merged), slow_merge(experts, "tsv"), 1e-5)


def test_all_singular_values_are_one(mixed_experts):
    for delta in deltas_of(merge(mixed_experts, "iso")).values():
        sigma = torch.linalg.svdvals(delta)
        sigma = sigma[sigma > 1e-4 * sigma[0]]
        torch.testing.assert_close(sigma, sigma[0].expand_as(sigma), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inside", ["tsv", "iso", "iso_cts", "task_arithmetic"])
def test_core_space_loses_nothing(make_expert, inside):
    """Rules that do not look at single entries give inside what they give outside."""
    experts = [make_expert(f"e{n}", alpha=2 + n) for n in range(3)]
    inner = deltas_of(merge(experts, "core", inside=inside))
    same(inner, deltas_of(merge(experts, inside)), 1e-5)


def test_ties_inside_core_space_is_ties_on_the_cores(mixed_experts):
    merged = merge(mixed_experts, "core", inside="ties", density=0.4)
    assert merged.expert_info.training_config["options"] == {"inside": "ties", "density": 0.4}
    for module, delta in deltas_of(merged).items():
        factors = [lora_modules(e).get(module) for e in by_digest(mixed_experts)]
        given = [(f.a.double(), f.b.double() * f.scaling) for f in factors if f is not None]
        u = torch.linalg.svd(torch.cat([b for _, b in given], 1), full_matrices=False).U
        v = torch.linalg.svd(torch.cat([a for a, _ in given]).T, full_matrices=False).U
        cores = [Given(u.T @ b @ a @ v, 1.0, a, b) for a, b in given]
        expected = u @ slow_ties(cores, 0.4) @ v.T
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-5)


def by_digest(experts: list[Expert]) -> list[Expert]:
    return sorted(experts, key=lambda expert: expert.digest)


def test_a_sum_inside_knots_is_the_sum(mixed_experts):
    inner = merge(mixed_experts, "knots", inside="task_arithmetic")
    same(deltas_of(inner), deltas_of(merge(mixed_experts, "task_arithmetic")), 1e-5)


@pytest.mark.parametrize("inside", ["ties", "dare_ties"])
def test_knots_adds_no_rank(make_expert, inside):
    experts = [make_expert(f"e{n}", rank=2) for n in range(3)]
    for factors in lora_modules(merge(experts, "knots", inside=inside)).values():
        assert factors.rank == 6


@pytest.mark.parametrize("inside", ["ties", "dare_ties", "task_arithmetic"])
@pytest.mark.parametrize("rank", [None, 2, 5])
def test_compressed_first_the_result_has_the_rank_asked_for(mixed_experts, inside, rank):
    merged = merge(mixed_experts, "compress_then_merge", inside=inside, rank=rank)
    ranks = {m: max(f.rank for f in column) for m, column in columns(mixed_experts).items()}
    for module, factors in lora_modules(merged).items():
        assert factors.rank == (ranks[module] if rank is None else min(rank, factors.a.shape[0]))


def columns(experts: list[Expert]) -> dict[str, list[Any]]:
    tables = [lora_modules(e) for e in experts]
    return {m: [t[m] for t in tables if m in t] for m in set().union(*tables)}


@pytest.mark.parametrize("rank", [None, 1, 3])
def test_what_compression_loses_of_the_experts_is_reported(mixed_experts, rank):
    """Whatever merges the coordinates; in a sum of generic ones both subspaces show."""
    merged, other = (
        merge(mixed_experts, "compress_then_merge", inside=inside, rank=rank, scale=2.0)
        for inside in ("task_arithmetic", "ties")
    )
    report = merged.expert_info.training_config["report"]
    assert other.expert_info.training_config["report"] == report
    for module, column in columns(mixed_experts).items():
        deltas = [f.scaling * f.b.double() @ f.a.double() for f in column]
        factors, entry = lora_modules(merged)[module], report["modules"][module]
        u, v = torch.linalg.qr(factors.b.double()).Q, torch.linalg.qr(factors.a.double().T).Q
        inside_energy = float(sum((u.T @ d @ v).square().sum() for d in deltas))
        energy = float(sum(d.square().sum() for d in deltas))
        assert entry["energy"] == pytest.approx(energy, rel=1e-5)
        assert entry["energy_lost"] == pytest.approx(energy - inside_energy, abs=1e-5 * energy)
    lost = sum(entry["energy_lost"] for entry in report["modules"].values())
    total = sum(entry["energy"] for entry in report["modules"].values())
    assert report["energy_kept"] == pytest.approx(1 - lost / total)


def test_subspaces_of_full_rank_lose_nothing(make_expert):
    experts = [make_expert(f"e{n}", rank=2) for n in range(3)]
    merged = merge(experts, "compress_then_merge", inside="task_arithmetic", rank=6)
    same(deltas_of(merged), deltas_of(merge(experts, "task_arithmetic")), 1e-5)


@pytest.mark.parametrize("inside", ["task_arithmetic", "ties", "tsv"])
def test_pico_gives_the_experts_mean_length(mixed_experts, inside):
    merged = deltas_of(merge(mixed_experts, "pico", inside=inside))
    for module, column in columns(mixed_experts).items():
        lengths = [float((f.scaling * f.b.double() @ f.a.double()).norm()) for f in column]
        mean = sum(lengths) / len(lengths)
        assert float(merged[module].norm()) == pytest.approx(mean, rel=1e-5)


def test_wudi_lowers_what_it_minimises(make_expert):
    experts = [make_expert(f"e{n}") for n in range(4)]
    start = deltas_of(merge(experts, "wudi", steps=0))
    same(start, deltas_of(merge(experts, "task_arithmetic", scale=1.0)), 1e-5)
    end = deltas_of(merge(experts, "wudi", steps=200, learning_rate=0.01))
    for module, column in columns(experts).items():
        deltas = [f.scaling * f.b.double() @ f.a.double() for f in column]

        def loss(merged: Tensor, deltas: list[Tensor] = deltas) -> float:
            return float(sum(((merged - d) @ d.T).norm() ** 2 / d.norm() ** 2 for d in deltas))

        assert loss(end[module]) < 0.1 * loss(start[module])


def law_rows() -> list[str]:
    """The table of docs/merging.md, from the cases above."""

    def cell(law: Mapping[str, Any] | str) -> str:
        if isinstance(law, str):
            return f"no: {law}"
        return "yes" + (f", with {', '.join(f'{k}={v:g}' for k, v in law.items())}" if law else "")

    return [
        f"| `{method}` | " + " | ".join(cell(case.laws[law]) for law in (ONE, EQUAL, SIZE, SPLIT))
        for method, case in CASES.items()
    ]


def test_the_table_of_laws_in_the_docs_is_this_one():
    text = (Path(__file__).parents[2] / "docs" / "merging.md").read_text(encoding="utf-8")
    for row in law_rows():
        assert f"{row} |\n" in text


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs"])
def test_experts_in_several_batches_are_those_in_one(make_expert, monkeypatch, method):
    experts = [make_expert(f"e{n}", rank=1 + n % 3) for n in range(7)]
    whole = deltas_of(merge(experts, method))
    monkeypatch.setattr("mttl_routing.merges.dense._ENTRIES", 3 * 32 * 32)
    monkeypatch.setattr("mttl_routing.merges.dense._BLOCK", 100)
    same(deltas_of(merge(experts, method)), whole, 1e-6)


@pytest.mark.parametrize("inside", ["tsv", "iso", "iso_cts", "task_arithmetic"])
def test_a_core_of_full_size_is_left_alone_and_gives_what_the_turned_one_gives(make_expert, inside):
    experts = [make_expert(f"e{n}", rank=8, layers=(0,), targets=("q_proj",)) for n in range(5)]
    factors = [next(iter(lora_modules(e).values())) for e in experts]
    updates = [Update(f, 1.0, f"{n}/m") for n, f in enumerate(factors)]
    rule = MERGES[inside].rule
    turned, alone = (core(updates, inside=rule, by_entry=e) for e in (True, False))
    torch.testing.assert_close(turned.b @ turned.a, alone.b @ alone.a, rtol=1e-4, atol=1e-5)
    if isinstance(rule(updates), LowRank):
        assert torch.equal(alone.a, rule(updates).a)
