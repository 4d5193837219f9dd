"""A mixture from scratch through the app, on the tiny model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from mttl_adapters import load_base_model
from mttl_experts import ExpertLibrary
from mttl_routing import RoutedModel, Softmax

BOTH = ("--task", "copy_last", "--task", "copy_first")
MOE = (*BOTH, "--moe", "3", "--test-rows", "4", "--validation-rows", "4")
FOLDER = Path("mttldata/train/moe")


def results():
    return json.loads(Path("mttldata/train/results.json").read_text())


def test_a_mixture_is_trained_scored_kept_and_loads_as_one_model(train, base_folder):
    outcome = train(*MOE)
    assert outcome.exit_code == 0, outcome.output
    assert "RoutedModel.from_pretrained('mttldata/train/moe')" in outcome.output
    library = ExpertLibrary("local://mttldata/library")
    assert library.keys() == ["moe-0", "moe-1", "moe-2"]
    info = library.infos()["moe-1"]
    assert info.tasks == ("copy_last", "copy_first")
    assert info.recipe_digest == library.recipe("moe-1").digest
    assert info.training_config["moe"]["router"] == "softmax"
    assert info.metrics["examples"] == 24
    assert {node.kind for node in library.lineage("moe-1").nodes} >= {"expert", "data", "base"}
    assert library.verify() == []
    assert [row["task"] for row in results()["tasks"]] == ["copy_last", "copy_first"]
    assert results()["mean"].keys() == {"base", "base_two_shot", "expert"}
    assert not list(Path("mttldata/train/checkpoints").glob("*"))
    base = load_base_model(str(base_folder), dtype="32")
    with RoutedModel.from_pretrained(FOLDER, base_model=base) as routed:
        assert isinstance(routed.router, Softmax)
        assert routed.router.choice.top_k == 2
        for name in routed.experts:
            assert routed.expert(name).digest == library.digest(name)
            assert all(weight.any() for weight in library[name].expert_weights.values())


def test_what_is_there_is_skipped_and_what_is_half_there_is_made_again(train):
    assert train(*MOE).exit_code == 0
    generation = ExpertLibrary("local://mttldata/library").generation
    again = train(*MOE)
    assert "there already" in again.output
    assert ExpertLibrary("local://mttldata/library").generation == generation
    shutil.rmtree(FOLDER)
    lost = train(*MOE)
    assert lost.exit_code == 0, lost.output
    assert (FOLDER / "routed_model.json").is_file()
    assert train(*MOE, "--balance", "0.5").exit_code != 0  # of another recipe


@pytest.mark.parametrize("router", ["mlp", "product_key"])
def test_its_options_reach_the_model(train, base_folder, router):
    options = ("--router", router, "--top-k", "1", "--balance", "0", "--expert-name", "mix")
    outcome = train(*MOE, *options)
    assert outcome.exit_code == 0, outcome.output
    assert ("--top-k is for a router that chooses" in outcome.output) == (router == "mlp")
    folder = Path("mttldata/train/mix")
    record = json.loads((folder / "routed_model.json").read_text())
    assert (record["router"]["name"], record["router"]["options"]["top_k"]) == (router, 1)
    assert ExpertLibrary("local://mttldata/library").keys() == ["mix-0", "mix-1", "mix-2"]


@pytest.mark.parametrize("router", ["poly", "mhr"])
def test_blends_are_learned_for_each_task(train, base_folder, router):
    options = ("--router", router, "--steps", "30", "--learning-rate", "0.02", "--validation-rows")
    outcome = train(*MOE, *options, "4")
    assert outcome.exit_code == 0, outcome.output
    recipe = ExpertLibrary("local://mttldata/library").infos()["moe-0"].training_config["moe"]
    assert (recipe["router"], recipe["combine"], recipe["balance"]) == (router, "before", 0)
    base = load_base_model(str(base_folder), dtype="32")
    with RoutedModel.from_pretrained(FOLDER, base_model=base) as routed:
        assert routed.router.tasks == ("copy_first", "copy_last")
        first, last = next(iter(routed.router.logits.values()))
        assert not torch.allclose(first, last, atol=0.01)  # they began within 0.002
    assert "there already" in train(*MOE, *options, "4").output


def test_an_interrupted_mixture_goes_on_and_ends_the_same(train, monkeypatch):
    import train_moe

    def interrupted(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train_moe, "_with_metrics", interrupted)
        train(*MOE, "--checkpoint-seconds", "-1")
    assert list(Path("mttldata/train/checkpoints").glob("moe-*"))
    assert ExpertLibrary("local://mttldata/library").keys() == []
    outcome = train(*MOE)
    assert "went on from step 3" in outcome.output
    digests = [ExpertLibrary("local://mttldata/library").digest(f"moe-{n}") for n in range(3)]
    whole = train(*MOE, "--library", "local://other", "--output", "elsewhere")
    assert whole.exit_code == 0, whole.output
    assert digests == [ExpertLibrary("local://other").digest(f"moe-{n}") for n in range(3)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*MOE, "--benchmarks", "arc-easy"), "apps/eval"),
        ((*MOE, "--router", "mlp", "--balance", "0.1"), "nothing to even out"),
        ((*MOE, "--router", "poly", "--balance", "0.1"), "poly gives every expert to every token"),
        ((*BOTH, "--router", "mlp"), "--router is for --moe"),
        ((*BOTH, "--balance", "0.1"), "--balance is for --moe"),
    ],
)
def test_what_does_not_go_together_is_said(train, arguments, said):
    outcome = train(*arguments)
    assert outcome.exit_code != 0
    assert said in " ".join(outcome.output.replace("│", " ").split())
