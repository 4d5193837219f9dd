"""The cases that every merge method is tested by: its slow version, its options and its laws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mttl_experts import Expert, lora_modules
from mttl_routing import MERGES, merge
from tests.routing.slow_merges import (
    Given,
    slow_breadcrumbs,
    slow_compress_then_merge,
    slow_core_tsv,
    slow_dare_linear,
    slow_dare_ties,
    slow_della,
    slow_iso,
    slow_iso_cts,
    slow_knots,
    slow_linear_factors,
    slow_multislerp,
    slow_pico,
    slow_slerp,
    slow_sparse_uniform,
    slow_sum,
    slow_ties,
    slow_tsv,
    slow_wudi,
)

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
class Case:
    """One method: its slow version and its laws."""

    slow: Callable[..., Tensor]
    laws: Mapping[str, Mapping[str, Any] | str]
    options: Mapping[str, Any] = field(default_factory=dict)
    weights: Callable[[int], list[float]] | None = None
    n_experts: int = 4
    tolerance: float = 1e-5


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


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        size = float(delta.abs().max()) or 1.0
        error = float((found[module] - delta).abs().max())
        assert error <= tolerance * max(1.0, size), f"{module}: {error} of {size}"


def scaled(expert: Expert, factor: float) -> Expert:
    return Expert(
        expert.expert_info,
        {k: v * factor if "lora_B" in k else v for k, v in expert.expert_weights.items()},
    )
