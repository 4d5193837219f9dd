from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from mttl_data import DatasetLibrary

APP = Path(__file__).parents[2] / "apps" / "dataset"
SMALL = ["--train", "6", "--validation", "2", "--test", "3"]


@pytest.fixture(scope="module")
def main():
    import runpy

    return runpy.run_path(str(APP / "__main__.py"), run_name="dataset_app")["main"]


@pytest.fixture
def run(main):
    return lambda *arguments: CliRunner().invoke(main, [str(part) for part in arguments])


@pytest.fixture
def flat(tmp_path):
    rows = [
        {"source": f"{task} {i}?", "target": str(i), "task_name": task, "task_source": "NIv2"}
        for task in ("wiqa", "ai2_arc/ARC-Easy:1.0.0")
        for i in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "flat.parquet")
    return tmp_path / "flat.parquet"


@pytest.mark.parametrize("command", [[], ["starter"], ["flan"], ["show"]])
def test_every_option_has_help(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    options = result.output.partition("Options:")[2].splitlines()
    assert all(len(line.split("  ")) > 1 for line in options if line.strip().startswith("--"))


def test_help_loads_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['dataset', '--help']\n"
        f"try: runpy.run_path({str(APP)!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "starter" in done.stdout


@pytest.mark.slow
def test_help_answers_in_half_a_second():
    subprocess.run([sys.executable, APP, "--help"], capture_output=True, check=True)
    start = time.monotonic()
    subprocess.run([sys.executable, APP, "--help"], capture_output=True, check=True)
    assert time.monotonic() - start < 0.5


def test_starter_makes_tasks_that_show_lists(run, tmp_path):
    uri = f"local://{tmp_path}/tasks"
    made = run("starter", "--library", uri, "--task", "lcm", "--task", "chain_sum", *SMALL)
    assert made.exit_code == 0, made.output
    assert "chain_sum" in made.output
    shown = run("show", "--library", uri, "--json", tmp_path / "out" / "show.json")
    assert shown.exit_code == 0, shown.output
    assert "chain_sum, test row 0" in shown.output
    assert "arithmetic problem" in shown.output
    content = json.loads((tmp_path / "out" / "show.json").read_text())
    assert [task["task"] for task in content["tasks"]] == ["chain_sum", "lcm"]
    assert content["tasks"][0]["sizes"] == {"train": 6, "validation": 2, "test": 3}
    one = run("show", "--library", uri, "--task", "lcm", "--samples", 2)
    assert "lcm, test row 1" in one.output
    assert "chain_sum" not in one.output


def test_starter_again_changes_nothing(run, tmp_path):
    uri = f"local://{tmp_path}/tasks"
    arguments = ["starter", "--library", uri, "--task", "lcm", *SMALL]
    run(*arguments)
    generation = DatasetLibrary(uri).repository.generation
    assert run(*arguments).exit_code == 0
    assert DatasetLibrary(uri).repository.generation == generation
    other = run(*arguments, "--seed", 1)
    assert other.exit_code == 1
    assert "'lcm'" in other.output
    assert run(*arguments, "--seed", 1, "--replace").exit_code == 0


@pytest.mark.parametrize("flag", ["--library=", "--dataset_library_id=", "--dataset-library-id="])
def test_flan_makes_the_flat_set_from_a_local_copy(run, tmp_path, flat, flag):
    uri = f"local://{tmp_path}/flan-flat"
    made = run("flan", f"{flag}{uri}", "--source", flat, "--limit", 20)
    assert made.exit_code == 0, made.output
    library = DatasetLibrary(uri)
    assert library.tasks() == ["ai2_arc_ARC_Easy_1_0_0", "wiqa"]
    assert sum(library.info("wiqa").sizes.values()) == 20
    assert "1 of these overlap the evaluation suite" in made.output


def test_flan_takes_chosen_tasks_alone(run, tmp_path, flat):
    uri = f"local://{tmp_path}/flan-flat"
    run("flan", "--library", uri, "--source", flat, "--task", "wiqa")
    assert DatasetLibrary(uri).tasks() == ["wiqa"]


def test_flan_without_a_hub_or_a_copy_is_one_clear_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    result = run("flan", "--library", f"local://{tmp_path}/flan-flat")
    assert result.exit_code == 1
    assert "chiayewken/flan-v2" in result.output
    assert "--source PATH" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "flan-flat").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["starter", "--task", "lcmm"], "did you mean 'lcm'"),
        (["flan", "--source", "nowhere.parquet"], "'nowhere.parquet'"),
        (["flan", "--limit", "0"], "--limit"),
        (["show"], "uv run apps/dataset starter"),
        (["show", "--library", "ftp://x"], "local://"),
    ],
)
def test_bad_input_is_one_clear_line(run, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code in (1, 2)
    assert says in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_task_to_show_gets_near_names(run, tmp_path):
    uri = f"local://{tmp_path}/tasks"
    run("starter", "--library", uri, "--task", "lcm", *SMALL)
    result = run("show", "--library", uri, "--task", "lc")
    assert result.exit_code == 1
    assert "did you mean 'lcm'" in result.output


def test_rows_that_cannot_be_had_lose_nothing(run, tmp_path):
    uri = f"local://{tmp_path}/tasks"
    run("starter", "--library", uri, "--task", "lcm", *SMALL)
    result = run("starter", "--library", uri, "--task", "lcm", "--train", 99999, "--replace")
    assert result.exit_code == 1
    assert "distinct rows" in result.output
    assert DatasetLibrary(uri).info("lcm").sizes["train"] == 6
