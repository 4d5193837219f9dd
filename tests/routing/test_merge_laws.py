"""Every merge method against a slow dense version in float64, and against the laws that it has."""

import copy
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from mttl_experts import Expert, ExpertInfo
from mttl_routing import MERGES, merge
from tests.routing.merge_cases import (
    CASES,
    EQUAL,
    METHODS,
    ONE,
    SIZE,
    SPLIT,
    deltas_of,
    do_merge,
    same,
    scaled,
    slow_merge,
    uneven,
)


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
