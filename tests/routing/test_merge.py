import copy
import itertools
import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor

from mttl_experts import (
    Expert,
    ExpertLibrary,
    IncompatibleExpertError,
    IncompatibleExpertWarning,
    UnsupportedAdapterError,
    lora_modules,
)
from mttl_routing import MERGES, merge
from mttl_routing.merge import _key


def dense_updates(expert: Expert) -> dict[str, Tensor]:
    """ΔW by module in float64, straight from the tensors and the config."""
    config, weights = expert.expert_info.expert_config, expert.expert_weights
    deltas = {}
    for key, a in weights.items():
        if not key.endswith("lora_A.weight"):
            continue
        b = weights[key.replace("lora_A", "lora_B")]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = config["lora_alpha"]
        for pattern, value in config["alpha_pattern"].items():
            if re.search(rf"(^|\.){pattern}$", module):
                alpha = value
        rank = a.shape[0]
        scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
        deltas[module] = scaling * b.double() @ a.double()
    return deltas


def slow_ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """TIES entry by entry in float64."""
    trimmed = []
    for delta in deltas:
        keep = max(1, round(density * delta.numel()))
        least = sorted(delta.abs().flatten().tolist(), reverse=True)[keep - 1]
        trimmed.append(delta * (delta.abs() >= least))
    out = torch.zeros_like(deltas[0])
    for place in itertools.product(*map(range, out.shape)):
        values = [(float(t[place]), w) for t, w in zip(trimmed, weights, strict=True)]
        total = sum(v * w for v, w in values)
        agreeing = [(v, w) for v, w in values if v * total > 0]
        if agreeing:
            out[place] = sum(v * w for v, w in agreeing) / sum(w for _, w in agreeing)
    return out


def slow_merge(experts, method, weights, density=0.2):
    deltas = [dense_updates(expert) for expert in experts]
    merged = {}
    for module in sorted(set().union(*deltas)):
        here = [(d[module], w) for d, w in zip(deltas, weights, strict=True) if module in d]
        if method == "ties":
            merged[module] = slow_ties([d for d, _ in here], [w for _, w in here], density)
        else:
            merged[module] = sum(d * w for d, w in here)
    return merged


CASES = [("uniform", None), ("weighted", [0.5, -1.0, 2.0, 0.25]), ("ties", None)]
CASES += [("ties", [1.0, 2.0, 0.5, 3.0])]


@pytest.mark.parametrize(("method", "weights"), CASES)
def test_a_slow_dense_float64_merge_agrees(mixed_experts, method, weights):
    default = 1 / len(mixed_experts) if method == "uniform" else 1.0
    expected = slow_merge(mixed_experts, method, weights or [default] * len(mixed_experts))
    found = dense_updates(merge(mixed_experts, method, weights=weights))
    assert found.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(found[module], delta, rtol=1e-5, atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(ranks=st.lists(st.integers(1, 20), min_size=1, max_size=4), density=st.floats(0.01, 1.0))
def test_any_mix_of_ranks_is_exact_also_where_their_sum_exceeds_the_layer(
    make_expert, ranks, density
):
    experts = [make_expert(f"e{n}", rank=r, layers=(0,)) for n, r in enumerate(ranks)]
    uniform = slow_merge(experts, "uniform", [1 / len(ranks)] * len(ranks))
    torch.testing.assert_close(dense_updates(merge(experts)), uniform, rtol=1e-5, atol=1e-5)
    ties = slow_merge(experts, "ties", [1.0] * len(ranks), density)
    found = dense_updates(merge(experts, "ties", density=density))
    torch.testing.assert_close(found, ties, rtol=1e-5, atol=1e-5)
    for factors in lora_modules(merge(experts)).values():
        assert factors.rank == min(sum(ranks), factors.a.shape[1], factors.b.shape[0])


@pytest.mark.parametrize("method", ["uniform", "ties"])
@pytest.mark.parametrize("rank", [None, 3])
def test_bytes_do_not_depend_on_the_order_of_the_experts(mixed_experts, method, rank):
    files = [
        merge(order, method, rank=rank).files() for order in itertools.permutations(mixed_experts)
    ]
    assert all(f == files[0] for f in files)


def test_weights_travel_with_their_experts(mixed_experts):
    weights = [0.1, 0.2, 0.3, 0.4]
    by_name = dict(zip([e.name for e in mixed_experts], weights, strict=True))
    digests = {
        merge(mixed_experts, "weighted", weights=weights).digest,
        merge(mixed_experts[::-1], "weighted", weights=weights[::-1]).digest,
        merge(mixed_experts, "weighted", weights=by_name).digest,
    }
    assert len(digests) == 1


@pytest.mark.parametrize("method", ["uniform", "ties"])
def test_merge_of_one_is_itself(make_expert, method):
    expert = make_expert("one", rslora=True, alpha_pattern={"q_proj": 5})
    options = {"density": 1.0} if method == "ties" else {}
    merged = dense_updates(merge([expert], method, **options))
    torch.testing.assert_close(merged, dense_updates(expert), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["uniform", "ties"])
def test_equal_experts_give_that_expert(make_expert, method):
    expert = make_expert("same")
    options = {"density": 1.0} if method == "ties" else {}
    merged = dense_updates(merge([expert] * 3, method, **options))
    torch.testing.assert_close(merged, dense_updates(expert), rtol=1e-5, atol=1e-6)


def test_weighted_is_linear_in_its_weights(mixed_experts):
    one = dense_updates(merge(mixed_experts, "weighted", weights=[1, 2, 3, 4]))
    twice = dense_updates(merge(mixed_experts, "weighted", weights=[2, 4, 6, 8]))
    torch.testing.assert_close({m: 2 * d for m, d in one.items()}, twice, rtol=1e-6, atol=1e-6)


def test_ties_does_not_depend_on_the_scale_of_its_weights(mixed_experts):
    one = dense_updates(merge(mixed_experts, "ties", weights=[1, 2, 3, 4]))
    twice = dense_updates(merge(mixed_experts, "ties", weights=[2, 4, 6, 8]))
    torch.testing.assert_close(one, twice, rtol=1e-5, atol=1e-6)


def test_factors_are_not_averaged_apart(make_expert):
    """PEFT's `linear` adds products of one expert's B with another's A (relative error 1.7)."""
    experts = [make_expert(f"e{n}", layers=(0,), targets=("q_proj",)) for n in range(4)]
    expected = sum(dense_updates(e)["model.layers.0.self_attn.q_proj"] for e in experts) / 4
    found = dense_updates(merge(experts))["model.layers.0.self_attn.q_proj"]
    assert (found - expected).norm() < 1e-6 * expected.norm()


def test_peft_issue_3761_rslora_is_merged_with_its_own_scaling(make_expert):
    expert = make_expert("rs", rank=4, alpha=8, rslora=True)
    merged = merge([expert])
    assert merged.expert_info.expert_config["use_rslora"] is False
    torch.testing.assert_close(dense_updates(merged), dense_updates(expert), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["uniform", "ties"])
@pytest.mark.parametrize("rank", [None, 5])
def test_peft_issue_3737_merges_of_rank_patterns_load_in_peft(
    base, tokens, mixed_experts, tmp_path, method, rank
):
    merged = merge(mixed_experts, method, rank=rank)
    for name, content in merged.files().items():
        (tmp_path / name).write_bytes(content)
    expected = apply_dense(base, dense_updates(merged), tokens)
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, base(tokens).logits, atol=1e-2)


@torch.no_grad()
def apply_dense(base, deltas: dict[str, Tensor], tokens: Tensor) -> Tensor:
    model = copy.deepcopy(base)
    for module, delta in deltas.items():
        model.get_submodule(module).weight += delta.float()
    return model(tokens).logits


def test_a_pattern_key_matches_one_module_alone(make_expert):
    """PEFT matches a path's end, so a module named like another's last part needs an anchor."""
    modules = {"fc": 1, "block.fc": 2, "block.other": 3}
    for module in modules:
        key = _key(module, modules)
        assert [m for m in modules if re.match(rf"(.*\.)?({key})$", m)] == [module]
    assert _key("block.fc", modules) == "block.fc"


def test_cutting_the_rank_is_the_best_approximation_and_reports_what_it_lost(mixed_experts):
    for method in ("uniform", "ties"):
        whole = dense_updates(merge(mixed_experts, method))
        merged = merge(mixed_experts, method, rank=2)
        found, report = dense_updates(merged), merged.expert_info.training_config["report"]
        assert report["modules"].keys() == whole.keys()
        for module, delta in whole.items():
            energies = torch.linalg.svdvals(delta).square()
            lost = float(energies[2:].sum())
            error = float((found[module] - delta).square().sum())
            entry = report["modules"][module]
            assert entry["rank"] <= 2
            assert error == pytest.approx(lost, rel=1e-3, abs=1e-6)
            assert entry["energy_lost"] == pytest.approx(lost, rel=1e-3, abs=1e-6)
            assert entry["energy"] == pytest.approx(float(energies.sum()), rel=1e-4)
        lost = sum(m["energy_lost"] for m in report["modules"].values())
        total = sum(m["energy"] for m in report["modules"].values())
        assert report["energy_kept"] == pytest.approx(1 - lost / total)


def test_a_rank_above_the_exact_one_loses_nothing(make_expert):
    experts = [make_expert("e1", rank=2), make_expert("e2", rank=3)]
    exact, roomy = merge(experts), merge(experts, rank=64)
    torch.testing.assert_close(dict(exact.expert_weights), dict(roomy.expert_weights))
    assert roomy.expert_info.training_config["report"]["energy_kept"] == 1.0


def test_the_result_says_what_it_was_made_from(mixed_experts):
    merged = merge(mixed_experts, "ties", density=0.5, name="mix")
    info = merged.expert_info
    assert info.expert_name == "mix"
    assert info.parents == tuple(sorted(e.name for e in mixed_experts))
    by_name = {expert.name: expert.digest for expert in mixed_experts}
    assert dict(zip(info.parents, info.parent_digests, strict=True)) == by_name
    assert info.training_config["versions"].keys() == {"torch", "mttl-routing"}
    assert info.tasks == tuple(sorted(e.name for e in mixed_experts))
    assert info.expert_model == mixed_experts[0].expert_info.expert_model
    config = info.training_config
    assert config["method"] == "ties"
    assert config["options"] == {"density": 0.5}
    assert {e["digest"] for e in config["experts"]} == {e.digest for e in mixed_experts}
    assert (
        info.recipe_digest
        == merge(mixed_experts[::-1], "ties", density=0.5).expert_info.recipe_digest
    )
    assert info.recipe_digest != merge(mixed_experts, "ties").expert_info.recipe_digest


def test_missing_modules_count_as_zero_and_the_report_says_so(make_expert):
    one, other = make_expert("one"), make_expert("other", targets=("q_proj",), layers=(0,))
    merged = merge([one, other])
    assert merged.expert_info.training_config["report"]["missing_means_zero"] == {
        "other": [
            "model.layers.0.self_attn.v_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.v_proj",
        ]
    }
    module = "model.layers.0.self_attn.v_proj"
    torch.testing.assert_close(dense_updates(merged)[module], dense_updates(one)[module] / 2)


def test_a_bfloat16_expert_is_merged_in_float32(make_expert):
    experts = [make_expert("half", dtype=torch.bfloat16), make_expert("full")]
    merged = merge(experts)
    assert {w.dtype for w in merged.expert_weights.values()} == {torch.float32}
    expected = slow_merge(experts, "uniform", [0.5, 0.5])
    torch.testing.assert_close(dense_updates(merged), expected, rtol=1e-5, atol=1e-5)


def test_ones_own_method_is_a_function_of_updates(mixed_experts):
    def strongest(updates):
        return max((u.dense() for u in updates), key=lambda delta: float(delta.norm()))

    merged = merge(mixed_experts, strongest)
    deltas = [dense_updates(e) for e in mixed_experts]
    for module, delta in dense_updates(merged).items():
        expected = max((d[module] for d in deltas if module in d), key=lambda d: float(d.norm()))
        torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-5)
    assert "strongest" in merged.expert_info.training_config["method"]


def test_experts_of_different_bases_are_refused_and_both_named(make_expert):
    experts = [make_expert("one"), make_expert("other", model="someone/phi")]
    with pytest.raises(
        IncompatibleExpertError, match=r"two-layer-llama.*someone/phi|someone/phi.*two"
    ):
        merge(experts)


def test_experts_of_one_name_for_a_base_but_other_shapes_are_refused(make_expert):
    wide = make_expert("wide", targets=("gate_proj",), layers=(0,))
    weights = {k.replace("gate_proj", "up_proj"): v for k, v in wide.expert_weights.items()}
    weights = {k: v[:, :8] if "lora_A" in k else v for k, v in weights.items()}
    odd = Expert(wide.expert_info, weights)
    up = make_expert("up", targets=("up_proj",), layers=(0,))
    with pytest.raises(IncompatibleExpertError, match=r"up_proj' is \(48, \d+\).*\(48, \d+\)"):
        merge([odd, up])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "IA3"),
    ],
)
def test_what_is_more_than_an_update_is_refused_by_name(make_expert, config, named):
    with pytest.raises(UnsupportedAdapterError, match=named):
        merge([make_expert("plain"), make_expert("more", **config)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "unifrom"}, "no merge method 'unifrom'; there are 'uniform'"),
        ({"method": "uniform", "weights": [1, 1]}, "takes no weights; method='weighted' does"),
        ({"method": "weighted"}, "needs weights"),
        ({"method": "weighted", "weights": [1]}, "1 weights for 2 experts"),
        ({"method": "weighted", "weights": {"e1": 1, "e3": 1}}, r"\['e1', 'e3'\]"),
        ({"method": "weighted", "weights": [1, math.nan]}, "nan"),
        ({"method": "ties", "weights": [1, -1]}, "above zero, got -1"),
        ({"method": "ties", "density": 0.0}, "density is 0.0"),
        ({"method": "uniform", "density": 0.5}, "takes no density"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
    ],
)
def test_bad_arguments_get_one_clear_line(make_expert, arguments, message):
    with pytest.raises(ValueError, match=message):
        merge([make_expert("e1"), make_expert("e2")], **arguments)


def test_nothing_to_merge_and_names_instead_of_experts_are_errors():
    with pytest.raises(ValueError, match="no experts were given"):
        merge([])
    with pytest.raises(TypeError, match="'anna' among the experts"):
        merge(["anna"])


def test_numbers_that_are_none_are_refused_with_their_module(make_expert):
    bad = make_expert("bad", layers=(0,))
    bad.expert_weights["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"][0, 0] = (
        math.nan
    )
    with pytest.raises(ValueError, match=r"'bad' has NaN.*layers\.0\.self_attn\.v_proj"):
        merge([bad], "ties")


def test_every_method_names_its_paper():
    assert all(m.paper.startswith("https://") for m in MERGES.values())


def test_one_base_under_two_names_is_one_base(make_expert):
    experts = [
        Expert(
            replace(made.expert_info, expert_model=name, model_fingerprint="f" * 64),
            made.expert_weights,
        )
        for made, name in ((make_expert("e1"), "/b/base"), (make_expert("e2"), "/a/base"))
    ]
    assert merge(experts).expert_info.expert_model == "/a/base"
    assert merge(experts[::-1]).digest == merge(experts).digest


@pytest.mark.parametrize("field", ["model_fingerprint", "tokenizer_digest", "template_digest"])
def test_other_weights_of_one_base_are_a_warning_and_strictly_an_error(field, make_expert):
    experts = [
        replace(made, expert_info=replace(made.expert_info, **{field: digest}))
        for made, digest in ((make_expert("e1"), "a" * 64), (make_expert("e2"), "b" * 64))
    ]
    with pytest.warns(IncompatibleExpertWarning, match="(a{64}.*b{64})|(b{64}.*a{64})"):
        merged = merge(experts)
    assert getattr(merged.expert_info, field) is None
    with pytest.raises(IncompatibleExpertError, match="(a{64}.*b{64})|(b{64}.*a{64})"):
        merge(experts, strict=True)


def test_a_kept_merge_is_refused_as_well_if_strict(tmp_path, make_expert):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    for name, digest in (("e1", "a" * 64), ("e2", "b" * 64)):
        made = make_expert(name)
        info = replace(made.expert_info, model_fingerprint=digest)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IncompatibleExpertWarning)
            library.add_expert(replace(made, expert_info=info))
    view = ExpertLibrary(library.uri, selection="e1,e2")
    with pytest.warns(IncompatibleExpertWarning):
        library.add_expert(merge(view))
    with pytest.raises(IncompatibleExpertError):
        merge(view.refresh(), strict=True)


def test_each_module_is_told(mixed_experts):
    told = []
    merged = merge(mixed_experts, progress=lambda *args: told.append(args))
    n = len(lora_modules(merged))
    assert told == [("", done, n) for done in range(1, n + 1)]
