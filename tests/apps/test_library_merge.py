import json
import sys
from dataclasses import replace

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary, IncompatibleExpertWarning
from mttl_routing import merge

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layer"]}


@pytest.fixture
def address(tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    for number, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(number)
        weights = {
            "base_model.model.layer.lora_A.weight": torch.randn(2, 6, generator=generator),
            "base_model.model.layer.lora_B.weight": torch.randn(5, 2, generator=generator),
        }
        info = ExpertInfo(name, f"{name}_task", expert_config=CONFIG, expert_model="some/base")
        library.add_expert(Expert(info, weights))
    return library.uri


def merged(app, address, *args):
    outcome = app("library", "merge", *args, "--library", address, "--json")
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout)


def test_the_merge_is_an_expert_of_the_library(app, address):
    done = merged(app, address, "ties", "--option", "density=0.5", "--name", "both")
    library = ExpertLibrary(address)
    expected = merge([library["one"], library["two"]], "ties", density=0.5, name="both")
    assert library["both"].digest == expected.digest == done["digest"]
    assert library["both"].expert_info == expected.expert_info
    assert done["experts"] == ["one", "two"]


def test_merging_again_computes_nothing_and_changes_nothing(app, address, monkeypatch):
    first = merged(app, address, "uniform")
    generation = ExpertLibrary(address).generation

    def fail(*_):
        raise AssertionError("it was computed again")

    monkeypatch.setattr(sys.modules["mttl_routing.merge"], "factored", fail)
    assert merged(app, address, "uniform") == first
    assert ExpertLibrary(address).generation == generation
    other_name = merged(app, address, "uniform", "--name", "mean")
    assert other_name["digest"] == first["digest"]
    outcome = app("library", "merge", "uniform", "--rank", "1", "--library", address)
    assert isinstance(outcome.exception, AssertionError)


def test_merges_are_left_out_unless_named(app, address):
    first = merged(app, address, "uniform", "--name", "mean")
    assert merged(app, address, "task_arithmetic")["experts"] == ["one", "two"]
    again = merged(app, address, "slerp", "--expert", "mean", "--expert", "one")
    assert again["experts"] == ["mean", "one"]
    assert ExpertLibrary(address)[again["expert"]].expert_info.parent_digests[0]
    assert first["expert"] == "mean"


def test_weights_rank_and_another_library(app, address, tmp_path):
    into = f"local://{tmp_path}/merges"
    done = merged(
        app, address, "weighted", "--weights", "one=1,two=-0.5", "--rank", "1", "--into", into
    )
    assert 0 < done["energy_kept"] < 1
    assert list(ExpertLibrary(into)) == [done["expert"]]
    assert list(ExpertLibrary(address)) == ["one", "two"]


def test_a_merge_that_another_library_keeps_is_found_there(app, address, tmp_path, monkeypatch):
    first = merged(app, address, "uniform", "--into", f"local://{tmp_path}/merges")
    monkeypatch.delattr(sys.modules["mttl_routing.merge"], "factored")
    assert merged(app, address, "uniform", "--into", f"local://{tmp_path}/merges") == first


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("unifrom",), ("unifrom", "uniform", "wudi")),
        (("?",), ("ties", "knots")),
        (("weighted",), ("needs weights",)),
        (("ties", "--option", "dens=1"), ("dens", "density")),
        (("ties", "--option", "density"), ("KEY=VALUE",)),
        (("uniform", "--expert", "on"), ("'one'",)),
        (("weighted", "--weights", "one=1"), ("two",)),
    ],
)
def test_what_cannot_be_is_one_clear_line(app, address, args, words):
    outcome = app("library", "merge", *args, "--library", address)
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert outcome.exit_code != 0
    for word in words:
        assert word in outcome.output


def test_other_weights_of_one_base_are_said_and_strictly_refused(app, address):
    library = ExpertLibrary(address)
    one, two = (
        replace(each, expert_info=replace(each.expert_info, model_fingerprint=digest))
        for each, digest in ((library["one"], "a" * 64), (library["two"], "b" * 64))
    )
    library.replace_expert(one)
    with pytest.warns(IncompatibleExpertWarning):
        library.replace_expert(two)
    outcome = app("library", "merge", "uniform", "--library", address, "--strict")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "a" * 64 in outcome.output
    assert "b" * 64 in outcome.output
    assert len(ExpertLibrary(address)) == 2
    outcome = app("library", "merge", "uniform", "--library", address)
    assert outcome.exit_code == 0, outcome.output
    assert "warning: expert " in outcome.output
