import dataclasses
import pickle

import pytest
import torch

from mttl_experts import (
    Expert,
    ExpertInfo,
    ExpertLibrary,
    ExpertNotFoundError,
    LoraFactors,
    UnsupportedAdapterError,
    inner_product,
)
from mttl_experts.search import index as index_module
from mttl_experts.search.index import RECIPE
from mttl_experts.search.likeness import Query
from mttl_storage import Corrupt, ReadOnly


def refactored(expert, name, *, scale=1.0, pad=0, rslora=False, dtype=torch.float32):
    """An expert with the same ΔW (times ``scale``) in other factors, rank, alpha and dtype."""
    config = expert.expert_info.expert_config
    rank = config["r"]
    scaling, new_rank = config["lora_alpha"] / rank, rank + pad
    alpha = 3.0
    new_scaling = alpha / (new_rank**0.5 if rslora else new_rank)
    generator = torch.Generator().manual_seed(len(name))
    weights = {}
    for key in expert.expert_weights:
        if ".lora_A." not in key:
            continue
        a, b = expert.expert_weights[key], expert.expert_weights[key.replace("_A.", "_B.")]
        mix = torch.randn(rank, rank, generator=generator) + 3 * torch.eye(rank)
        a, b = torch.linalg.inv(mix) @ a * scaling / new_scaling, b @ mix * scale
        a = torch.cat([a, torch.randn(pad, a.shape[1], generator=generator)])
        b = torch.cat([b, torch.zeros(b.shape[0], pad)], 1)
        weights[key], weights[key.replace("_A.", "_B.")] = a.to(dtype), b.to(dtype)
    changed = config | {"r": new_rank, "lora_alpha": alpha, "use_rslora": rslora}
    info = dataclasses.replace(expert.expert_info, expert_name=name, expert_config=changed)
    return Expert(info, weights)


def near(expert, name, noise, seed=1):
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: tensor + noise * torch.randn(tensor.shape, generator=generator)
        for key, tensor in expert.expert_weights.items()
    }
    return Expert(dataclasses.replace(expert.expert_info, expert_name=name), weights)


def names(matches):
    return [match.name for match in matches]


@pytest.fixture
def filled(tmp_path, make_expert):
    """Twenty experts of mixed ranks and modules, in memory."""
    name = f"virtual://search-{tmp_path.name}-{id(tmp_path)}"
    return fill(ExpertLibrary(name, create=True), make_expert)


@pytest.fixture
def stored(library, make_expert):
    """The same on each backend."""
    return fill(library, make_expert)


def fill(library, make_expert):
    with library.batch():
        for seed in range(20):
            shapes = {"self_attn.q_proj": (16, 16)} if seed % 5 == 4 else None
            library.add_expert(
                make_expert(f"e{seed:02d}", seed=seed, rank=1 + seed % 4, shapes=shapes)
            )
    return library


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"pad": 3},
        {"rslora": True},
        {"pad": 2, "rslora": True},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_a_copy_is_found_under_any_factors(filled, how):
    filled.add_expert(refactored(filled["e03"], "twin", **how))
    first = filled.search.like("e03")[0]
    assert (first.name, first.likeness.copy) == ("twin", "same")
    assert first.score == pytest.approx(1, abs=1e-4)
    assert first.likeness.size == pytest.approx(1, abs=5e-3)
    back = filled.search.like("twin")[0]
    assert (back.name, back.likeness.copy) == ("e03", "same")


@pytest.mark.parametrize("scale", [2.0, 0.1, -1.0, -0.5, 1.02])
def test_a_scaled_copy_is_said_to_be_one(filled, scale):
    filled.add_expert(refactored(filled["e03"], "scaled", scale=scale, pad=1))
    first = filled.search.like("e03")[0]
    assert (first.name, first.likeness.copy) == ("scaled", "scaled")
    assert first.score * first.likeness.size == pytest.approx(scale, rel=1e-4)


def test_what_is_only_near_is_no_copy(filled):
    filled.add_expert(near(filled["e03"], "near", 0.05))
    first = filled.search.like("e03")[0]
    assert (first.name, first.likeness.copy) == ("near", None)
    assert 0.9 < first.score < 0.9999


def test_the_order_is_that_of_exact_cosines(filled):
    found = filled.search.like("e07", limit=19)
    norm = {name: inner_product(e, e) ** 0.5 for name, e in filled.items()}
    exact = {
        name: inner_product(filled["e07"], e) / norm["e07"] / norm[name]
        for name, e in filled.items()
        if name != "e07"
    }
    assert names(found) == sorted(exact, key=lambda name: -exact[name])
    for match in found:
        assert match.score == pytest.approx(exact[match.name], abs=1e-6)
        assert match.likeness.size == pytest.approx(norm[match.name] / norm["e07"])


def test_products_are_exact_whatever_modules_and_ranks_two_experts_share():
    generator = torch.Generator().manual_seed(0)

    def factors(rank, out, dtype=torch.float32):
        a = torch.randn(rank, 6, generator=generator).to(dtype)
        return LoraFactors(a, torch.randn(out, rank, generator=generator).to(dtype), rank / 3)

    one = {f"m{n}": factors(1 + n % 3, 4 + n % 2) for n in range(12)}
    other = {f"m{n}": factors(1 + n % 2, 4 + n % 2) for n in range(3, 15)}
    other["m5"] = factors(2, 9)  # another shape: nothing in common
    other["m6"] = factors(2, 4, torch.bfloat16)
    norm = {id(m): inner_product(m, m) ** 0.5 for m in (one, other)}
    found = Query(one, norm[id(one)]).likeness(other, norm[id(other)])
    alike = {path: f for path, f in other.items() if path != "m5"}
    wanted = inner_product(one, alike) / norm[id(one)] / norm[id(other)]
    assert found.cosine == pytest.approx(wanted, abs=1e-6)
    assert found.size == pytest.approx(norm[id(other)] / norm[id(one)])


def test_an_expert_from_elsewhere_may_be_the_librarys_own(filled):
    stranger = Expert(filled["e03"].expert_info, dict(filled["e03"].expert_weights))
    assert "e03" not in names(filled.search(stranger, limit=30))
    first = filled.search.like(stranger, itself=True)[0]
    assert (first.name, first.likeness.copy) == ("e03", "same")


def test_an_expert_that_comes_in_is_found_andsketched_alone(stored, monkeypatch):
    stored.search.like("e00")
    sketched = []
    monkeypatch.setattr(
        index_module,
        "sketched",
        lambda expert, real=index_module.sketched: sketched.append(expert.name) or real(expert),
    )
    assert stored.search.like("e00")
    assert sketched == []
    stored.add_expert(refactored(stored["e00"], "new"))
    assert stored.search.like("e00")[0].name == "new"
    assert sketched == ["new"]
    again = ExpertLibrary(stored.uri)
    assert again.search.like("e00") == stored.search.like("e00")
    assert sketched == ["new"]


def test_an_expert_that_is_gone_is_not_found(filled):
    filled.add_expert(refactored(filled["e00"], "twin"))
    assert filled.search.like("e00")[0].name == "twin"
    filled.remove_expert("twin")
    assert "twin" not in names(filled.search.like("e00", limit=30))
    filled.restore_expert("twin")
    assert filled.search.like("e00")[0].name == "twin"
    filled.rename_expert("twin", "sibling")
    assert filled.search.like("e00")[0].name == "sibling"


def test_a_replaced_expert_answers_with_its_new_weights(stored, make_expert):
    stored.add_expert(refactored(stored["e00"], "other"))
    assert stored.search.like("e00")[0].likeness.copy == "same"
    stored.replace_expert(make_expert("other", seed=99))
    assert all(match.likeness.copy is None for match in stored.search.like("e00", limit=30))
    stored.replace_expert(refactored(stored["e05"], "other"))
    assert stored.search.like("e05")[0].name == "other"


def test_others_changes_are_seen_after_a_refresh(filled, make_expert):
    filled.search.like("e00")
    other = ExpertLibrary(filled.uri)
    other.add_expert(refactored(filled["e00"], "new"))
    other.search.like("e00")
    assert filled.refresh().search.like("e00")[0].name == "new"


def test_a_part_finds_its_own_alone(filled):
    filled.add_expert(refactored(filled["e00"], "twin"))
    part = ExpertLibrary(filled.uri, selection="e00,e01,e02")
    assert sorted(names(part.search.like("e00"))) == ["e01", "e02"]
    assert filled.search.like("e00")[0].name == "twin"


def test_a_library_that_is_only_read_is_searched_all_the_same(filled):
    generation = filled.generation
    reader = ExpertLibrary(filled.uri, read_only=True)
    found = reader.search.like("e00")
    assert reader.search.like("e00") == found
    assert reader.generation == generation
    with pytest.raises(ReadOnly):
        reader.remove_expert("e00")


def test_results_are_the_same_each_time(stored, tmp_path):
    first = stored.search.like("e02", limit=30)
    assert stored.search.like("e02", limit=30) == first
    copy = stored.copy_to(f"local://{tmp_path}/copy")
    assert copy.search.like("e02", limit=30) == first
    assert ExpertLibrary(stored.uri).search.like("e02", limit=30) == first
    assert pickle.loads(pickle.dumps(stored.search)).like("e02", limit=30) == first


def test_few_segments_stay_however_many_experts_come_one_by_one(filled, make_expert):
    for number in range(2 * index_module.SMALL_SEGMENTS + 3):
        filled.add_expert(make_expert(f"x{number:02d}", seed=100 + number))
        filled.search.like("e00")
    kept = [entry for entry in filled.artifacts.entries() if entry.recipe == RECIPE]
    assert len(kept) <= index_module.SMALL_SEGMENTS + 1
    digests = [digest for entry in kept for digest in entry.experts]
    assert sorted(digests) == sorted(filled.digest(name) for name in filled)


def test_rows_of_what_is_gone_are_left_behind_and_no_other_is_made_again(filled, monkeypatch):
    filled.search.like("e00")
    made = []
    monkeypatch.setattr(
        index_module,
        "sketched",
        lambda expert, real=index_module.sketched: made.append(expert.name) or real(expert),
    )
    gone = filled.digest("e19")
    filled.remove_expert("e19")
    again = ExpertLibrary(filled.uri)
    again.search.like("e00")
    (entry,) = [entry for entry in again.artifacts.entries() if entry.recipe == RECIPE]
    assert gone not in entry.experts
    assert len(entry.experts) == 19
    again.restore_expert("e19")
    again.search.like("e00")
    assert made == ["e19"]


def test_a_damaged_segment_is_made_again(stored):
    found = stored.search.like("e00", limit=30)
    (entry,) = [entry for entry in stored.artifacts.entries() if entry.recipe == RECIPE]
    stored.artifacts.put(entry.experts, RECIPE, {"sketch": torch.zeros(2, 2)})
    assert ExpertLibrary(stored.uri).search.like("e00", limit=30) == found


def test_an_interrupted_index_keeps_what_it_has(filled, monkeypatch):
    real, made = index_module.sketched, []

    def interrupted(expert):
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(expert.name)
        return real(expert)

    monkeypatch.setattr(index_module, "sketched", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filled.search.like("e00")
    monkeypatch.setattr(index_module, "sketched", lambda e: made.append(e.name) or real(e))
    assert len(ExpertLibrary(filled.uri).search.like("e00", limit=30)) == 19
    assert len(made) == 20


def test_progress_is_told(filled):
    told = []
    filled.search.like("e00", progress=lambda *a: told.append(a))
    assert told == [("", n, 20) for n in range(20)]


def test_what_has_no_delta_is_left_out_and_said(filled, make_expert):
    filled.add_expert(make_expert("dora", seed=50, use_dora=True))
    filled.add_expert(Expert(ExpertInfo("empty")))
    broken = make_expert("nan", seed=51)
    next(iter(broken.expert_weights.values()))[0, 0] = torch.nan
    filled.add_expert(broken)
    untrained = make_expert("untrained", seed=52)
    for key, tensor in untrained.expert_weights.items():
        tensor.mul_(0.0 if ".lora_B." in key else 1.0)
    filled.add_expert(untrained)
    found = filled.search.like("e00", limit=30)
    assert len(found) == 20
    assert {m.name: m.score for m in found}["untrained"] == 0
    assert set(filled.search.left_out) == {"dora", "nan"}
    assert "DoRA" in filled.search.left_out["dora"]
    for name, word in [
        ("dora", "DoRA"),
        ("empty", "no weights"),
        ("nan", "NaN"),
        ("untrained", "0"),
    ]:
        with pytest.raises((UnsupportedAdapterError, ValueError), match=word):
            filled.search.like(name)
    with pytest.raises(ExpertNotFoundError, match="did you mean"):
        filled.search.like("e0")


def flip_a_byte(library, name):
    path = library.path(name) / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture
def on_disk(tmp_path, make_expert):
    return fill(ExpertLibrary(f"local://{tmp_path}/lib", create=True), make_expert)


@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "not indexed"])
def test_what_is_damaged_is_left_out_and_said(on_disk, indexed):
    if indexed:
        on_disk.search.like("e00")
    flip_a_byte(on_disk, "e07")
    (on_disk.path("e09") / "adapter_model.safetensors").unlink()
    again = ExpertLibrary(on_disk.uri)
    for _ in range(2):
        assert set(names(again.search.like("e00", limit=30))) == set(again) - {"e00", "e07", "e09"}
        assert list(again.search.left_out) == ["e07", "e09"]
    assert "adapter_model.safetensors" in again.search.left_out["e07"]
    with pytest.raises(Corrupt, match="e07"):
        again.search.like("e07")


def test_what_is_damaged_has_no_loss_and_is_said(on_disk):
    flip_a_byte(on_disk, "e07")
    again = ExpertLibrary(on_disk.uri)

    def loss(expert):
        return 1.0 if expert is None else float(len(expert.expert_weights))

    assert len(again.search.by_loss(loss, {"examples": "x"}, 1, limit=30)) == 19
    assert list(again.search.left_out) == ["e07"]


def test_what_a_search_by_loss_left_out_is_forgotten_by_the_next(filled, make_expert):
    filled.add_expert(make_expert("dora", seed=50, use_dora=True))
    filled.search.like("e00")
    filled.search.by_loss(lambda expert: 1.0, {"examples": "x"}, 1)
    assert filled.search.left_out == {}
    filled.search.like("e00")
    assert set(filled.search.left_out) == {"dora"}


def test_experts_of_another_width_have_nothing_in_common(filled, make_expert):
    shapes = {"self_attn.q_proj": (8, 8), "mlp.down_proj": (16, 24)}
    filled.add_expert(make_expert("narrow", seed=3, shapes=shapes))
    found = {match.name: match.score for match in filled.search.like("narrow", limit=30)}
    assert found["e04"] == 0  # its q_proj is (16, 16), and it has no down_proj
    assert len(found) == 20


def losses(table, calls):
    def loss(expert):
        calls.append(None if expert is None else expert.name)
        return table[calls[-1]]

    return loss


def test_losses_rank_and_are_measured_once(library, make_expert):
    for seed, name in enumerate("abc"):
        library.add_expert(make_expert(name, seed=seed))
    calls = []
    measure = losses({None: 2.0, "a": 1.5, "b": 0.5, "c": 3.0}, calls)
    recipe = {"examples": "0" * 64}
    found = library.search.by_loss(measure, recipe, 4)
    assert [(m.name, m.score, m.gain) for m in found] == [
        ("b", -0.5, 1.5),
        ("a", -1.5, 0.5),
        ("c", -3.0, -1.0),
    ]
    assert calls == [None, "a", "b", "c"]
    assert ExpertLibrary(library.uri).search.by_loss(measure, recipe, 4, limit=1) == found[:1]
    assert len(calls) == 4
    library.replace_expert(make_expert("b", seed=9))
    library.add_expert(make_expert("d", seed=10))
    measure = losses({"b": 9.0, "d": 0.1}, calls)
    assert names(library.search.by_loss(measure, recipe, 4)) == ["d", "a", "c", "b"]
    assert calls[4:] == ["b", "d"]
    measure = losses({None: 1.0, "a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0}, calls)
    library.search.by_loss(measure, {"examples": "1" * 64}, 4)
    assert len(calls) == 11
    library.search.by_loss(measure, recipe, 4, again=True)
    assert len(calls) == 16
    kept = [score.value for score in library.scores.table() if score.recipe == recipe]
    assert sorted(kept) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]  # 0.5 being what is now in the history


def test_losses_measured_before_an_interruption_are_kept(library, make_expert):
    for seed, name in enumerate("abc"):
        library.add_expert(make_expert(name, seed=seed))
    calls = []

    def loss(expert):
        if expert is not None and expert.name == "c" and len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(expert)
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        library.search.by_loss(loss, {"examples": "x"}, 1)
    calls.append(None)
    library.search.by_loss(loss, {"examples": "x"}, 1)
    assert len(calls) == 5


def test_what_has_no_loss_is_left_out_and_said(library, make_expert):
    for seed, name in enumerate("abc"):
        library.add_expert(make_expert(name, seed=seed))

    def loss(expert):
        if expert is not None and expert.name == "a":
            raise UnsupportedAdapterError("cannot be attached")
        return float("nan") if expert is not None and expert.name == "b" else 1.0

    assert names(library.search.by_loss(loss, {"examples": "x"}, 1)) == ["c"]
    assert set(library.search.left_out) == {"a", "b"}
