"""The older command lines on real tasks and benchmarks, and the main command on the real model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


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
