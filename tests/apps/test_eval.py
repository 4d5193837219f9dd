import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mttl_experts import ExpertLibrary
from mttl_routing import MERGES, learning
from mttl_routing.routers import Predictor, kinds
from mttl_storage import Repository


def results(folder="mttldata/eval"):
    return json.loads((Path(folder) / "results.json").read_text())


@pytest.fixture
def library(train):
    """Experts for both tasks."""
    outcome = train("--all", "--steps", "60", "--learning-rate", "0.02")
    assert outcome.exit_code == 0, outcome.output
    return ExpertLibrary("local://mttldata/library")


@pytest.fixture
def evaluate(app):
    return lambda *args: app("eval", "--precision", "32", *args)


def test_the_table_and_the_file_have_every_task_and_the_mean(library, evaluate):
    outcome = evaluate("--merge", "uniform")
    assert outcome.exit_code == 0, outcome.output
    found = results()
    assert found["method"] == "uniform"
    assert found["library"] == library.uri
    assert found["generation"] == library.generation
    assert found["experts"] == {name: library.digest(name) for name in library}
    assert [row["task"] for row in found["tasks"]] == ["copy_first", "copy_last"]
    for row in found["tasks"]:
        assert row.keys() == {
            "task", "metric", "n", "base", "base_two_shot", "expert", "model", "ci95", "in_mean"
        }  # fmt: skip
        low, high = row["ci95"]
        assert low <= row["model"] <= high
    for column in ("base", "expert", "model"):
        assert found["mean"][column] == pytest.approx(
            sum(row[column] for row in found["tasks"]) / 2
        )
    assert "copy_first" in outcome.output


def test_the_oracle_is_each_expert_on_its_own_task(library, evaluate):
    assert evaluate("--route", "oracle").exit_code == 0
    for row in results()["tasks"]:
        assert row["model"] == pytest.approx(row["expert"])
    assert results()["mean"]["expert"] > results()["mean"]["base"]


@pytest.mark.parametrize(
    "args",
    [
        ("--merge", "ties", "--rank", "2", "--density", "0.5"),
        ("--merge", "core", "--inside", "ties", "--density", "0.5", "--scale", "0.7"),
        ("--route", "arrow", "--top-k", "1"),
        ("--merge", "weighted", "--weights", "copy_first=0.25,copy_last=1"),
        ("--merge", "breadcrumbs", "--option", "gamma=0.01", "--scale", "0.5"),
        ("--route", "uniform"),
        ("--route", "spectr", "--top-p", "0.5", "--threshold", "0.1"),
        ("--route", "predictor", "--router-rows", "6"),
        ("--route", "lorauter", "--router-rows", "6"),
        ("--route", "retrieval", "--top-k", "1", "--router-rows", "6"),
        ("--route", "retrieval", "--then", "arrow", "--top-k", "2", "--router-rows", "6"),
        ("--route", "logo", "--top-k", "1"),
        ("--route", "seqr", "--top-k", "1", "--router-rows", "6"),
        ("--route", "softmax", "--top-k", "2", "--router-rows", "6", "--gate-steps", "2"),
        ("--route", "product_key", "--router-rows", "6", "--gate-steps", "2", "--recompute"),
        ("--route", "mlp", "--temperature", "2", "--router-rows", "6", "--gate-steps", "2"),
        ("--route", "poly", "--granularity", "model", "--router-rows", "6", "--gate-steps", "2"),
        ("--route", "mhr", "--router-rows", "6", "--gate-steps", "2"),
        ("-k", "merge_or_route=phatgoose", "router_rows=6", "gate_steps=3"),
        ("-k", "merge_or_route=avg_act", "topk=1"),
        ("-k", "merge_or_route=arrow", "router_temp=0.5", "recompute_prototypes=True"),
        ("-k", "merge_or_route=arrow", "router_granularity=block"),
        ("-k", "merge_or_route=uniform_lora_after_op"),
        ("-k", "merge_or_route=base"),
        ("--merge", "uniform", "--selection", "copy_last"),
    ],
)
def test_each_way_to_one_model_gives_scores(library, evaluate, args):
    outcome = evaluate(*args, "--test-rows", "4")
    assert outcome.exit_code == 0, outcome.output
    assert all(0 <= row["model"] <= 1 for row in results()["tasks"])


def test_routed_experts_are_mapped_from_files_and_score_the_same(library, evaluate):
    way = ("--route", "arrow", "--top-k", "1", "--test-rows", "8", "--recompute")
    evaluate(*way)
    in_memory = [row["model"] for row in results()["tasks"]]
    outcome = evaluate(*way, "--bank-files", "cache", "--resident-gb", "0.001")
    assert outcome.exit_code == 0, outcome.output
    assert [row["model"] for row in results()["tasks"]] == in_memory
    files = sorted(Path("cache/float32").iterdir())
    assert [file.stem for file in files] == sorted(library.digest(name) for name in library)
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-100] + bytes(100))
    outcome = evaluate(*way, "-k", "bank_files=cache")
    assert outcome.exit_code == 0, outcome.output
    assert [row["model"] for row in results()["tasks"]] == in_memory
    assert files[0].read_bytes() == whole


def test_seqr_is_calibrated_on_the_experts_own_rows(library, evaluate):
    evaluate("--route", "seqr", "--router-rows", "6")
    kinds = [entry.recipe["kind"] for entry in library.refresh().artifacts.entries()]
    assert kinds.count("norm-calibration") == 2


def test_gates_are_trained_once_for_as_many_steps_as_asked_for(library, evaluate, monkeypatch):
    trained = []
    real = kinds.train_gates

    def spy(base, expert, batches, *, steps, **options):
        trained.append((expert.name, steps))
        return real(base, expert, batches, steps=steps, **options)

    monkeypatch.setattr(kinds, "train_gates", spy)
    phatgoose = ("--route", "phatgoose", "--router-rows", "6", "--test-rows", "2")
    for top_k in ("2", "1"):
        outcome = evaluate(*phatgoose, "--gate-steps", "2", "--top-k", top_k)
        assert outcome.exit_code == 0, outcome.output
    assert sorted(trained) == [("copy_first", 2), ("copy_last", 2)]
    assert results()["settings"]["gate_steps"] == 2
    kept = [e.recipe for e in library.refresh().artifacts.entries() if "steps" in e.recipe]
    assert [recipe["steps"] for recipe in kept] == [2, 2]
    trained.clear()
    evaluate(*phatgoose, "--gate-steps", "2", "--recompute")
    assert sorted(trained) == [("copy_first", 2), ("copy_last", 2)]


@pytest.mark.parametrize("router", ["softmax", "poly"])
def test_a_router_is_trained_once_for_all_tasks_and_kept(library, evaluate, monkeypatch, router):
    trained = []
    real = learning.train

    def spy(routed, mixture, *args, **kwargs):
        trained.append([len(batch["labels"]) for batch in mixture])
        return real(routed, mixture, *args, **kwargs)

    monkeypatch.setattr(learning, "train", spy)
    way = ("--route", router, "--router-rows", "12", "--gate-steps", "3", "--test-rows", "4")
    for more in ((), ("--batch-size", "2"), ("--routing-accuracy", "--recompute")):
        outcome = evaluate(*way, *more)
        assert outcome.exit_code == 0, outcome.output
    assert [len(sizes) for sizes in trained] == [3, 3]  # in the second run it is there
    assert set(trained[0]) == {4, 8}
    assert results()["routing"]


def test_mhr_of_experts_of_several_ranks_is_one_clear_line(library, evaluate):
    wide = library["copy_last"]
    config = dict(wide.expert_info.expert_config)
    config["r"] *= 2
    weights = {
        name: torch.cat([value, value], dim=0 if ".lora_A." in name else 1)
        for name, value in wide.expert_weights.items()
    }
    info = replace(wide.expert_info, expert_config=config)
    library.replace_expert(replace(wide, expert_info=info, expert_weights=weights))
    outcome = evaluate("--route", "mhr", "--test-rows", "2")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "--route poly sums outputs" in " ".join(outcome.output.split())


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (
            ("--route", "arrow", "--gate-steps", "2"),
            "is for --route phatgoose, softmax, product_key, poly, mhr, mlp; arrow",
        ),
        (("--merge", "uniform", "--top-k", "2"), "--top-k is for --route arrow, spectr"),
        (
            ("--route", "arrow", "--router-rows", "2"),
            "is for --route phatgoose, centroid, seqr, softmax, product_key, poly, mhr, mlp, "
            "predictor, lorauter, retrieval; arrow",
        ),
        (
            ("--route", "oracle", "-k", "router_temp=2"),
            "phatgoose, centroid, softmax, product_key, mlp; oracle does without it",
        ),
        (("--top-k", "2"), "the base does without it"),
    ],
)
def test_a_setting_that_nothing_uses_is_said_to_be_so(library, evaluate, way, says):
    outcome = evaluate(*way, "--test-rows", "2")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.count(says) == 1
    assert " is for --route" not in evaluate("--route", "arrow", "--top-k", "2").output


def test_a_router_of_prompts_is_fitted_on_them_as_they_are_asked(library, evaluate, monkeypatch):
    asked, shown = [], []

    class Spy(Predictor):
        @classmethod
        def fit(cls, experts, examples, **options):
            shown.extend(tuple(one["input_ids"][0].tolist()) for one in examples["copy_first"])
            return super().fit(experts, examples, **options)

        def decide(self, prompt):
            for ids, mask in zip(prompt.input_ids, prompt.attention_mask, strict=True):
                asked.append(tuple(ids[mask > 0].tolist()))
            return super().decide(prompt)

    monkeypatch.setattr("mttl_routing.routers.kinds.Predictor", Spy)
    outcome = evaluate("--route", "predictor", "--router-rows", "6", "--test-rows", "4")
    assert outcome.exit_code == 0, outcome.output
    assert len(shown) == 6  # once for both tasks
    assert {len(ids) for ids in asked} == {len(ids) for ids in shown}  # the whole prompts
    assert len(asked) == 8
    places = enumerate(zip(*shown, *asked, strict=False))
    same = next(place for place, ids in places if len(set(ids)) > 1)
    assert (
        same > 3
    )  # the instruction comes before what is asked, and the template where there is one


def test_routing_accuracy_is_told_by_layer(library, evaluate):
    outcome = evaluate("--route", "oracle", "--routing-accuracy", "--test-rows", "4")
    assert outcome.exit_code == 0, outcome.output
    assert "100.0 % in the mean of " in " ".join(outcome.output.split())
    assert set(results()["routing"].values()) == {1.0}
    evaluate("--route", "arrow", "--top-k", "1", "--routing-accuracy", "--test-rows", "4")
    found, tasks = results()["routing"], results()["tasks"]
    assert all(0 < share < 1 for share in found.values())
    for layer, share in found.items():
        assert share == pytest.approx(sum(row["routing"][layer] for row in tasks) / 2)
    outcome = evaluate("--merge", "uniform", "--routing-accuracy")
    assert "--routing-accuracy is for --route" in outcome.output


def test_an_output_that_cannot_be_written_is_found_before_scoring(library, evaluate):
    Path("file").write_text("in the way")
    generation = library.generation
    outcome = evaluate("--merge", "uniform", "--output", "file")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "file" in outcome.output.strip().splitlines()[-1]
    assert library.refresh().generation == generation


def test_uniform_merging_is_uniform_routing(library, evaluate):
    evaluate("--merge", "uniform")
    merged = [row["model"] for row in results()["tasks"]]
    evaluate("--route", "uniform")
    assert [row["model"] for row in results()["tasks"]] == pytest.approx(merged)


def test_scores_are_measured_once(library, evaluate):
    evaluate("--merge", "uniform")
    generation = Repository.open(library.uri).generation
    assert evaluate("--merge", "uniform").exit_code == 0
    assert Repository.open(library.uri).generation == generation


def test_scores_are_measured_again_if_asked(library, evaluate):
    evaluate("--merge", "uniform")
    score = next(s for s in ExpertLibrary(library.uri).scores.table() if s.recipe.get("method"))
    wrong = replace(score, value=0.123)
    ExpertLibrary(library.uri).scores.put(list(score.experts), wrong)
    evaluate("--merge", "uniform", "--recompute")
    assert all(row["model"] != 0.123 for row in results()["tasks"])


def test_the_older_form_of_the_command_works(library, evaluate, monkeypatch):
    outcome = evaluate(
        *("-k", "output_dir=an_expert_eval/", f"library_id={library.uri}"),
        *("pipeline_eval_tasks=in_distribution", "merge_or_route='uniform'"),
    )
    assert outcome.exit_code == 0, outcome.output
    assert results("an_expert_eval")["method"] == "uniform"


def test_an_expert_for_another_base_is_refused(library, evaluate, tmp_path, base_folder, make_base):
    other = make_base(tmp_path / "other", seed=1)
    outcome = evaluate("--merge", "uniform", "--model", other)
    assert outcome.exit_code == 1
    last = outcome.output.strip().splitlines()[-1]
    assert str(base_folder) in last
    assert str(other) in last


def test_the_same_base_in_another_folder_is_the_same_base(
    library, evaluate, train, tmp_path, base_folder, monkeypatch
):
    shutil.copytree(base_folder, tmp_path / "copy")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert evaluate("--merge", "uniform", "--model", "~/copy").exit_code == 0
    # An expert trained on the copy is of the same base too.
    assert train("--task", "copy_last", "--expert-name", "x", model="~/copy").exit_code == 0
    assert library.refresh().infos()["x"].expert_model == str(tmp_path / "copy")
    outcome = evaluate("--merge", "uniform")
    assert outcome.exit_code == 0, outcome.output
    assert set(results()["experts"]) == {"copy_first", "copy_last", "x"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--merge", "unifrom"), ("'unifrom'", *MERGES)),
        (("--merge", "core", "--inside", "della"), ("'core' takes inside='tsv'",)),
        (("--merge", "uniform", "--density", "0.5"), ("'uniform' takes no density",)),
        (("--scale", "0.5"), ("--scale is for --merge",)),
        (("--route", "arow"), ("'arow'", "arrow", "oracle")),
        (("--merge", "uniform", "--bank-files", "cache"), ("--bank-files is for --route",)),
        (("--route", "arrow", "--resident-gb", "1"), ("--bank-files",)),
        (("--route", "fixed"), ("--selection",)),
        (("--route", "softmax", "--top-k", "1"), ("softmax", "2 or more")),
        (("--route", "retrieval", "--then", "softmax"), ("'softmax'", "arrow")),
        (("--merge", "weighted"), ("--weights",)),
        (("--merge", "ties", "--option", "gama=1"), ("gama", "density")),
        (("--route", "arrow", "--option", "gamma=1"), ("--option", "--merge")),
        (("--merge", "ties", "--route", "arrow"), ("give one",)),
        (("--library", "local://nope"), ("nope",)),
        (("--benchmarks", "hellaswag"), ("'hellaswag'", "arc-easy")),
        (("--metric", "rougeL"), ("'rougeL'", "rouge_l")),
        (("--route", "oracle", "--benchmarks", "piqa"), ("oracle", "another router")),
        (("-k", "merge_or_route=magic"), ("'magic'", "uniform_lora_after_op")),
    ],
)
def test_bad_input_is_one_clear_line(evaluate, args, words):
    outcome = evaluate(*args)
    assert outcome.exit_code in (1, 2)
    assert "Traceback" not in outcome.output
    for word in words:
        assert word in outcome.output.strip().splitlines()[-1]


def test_merges_in_the_library_are_left_out_unless_selected(library, evaluate, app):
    assert app("library", "merge", "uniform", "--name", "mean").exit_code == 0
    outcome = evaluate("--merge", "uniform")
    assert "left out, being merges: mean" in outcome.output
    assert list(results()["experts"]) == ["copy_first", "copy_last"]
    assert evaluate("--merge", "uniform", "--selection", "mean,copy_first,copy_last").exit_code == 0
    assert list(results()["experts"]) == ["copy_first", "copy_last", "mean"]


def test_a_value_that_the_merge_does_not_take_is_one_line(library, evaluate):
    outcome = evaluate("--merge", "ties", "--option", "density=2")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "density is 2" in outcome.output
