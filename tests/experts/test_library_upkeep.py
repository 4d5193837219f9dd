import dataclasses

import pytest
import torch

from mttl_experts import (
    Expert,
    ExpertExistsError,
    ExpertInfo,
    ExpertLibrary,
    ExpertNotFoundError,
    Score,
)
from mttl_storage import NotFound

RECIPE = {"kind": "x"}


@pytest.fixture
def filled(library, make_expert):
    """Experts a and b, each with an artifact and a score, and an artifact of both."""
    for seed, name in enumerate("ab"):
        library.add_expert(make_expert(name, seed=seed))
        library.artifacts.put(library[name], RECIPE, {"v": torch.full((3,), float(seed))})
        library.scores.put(library[name], Score("t", "em", 0.5, 10))
    library.artifacts.put(list(library.values()), RECIPE, ["both"])
    return library


# Removing


def test_a_soft_removal_takes_artifacts_along_and_brings_them_back(filled):
    expert = filled["a"]
    filled.remove_expert("a")
    assert list(filled.artifacts.for_each(RECIPE)) == ["b"]
    filled.restore_expert("a")
    assert list(filled.artifacts.for_each(RECIPE)) == ["a", "b"]
    assert filled.scores.get(expert, "t", "em").value == 0.5


def test_a_hard_removal_cannot_be_undone_and_takes_artifacts_and_scores(filled):
    before = filled.generation
    digest = filled.digest("a")
    filled.remove_expert("a", hard=True)
    assert filled.generation == before + 1
    with pytest.raises((ExpertNotFoundError, NotFound), match="'a'"):
        filled.restore_expert("a")
    assert [e.experts for e in filled.artifacts.entries()] == [(filled.digest("b"),)] * 2
    assert [score.experts for score in filled.scores.table()] == [(filled.digest("b"),)]
    assert filled.verify() == []
    collected = filled.gc(grace=0)
    assert collected.files > 0
    assert not [e for e in filled.repository.store.scan() if digest in e.key]
    assert dict(filled["b"].expert_weights)
    assert filled.verify() == []


def test_a_hard_removal_leaves_what_another_expert_of_equal_weights_needs(filled):
    same = dataclasses.replace(filled["a"].expert_info, expert_name="twin")
    filled.add_expert(Expert(same, filled["a"].expert_weights))
    filled.remove_expert("a", hard=True)
    assert list(filled.artifacts.for_each(RECIPE)) == ["b", "twin"]


def test_a_hard_removal_is_a_part_of_its_batch(filled, make_expert):
    before = filled.generation
    with filled.batch():
        filled.remove_expert("a", hard=True)
        filled.add_expert(make_expert("c", seed=3))
        filled.add_expert(Expert(ExpertInfo("d")))
        filled.remove_expert("d", hard=True)
    assert filled.generation == before + 1
    assert filled.keys() == ["b", "c"]


# gc


def test_gc_collects_artifacts_and_scores_with_their_expert(filled, make_expert):
    """FIELD: Azure deletes are never awaited, among others."""
    filled.replace_expert(make_expert("a", seed=7))
    filled.remove_expert("b")
    filled.gc()  # within the grace nothing goes
    assert len(filled.artifacts.entries()) == 5
    filled.restore_expert("b")
    filled.gc(grace=0)
    assert {e.experts for e in filled.artifacts.entries()} == {(filled.digest("b"),)}
    assert len(filled.scores.table()) == 1
    filled.remove_expert("b")
    collected = filled.gc(grace=0)
    assert filled.artifacts.entries() == []
    assert collected.items >= 3
    assert filled.verify() == []


def test_gc_keeps_what_was_measured_of_the_base_alone(filled):
    filled.scores.put([], Score("t", "em", 0.1, 10))
    filled.remove_expert("a")
    filled.remove_expert("b")
    filled.gc(grace=0)
    assert [score.value for score in filled.scores.table()] == [0.1]


# update_from


def test_update_from_takes_what_is_new_with_its_artifacts(filled, address, make_expert):
    target = ExpertLibrary(address("target"), create=True)
    target.add_expert(make_expert("own", seed=9))
    assert target.update_from(filled) == ["a", "b"]
    assert target.keys() == ["a", "b", "own"]
    assert list(target.artifacts.for_each(RECIPE)) == ["a", "b"]
    generation = target.generation
    assert target.update_from(filled.uri) == []
    assert target.generation == generation
    filled.replace_expert(make_expert("a", seed=7))
    filled.tag("b", "new")
    assert target.update_from(filled) == ["a", "b"]  # as it was there before: brought forward
    assert target.digest("a") == filled.digest("a")
    assert target.infos()["b"].tags == ("new",)


def test_update_from_overwrites_nothing_that_was_changed_here(filled, address, make_expert):
    target = filled.copy_to(address("target"))
    target.replace_expert(make_expert("a", seed=7))
    target.remove_expert("b")
    filled.add_expert(make_expert("c", seed=3))
    with pytest.raises(ExpertExistsError, match=r"1 of the experts .*'a'.*replace=True"):
        target.update_from(filled)
    assert target.refresh().keys() == ["a"]
    assert target.update_from(filled, replace=True) == ["a", "b", "c"]
    assert target.digest("a") == filled.digest("a")


def test_update_from_leaves_removed_what_was_removed_here(filled, address):
    target = filled.copy_to(address("target"))
    target.remove_expert("b")
    assert target.update_from(filled) == []
    assert target.keys() == ["a"]


def test_update_from_takes_what_the_other_shows(filled, address):
    target = ExpertLibrary(address("target"), create=True)
    view = ExpertLibrary(filled.uri, selection="a")
    assert target.update_from(view) == ["a"]
    assert [e.experts for e in target.artifacts.entries()] == [(filled.digest("a"),)] * 2
