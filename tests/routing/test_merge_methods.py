"""What single merge methods are known by, beside the laws of all."""

from typing import Any

import pytest
import torch
from hypothesis import given as each
from hypothesis import settings
from hypothesis import strategies as st
from peft.utils.merge_utils import ties as peft_ties
from torch import Tensor

from mttl_experts import Expert, lora_modules
from mttl_routing import MERGES, merge
from mttl_routing.merges.breadcrumbs import mask
from mttl_routing.merges.della import chances
from mttl_routing.merges.rule import LowRank, Update
from mttl_routing.merges.spaces import core
from mttl_routing.merges.spherical import average_point
from tests.routing.merge_cases import deltas_of, same, scaled, slow_merge
from tests.routing.slow_merges import Given, slow_ties


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
