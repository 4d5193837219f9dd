import dataclasses

import pytest

from mttl_experts import (
    Expert,
    ExpertLibrary,
    ExpertNotFoundError,
    Node,
    Score,
    ScoreNotFoundError,
    recipe_of,
)
from mttl_storage import ReadOnly

HOW = {"base": "f1", "split": "test"}


@pytest.fixture
def family(library, make_expert):
    """Two experts, a merge of both, one of that merge, and a score of both routed."""
    for seed, name in enumerate(("a", "b")):
        training = {
            "kind": "train",
            "data": {f"task-{name}": f"data-{name}"},
            "versions": {"x": "1"},
        }
        library.add_expert(with_facts(make_expert(name, f"task-{name}", seed), training))
    library.add_expert(merged("ab", make_expert("ab", seed=2), library["a"], library["b"]))
    library.add_expert(merged("abab", make_expert("abab", seed=3), library["ab"], library["a"]))
    method = {"route": "arrow", "top_k": 2}
    experts = [library["a"], library["b"]]
    library.scores.put(experts, Score("task-a", "em", 0.5, 10, HOW | {"method": method}))
    library.scores.put(library["a"], Score("task-a", "em", 0.7, 10, HOW))
    return library


def with_facts(expert, training, **facts):
    info = dataclasses.replace(
        expert.expert_info, training_config=training, model_fingerprint="f1", **facts
    )
    return Expert(info, expert.expert_weights)


def merged(name, expert, *parents):
    return with_facts(
        expert,
        {"kind": "merge", "method": "ties"},
        parents=tuple(parent.name for parent in parents),
        parent_digests=tuple(parent.digest for parent in parents),
    )


def names(edges, end):
    return sorted(getattr(edge, end).name for edge in edges)


def test_lineage_goes_from_data_to_expert_to_merge_to_model(family):
    found = family.lineage("a")
    assert found.node == Node("expert", "a", family.digest("a"), "here")
    assert [(e.source.kind, e.source.name, e.how) for e in found.made_of(found.node)] == [
        ("data", "task-a", "trained on"),
        ("base", "test/llama", "base"),
    ]
    made = {edge.target.name: edge for edge in found.made_from(found.node)}
    assert {name: edge.target.kind for name, edge in made.items()} == {
        "ab": "merge",
        "abab": "merge",
        "route arrow top_k 2 of 2 experts": "model",
    }
    merge = made["ab"].target
    assert made["ab"].how == "ties"
    assert names(found.made_from(merge), "target") == ["abab"]
    whole = family.lineage("abab")
    assert names(whole.made_of(whole.node), "source") == ["a", "ab", "test/llama"]
    assert {node.name for node in whole.nodes if node.kind == "data"} == {"task-a", "task-b"}
    data = whole.to_dict()
    assert data["nodes"][0]["name"] == "abab"
    assert len(data["edges"]) == len(whole.edges)


def test_lineage_finds_parents_that_were_renamed_removed_or_replaced(family, make_expert):
    family.rename_expert("b", "c")
    family.replace_expert(make_expert("a", seed=7))
    found = family.lineage("ab")
    states = {edge.source.name: edge.source.state for edge in found.made_of(found.node)}
    assert states == {"a": "replaced", "c": "here", "test/llama": ""}
    family.remove_expert("c")
    assert ("c", "removed") in {(n.name, n.state) for n in family.lineage("ab").nodes}
    assert "(removed)" in str(next(n for n in family.lineage("ab").nodes if n.name == "c"))
    assert family.lineage("a").made_from(family.lineage("a").node) == []  # other weights now
    with pytest.raises(ExpertNotFoundError, match="'c'"):
        family.lineage("c")


def test_a_cycle_of_names_ends(library, make_expert):
    for name, parent in (("a", "b"), ("b", "a")):
        library.add_expert(with_facts(make_expert(name), None, parent_node=parent))
    assert {node.name for node in library.lineage("a").nodes} >= {"a", "b"}


def test_a_recipe_tells_what_decides_an_expert(family, make_expert):
    recipe = family.recipe("a")
    assert recipe.data == {"task-a": "data-a"}
    assert (recipe.base, recipe.tools) == ("f1", {"x": "1"})
    assert family.recipe("ab").parents == (family.digest("a"), family.digest("b"))
    infos = [make_expert("e").expert_info, make_expert("other").expert_info]
    assert recipe_of(infos[0]) == recipe_of(infos[1])  # a name decides nothing
    changed = make_expert("e", lora_alpha=9).expert_info
    assert recipe_of(changed).digest != recipe_of(infos[0]).digest
    own = dataclasses.replace(infos[0], recipe_digest="r")
    assert recipe_of(own).digest == "r"


def test_log_follows_an_expert_through_its_names(library, make_expert):
    library.add_expert(make_expert("e1"))
    library.add_expert(make_expert("other", seed=5))
    library.update_metrics("e1", {"loss": 2.0})
    library.rename_expert("e1", "e2")
    with library.batch("better weights"):
        library.replace_expert(make_expert("e2", seed=1))
        library.tag("other", "x")
    library.remove_expert("e2")
    events = library.log("e2", facts=True)
    kinds = [event.kind for event in events]
    assert kinds == ["remove", "replace", "info", "rename", "info", "add"]
    assert [event.generation for event in events] == [6, 5, 4, 4, 3, 1]
    assert events[1].message == "better weights"
    assert events[1].digest == make_expert("e2", seed=1).digest
    assert events[3].source == "e1"
    assert events[4].facts == {"metrics": (None, {"loss": 2.0})}
    assert events[2].facts == {"expert_name": ("e1", "e2")}
    assert [event.facts for event in library.log("e2")] == [{}] * 6
    assert [event.kind for event in library.log("other")] == ["info", "add"]
    assert library.log("e1")[0].name == "e2"
    with pytest.raises(ExpertNotFoundError, match="'nope'"):
        library.log("nope")


def test_blame_names_what_a_score_was_made_of(family, make_expert):
    table = {len(score.experts): score for score in family.scores.table()}
    found = family.blame(table[2])
    assert {node.name for node in found.experts} == {"a", "b"}
    assert (found.method, found.base) == ({"route": "arrow", "top_k": 2}, "f1")
    assert found.generation == family.generation - 1
    assert family.blame(table[1].digest[:10]).score == table[1]
    family.replace_expert(make_expert("a", seed=8))
    assert [node.state for node in family.blame(table[1]).experts] == ["replaced"]
    for wrong in ("", "zzz"):
        with pytest.raises(ScoreNotFoundError):
            family.blame(wrong)


def test_a_generation_can_be_read_as_it_was(family, make_expert):
    before = family.generation
    digest = family.digest("a")
    family.replace_expert(make_expert("a", seed=9))
    family.remove_expert("b")
    then = family.at(before)
    assert then.keys() == ["a", "ab", "abab", "b"]
    assert then.digest("a") == digest == then["a"].digest
    assert family.diff(then["a"], "a").distance > 0.1
    assert [change.name for change in family.history()[-1].changes] == ["experts/b"]
    with pytest.raises(ReadOnly, match="only read"):
        then.remove_expert("a")
    view = ExpertLibrary(family.uri, selection="a,abab")
    assert view.at(1).keys() == ["a"]


def test_tags_are_added_once_and_taken_off(library, make_expert):
    library.add_expert(make_expert("a"))
    library.tag("a", "x", "y")
    assert library.tag("a", "x", "z").tags == ("x", "y", "z")
    assert library.untag("a", "y", "nope").tags == ("x", "z")
    assert ExpertLibrary(library.uri).infos()["a"].tags == ("x", "z")
