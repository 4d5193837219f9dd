"""The older command lines on real tasks and benchmarks, and the main command on the real model."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mttl_adapters
from mttl_experts import ExpertLibrary

ROOT = Path(__file__).parents[2]
CACHE = os.environ.get("XDG_CACHE_HOME")


@pytest.fixture
def data():
    folder = os.environ.get("MTTL_TEST_DATA")
    if not folder:
        pytest.skip("MTTL_TEST_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture
def gpt_neo(tmp_path, base_folder):
    """A GPT-Neo of two layers, with the tiny tokenizer."""
    from transformers import AutoTokenizer, GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=256,
        eos_token_id=1,
    )
    path = tmp_path / "gpt_neo"
    GPTNeoForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(path)
    return path


def test_the_lines_of_the_older_readme_run_on_local_data(app, data, gpt_neo):
    trained = app(
        "train",
        *("-c", ROOT / "configs/wiki-mmlu/gptneo_125m_flan.json", "-k"),
        *("finetune_task_name=ai2_arc_ARC_Challenge_1_0_0", "num_train_epochs=1"),
        *("output_dir=an_expert/", "library_id=local://mttldata/mttladapters-predictor"),
        *("pipeline_eval_tasks=arc-easy", "expert_name=predictor"),
        *(f"model={gpt_neo}", f"dataset={data / 'flan_flat'}", f"data_dir={data}"),
        "subsample_test=6",
    )
    assert trained.exit_code == 0, trained.output
    found = json.loads(Path("an_expert/results.json").read_text())
    assert [row["expert_name"] for row in found["experts"]] == ["predictor"]
    assert {row["model"] for row in found["benchmarks"]} == {"base", "predictor"}
    evaluated = app(
        "eval",
        *("-k", "output_dir=an_expert_eval/", "library_id=local://mttldata/mttladapters-predictor"),
        *("pipeline_eval_tasks=arc-easy", "merge_or_route='uniform'", f"data_dir={data}"),
        "subsample_test=6",
    )
    assert evaluated.exit_code == 0, evaluated.output
    rows = json.loads(Path("an_expert_eval/results.json").read_text())["tasks"]
    assert {(row["task"], row["metric"]) for row in rows} == {
        ("arc-easy", "acc"),
        ("arc-easy", "acc_norm"),
    }
    assert all(row["n"] == 6 for row in rows)
    acc, norm = sorted(rows, key=lambda row: row["metric"])
    assert (acc["in_mean"], norm["in_mean"]) == (False, True)
    found = json.loads(Path("an_expert_eval/results.json").read_text())
    assert found["mean"]["model"] == norm["model"]
    assert "acc, not in mean" in evaluated.output


def test_data_that_are_not_there_are_one_clear_line(app, data, gpt_neo, tmp_path):
    outcome = app(
        "train",
        *("--model", gpt_neo, "--dataset", data / "flan_flat", "--steps", "1", "--test-rows", "2"),
        *("--task", "ai2_arc_ARC_Challenge_1_0_0", "--benchmarks", "arc-easy"),
        *("--data-dir", tmp_path),
    )
    assert outcome.exit_code == 1
    assert "ai2_arc" in outcome.output.strip().splitlines()[-1]
    assert not Path("mttldata").exists()  # found out before anything was made


@pytest.mark.slow
def test_the_main_command_on_a_tiny_budget(tmp_path):
    small = ["--task", "products", "--steps", "2", "--test-rows", "4"]
    command = [sys.executable, str(ROOT / "apps/train"), *small]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "products" in done.stdout
    assert "1 there already" in done.stdout
    (row,) = json.loads((tmp_path / "mttldata/train/results.json").read_text())["experts"]
    assert row["n"] == 4


@pytest.fixture
def two_experts(app, tmp_path, monkeypatch):
    """A library of two experts, trained for a few steps on the embedded model."""
    monkeypatch.delenv("XDG_CACHE_HOME")  # where the embedded model lies converted
    if CACHE is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", CACHE)
    rows = [
        {"source": f"What is the {task} of item {n}?", "target": target, "task_name": task}
        for task, target in (("colour", "turquoise"), ("animal", "zebra"))
        for n in range(60)
    ]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    address = f"local://{tmp_path}/lib"
    trained = app(
        "train",
        *("--dataset", tmp_path / "rows", "--all", "--library", address, "--steps", "8"),
        *("--batch-size", "4", "--learning-rate", "2e-3", "--test-rows", "1"),
    )
    assert trained.exit_code == 0, trained.output
    return address


@pytest.mark.slow
def test_examples_find_the_expert_for_them_on_the_embedded_model(
    app, two_experts, tmp_path, monkeypatch
):
    path = tmp_path / "examples.jsonl"
    rows = [{"source": f"Which colour has item {n}?", "target": "turquoise"} for n in range(90, 94)]
    path.write_text("\n".join(map(json.dumps, rows)))
    real, measured = mttl_adapters.mean_loss, []

    def mean_loss(model, batches):
        if len(measured) == 2:  # the base and one expert are done: Ctrl-C
            measured.append(None)
            signal.raise_signal(signal.SIGINT)
        measured.append(real(model, batches))
        return measured[-1]

    monkeypatch.setattr(mttl_adapters, "mean_loss", mean_loss)
    search = ("library", "search", "--library", two_experts, "--like", path, "--json")
    stopped = app(*search)
    assert stopped.exit_code == 130
    assert "Stopped" in stopped.output
    assert len(ExpertLibrary(two_experts).scores.table()) >= 2
    outcome = app(*search)
    assert outcome.exit_code == 0, outcome.output
    assert len(measured) == 4  # with the one that was stopped: nothing was measured twice
    first, second = json.loads(outcome.stdout)["found"]
    assert (first["expert_name"], second["expert_name"]) == ("colour", "animal")
    assert first["loss"] < second["loss"] - 0.1
    assert first["below_base"] > 0.1
    generation = ExpertLibrary(two_experts).generation
    assert app(*search).stdout == outcome.stdout
    assert len(measured) == 4
    assert ExpertLibrary(two_experts).generation == generation
