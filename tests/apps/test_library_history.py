import json

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary, Score

NAME = "base_model.model.layer"


def expert(name, value=1.0, **facts):
    weights = {
        f"{NAME}.lora_A.weight": torch.full((2, 4), value),
        f"{NAME}.lora_B.weight": torch.eye(3, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
    info = ExpertInfo(name, "sums", expert_config=config, expert_model="some/base", **facts)
    return Expert(info, weights)


@pytest.fixture
def library(tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    library.add_expert(expert("one"))
    library.add_expert(
        expert("two", 2.0, parents=("one",), parent_digests=(library.digest("one"),))
    )
    library.update_metrics("one", {"loss": 1.5})
    library.scores.put(library["one"], Score("sums", "em", 0.75, 8, {"base": "f1"}))
    return library


@pytest.fixture
def run(app, library):
    def command(*args, **kwargs):
        outcome = app("library", *args, "--library", library.uri)
        assert outcome.exit_code == 0, outcome.output
        return outcome.stdout

    return command


def test_log_shows_what_changed_newest_first(run):
    events = json.loads(run("log", "one", "--json"))
    assert [event["kind"] for event in events] == ["info", "add"]
    assert events[0]["facts"] == {"metrics": [None, {"loss": 1.5}]}
    assert "metrics None -> {'loss': 1.5}" in run("log", "one")
    commits = json.loads(run("log", "-n", "2", "--json"))
    assert len(commits) == 2
    assert commits[1]["changes"] == ["info experts/one"]
    assert "add experts/two" in run("log")


def test_lineage_is_a_tree_of_both_directions(run):
    shown = run("lineage", "one").splitlines()
    assert shown[0].startswith("expert one ")
    assert any(line.strip().startswith("<- trained on: data sums") for line in shown)
    assert any(line.strip().startswith("-> parent: expert two") for line in shown)
    graph = json.loads(run("lineage", "two", "--json"))
    assert {node["name"] for node in graph["nodes"]} == {"one", "two", "some/base", "sums"}


def test_diff_shows_facts_and_modules_also_of_older_generations(run, library):
    found = json.loads(run("diff", "one", "two", "--json"))
    assert found["modules"]["layer"]["cosine"] == pytest.approx(1.0)
    assert found["distance"] > 0
    assert "distance of ΔW" in run("diff", "one", "two")
    library.replace_expert(expert("one", 3.0))
    found = json.loads(run("diff", "one@1", "one", "--json"))
    assert found["facts"] == {}
    assert found["distance"] > 0
    assert "byte for byte" in run("diff", "one", "one")


def test_blame_names_experts_and_commit(run, library):
    (row,) = json.loads(run("blame", "sums", "--json"))
    assert row["experts"][0]["name"] == "one"
    assert row["generation"] == 4
    assert json.loads(run("blame", row["digest"][:8], "--json")) == [row]
    assert json.loads(run("blame", "--expert", "two", "--json")) == []
    assert "one" in run("blame")
    library.remove_expert("one")
    assert "one (removed)" in run("blame", "sums")


def test_an_unknown_score_is_one_line(app, library):
    outcome = app("library", "blame", "nope", "--library", library.uri)
    assert outcome.exit_code == 1
    assert "'nope'" in outcome.output.strip().splitlines()[-1]
