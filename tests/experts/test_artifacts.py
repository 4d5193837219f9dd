import json
import weakref

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary, LocalExpertLibrary, Score
from mttl_storage import Conflict

RECIPE = {"kind": "prototype", "version": 1}


@pytest.fixture
def filled(library, make_expert):
    for seed, name in enumerate(("a", "b", "c")):
        library.add_expert(make_expert(name, seed=seed))
    return library


def test_tensors_and_plain_data_come_back(filled):
    a = filled["a"]
    tensors = {"x": torch.randn(3, 2), "y": torch.ones(2, dtype=torch.bfloat16)}
    filled.artifacts.put(a, RECIPE, tensors)
    again = ExpertLibrary(filled.uri)
    found = again.artifacts.get(again["a"], RECIPE)
    assert list(found) == ["x", "y"]
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    for value in ([1, None, 2.5], {"a": {"b": "c"}}, {}, "text", 0, False, list(range(5000))):
        filled.artifacts.put(a, {"value": json.dumps(value)}, value)
        assert filled.artifacts.get(a, {"value": json.dumps(value)}) == value
    assert filled.artifacts.get(a, {"kind": "other"}) is None
    assert filled.artifacts.get(filled["b"], RECIPE) is None


def test_a_replaced_expert_does_not_meet_its_predecessors_artifact(filled, make_expert):
    """FIELD: a replaced expert keeps its old prototype."""
    filled.artifacts.put(filled["a"], RECIPE, [1])
    filled.artifacts.put([filled["a"], filled["b"]], RECIPE, [2])
    filled.replace_expert(make_expert("a", seed=9))
    assert filled.artifacts.get(filled["a"], RECIPE) is None
    assert filled.artifacts.get([filled["a"], filled["b"]], RECIPE) is None
    assert filled.artifacts.for_each(RECIPE) == {}
    filled.replace_expert(make_expert("a", seed=0))  # the first one again
    assert filled.artifacts.get(filled["a"], RECIPE) == [1]


def test_another_scaling_is_another_expert(filled, make_expert):
    filled.artifacts.put(filled["a"], RECIPE, [1])
    filled.replace_expert(make_expert("a", seed=0, lora_alpha=16))
    assert filled.artifacts.get(filled["a"], RECIPE) is None


def test_a_name_is_no_key(filled):
    for call in (
        lambda: filled.artifacts.get("a", RECIPE),
        lambda: filled.artifacts.put(["a", "b"], RECIPE, [1]),
    ):
        with pytest.raises(ValueError, match=r"'a' is not the digest.*library\.digest\('a'\)"):
            call()
    filled.artifacts.put(filled.digest("a"), RECIPE, [1])
    assert filled.artifacts.get(filled["a"], RECIPE) == [1]


def test_order_of_experts_makes_no_difference_and_number_does(filled):
    a, b = filled["a"], filled["b"]
    filled.artifacts.put([a, b], RECIPE, [1])
    assert filled.artifacts.get([b, a], RECIPE) == [1]
    assert filled.artifacts.get([a, b, b], RECIPE) is None
    filled.artifacts.put([a], RECIPE, [2])
    assert filled.artifacts.get(a, RECIPE) == [2]


def test_similar_recipes_are_not_taken_for_each_other(filled):
    """FIELD: auxiliary data looked up by substring."""
    a = filled["a"]
    filled.artifacts.put(a, {"kind": "arrow"}, [1])
    assert filled.artifacts.get(a, {"kind": "arro"}) is None
    assert filled.artifacts.get(a, {"kind": "arrow", "top_k": 1}) is None
    assert filled.artifacts.get(a, {"kind": "Arrow"}) is None


def test_an_expert_without_weights_has_no_artifacts(filled):
    with pytest.raises(ValueError, match="'e' has no weights yet"):
        filled.artifacts.put(Expert(ExpertInfo("e")), RECIPE, [1])
    filled.add_expert(Expert(ExpertInfo("e")))
    with pytest.raises(ValueError, match="an expert without weights"):
        filled.artifacts.put(filled.digest("e"), RECIPE, [1])
    assert filled.artifacts.for_each(RECIPE) == {}


def test_a_recipe_is_run_once(filled):
    calls = []

    def make():
        calls.append(1)
        return {"x": torch.ones(2)}

    first = filled.artifacts.get_or_make(filled["a"], RECIPE, make)
    again = ExpertLibrary(filled.uri)
    second = again.artifacts.get_or_make(again["a"], RECIPE, make)
    assert torch.equal(first["x"], second["x"])
    assert len(calls) == 1


def test_what_many_experts_lack_is_made_and_kept_by_one_commit(filled):
    filled.artifacts.put(filled["b"], RECIPE, {"x": torch.zeros(2)})
    before, calls = filled.generation, []

    def make(expert):
        calls.append(expert.name)
        return {"x": torch.full((2,), float(ord(expert.name)))}

    experts = [filled[name] for name in ("c", "a", "b", "a")]
    values = filled.artifacts.get_or_make_each(experts, RECIPE, make)
    assert [value["x"][0] for value in values] == [99.0, 97.0, 0.0, 97.0]
    assert calls == ["c", "a"]
    assert filled.generation == before + 1
    again = ExpertLibrary(filled.uri)
    assert again.artifacts.get_or_make_each(experts, RECIPE, make)[0]["x"][0] == 99.0
    assert calls == ["c", "a"]
    assert list(again.artifacts.for_each(RECIPE)) == ["a", "b", "c"]
    with filled.batch():
        filled.artifacts.put_each([(filled["a"], [1]), (filled["b"], [2])], {"kind": "y"})
    assert filled.generation == before + 2


def test_values_of_many_experts_lie_in_the_library_and_not_in_memory(filled):
    held = []

    def make(expert):
        held.append(weakref.ref(next(iter(expert.expert_weights.values()))))
        return {"x": torch.ones(2)}

    experts = list(filled.values())
    values = filled.artifacts.get_or_make_each(experts, RECIPE, make)
    assert [ref() for ref in held] == [None] * 3
    assert {repr(each.expert_weights) for each in experts} == {"LazyTensors(not read yet)"}
    again = filled.artifacts.get_or_make_each(experts, RECIPE, make)
    assert {repr(value) for value in (*values, *again)} == {"LazyTensors(not read yet)"}
    assert len(held) == 3


def test_what_another_made_meanwhile_does_not_lose_what_this_one_made(filled):
    other = ExpertLibrary(filled.uri)

    def make(expert):
        if expert.name == "a":
            other.artifacts.put(expert, RECIPE, ["theirs"])
        return ["ours"]

    experts = list(filled.values())
    assert filled.artifacts.get_or_make_each(experts, RECIPE, make) == [["ours"]] * 3
    kept = ExpertLibrary(filled.uri).artifacts.for_each(RECIPE)
    assert kept == {"a": ["theirs"], "b": ["ours"], "c": ["ours"]}
    locked = ExpertLibrary(filled.uri, read_only=True)
    assert locked.artifacts.get_or_make_each(experts, {"kind": "z"}, make) == [["ours"]] * 3


def test_where_nothing_can_be_kept_the_value_is_still_given(filled):
    locked = ExpertLibrary(filled.uri, read_only=True)
    assert locked.artifacts.get_or_make(locked["a"], RECIPE, lambda: [1]) == [1]
    assert locked.artifacts.get(locked["a"], RECIPE) is None


def test_a_value_made_meanwhile_by_another_process_is_taken(filled):
    other = ExpertLibrary(filled.uri)

    def make():
        other.artifacts.put(other["a"], RECIPE, ["theirs"])
        return ["ours"]

    assert filled.artifacts.get_or_make(filled["a"], RECIPE, make) == ["theirs"]


def test_putting_again_replaces_and_equal_values_make_no_commit(filled):
    a = filled["a"]
    filled.artifacts.put(a, RECIPE, [1])
    before = filled.generation
    filled.artifacts.put(a, RECIPE, [1])
    assert ExpertLibrary(filled.uri).generation == before
    filled.artifacts.put(a, RECIPE, {"x": torch.ones(1)})
    assert torch.equal(filled.artifacts.get(a, RECIPE)["x"], torch.ones(1))


def test_two_different_values_put_at_once_conflict(filled):
    other = ExpertLibrary(filled.uri)
    other.artifacts.put(other["a"], RECIPE, [1])
    with pytest.raises(Conflict):
        filled.artifacts.put(filled["a"], RECIPE, [2])


def test_all_experts_artifacts_in_one_go(filled):
    filled.artifacts.put(filled["a"], RECIPE, [1])
    filled.artifacts.put(filled["c"], RECIPE, [3])
    filled.artifacts.put([filled["a"], filled["c"]], RECIPE, [4])
    assert filled.artifacts.for_each(RECIPE) == {"a": [1], "c": [3]}
    entries = filled.artifacts.entries()
    assert len(entries) == 3
    assert {entry.experts for entry in entries} == {
        (filled.digest("a"),),
        (filled.digest("c"),),
        tuple(sorted([filled.digest("a"), filled.digest("c")])),
    }
    assert all(entry.recipe == RECIPE for entry in entries)


def test_artifacts_are_not_experts(filled):
    filled.artifacts.put(filled["a"], RECIPE, [1])
    assert filled.keys() == ["a", "b", "c"]


def test_a_value_or_recipe_that_cannot_be_kept_is_an_error(filled):
    with pytest.raises(TypeError, match=r"artifact\.a is a Tensor"):
        filled.artifacts.put(filled["a"], RECIPE, {"a": torch.ones(1), "b": 1})
    with pytest.raises(TypeError, match=r"recipe\.f is a function"):
        filled.artifacts.put(filled["a"], {"f": lambda: 0}, [1])
    with pytest.raises(ValueError, match="artifact is nan"):
        filled.artifacts.put(filled["a"], RECIPE, float("nan"))


def test_scores_are_kept_by_content_task_metric_and_recipe(filled, make_expert):
    how = {"base": "f1", "split": "test"}
    a, b = filled["a"], filled["b"]
    filled.scores.put([], Score("t", "exact_match", 0.1, 100, how))
    filled.scores.put(a, Score("t", "exact_match", 0.7, 100, how))
    filled.scores.put([b, a], Score("t", "exact_match", 0.5, 100, how))
    again = ExpertLibrary(filled.uri)
    digests = tuple(sorted([a.digest, b.digest]))
    assert again.scores.get([a, b], "t", "exact_match", how) == Score(
        "t", "exact_match", 0.5, 100, how, digests
    )
    assert again.scores.get([], "t", "exact_match", how).value == 0.1
    assert again.scores.get(a, "t", "exact_match", how | {"split": "train"}) is None
    assert again.scores.get(a, "t", "rouge_l", how) is None
    assert again.scores.get(a, "u", "exact_match", how) is None
    table = again.scores.table()
    assert {score.experts: score.value for score in table} == {
        (): 0.1,
        (a.digest,): 0.7,
        digests: 0.5,
    }
    filled.scores.put(a, Score("t", "exact_match", 0.8, 200, how))
    assert filled.scores.get(a, "t", "exact_match", how).n == 200
    filled.replace_expert(make_expert("a", seed=9))
    assert filled.scores.get(filled["a"], "t", "exact_match", how) is None


def test_a_table_of_scores_is_read_from_the_log_alone(tmp_path, make_expert):
    library = LocalExpertLibrary(str(tmp_path), create=True)
    library.add_expert(make_expert("a"))
    with library.batch():
        for i in range(20):
            library.scores.put(library["a"], Score(f"t{i:02}", "exact_match", i / 20, 10))
    assert not (tmp_path / "artifacts").exists()
    table = LocalExpertLibrary(str(tmp_path)).scores.table()
    assert [score.value for score in table] == [i / 20 for i in range(20)]
