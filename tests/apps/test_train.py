import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mttl_experts import ExpertLibrary
from mttl_storage import Repository

ROOT = Path(__file__).parents[2]


def results(folder="mttldata/train"):
    return json.loads((Path(folder) / "results.json").read_text())


def last_line(outcome):
    return outcome.output.strip().splitlines()[-1]


def test_an_expert_is_trained_scored_and_kept_with_its_facts(train, base_folder):
    outcome = train("--task", "copy_last")
    assert outcome.exit_code == 0, outcome.output
    library = ExpertLibrary("local://mttldata/library")
    info = library.infos()["copy_last"]
    assert info.tasks == ("copy_last",)
    assert info.expert_model == str(base_folder)
    assert info.model_fingerprint
    assert info.model_architecture == "llama"
    assert info.recipe_digest == library.recipe("copy_last").digest
    assert info.dataset_digest
    assert library.recipe("copy_last").tools["peft"]
    assert {node.kind for node in library.lineage("copy_last").nodes} == {"expert", "data", "base"}
    assert info.metrics["examples"] == 24
    (row,) = results()["experts"]
    assert row["metric"] == "rouge_l"
    assert row["n"] > 0
    assert {"base", "base_two_shot", "expert", "tokens_per_second", "seconds"} <= row.keys()
    assert library.verify() == []
    assert "copy_last" in outcome.output


def test_what_is_there_is_skipped(train):
    first = train("--task", "copy_last")
    generation = ExpertLibrary("local://mttldata/library").generation
    again = train("--task", "copy_last")
    assert "1 there already" in again.output
    assert ExpertLibrary("local://mttldata/library").generation == generation
    assert first.exit_code == again.exit_code == 0


def test_another_recipe_under_a_taken_name_is_refused_and_loses_nothing(train):
    train("--task", "copy_last")
    digest = ExpertLibrary("local://mttldata/library").digest("copy_last")
    outcome = train("--task", "copy_last", "--seed", "5")
    assert outcome.exit_code != 0
    assert "training.seed 0, here 5" in outcome.output
    assert "--replace" in last_line(outcome)
    assert ExpertLibrary("local://mttldata/library").digest("copy_last") == digest
    assert train("--task", "copy_last", "--seed", "5", "--replace").exit_code == 0
    assert ExpertLibrary("local://mttldata/library").digest("copy_last") != digest


def test_one_expert_for_two_tasks_and_one_each(train):
    outcome = train("--task", "copy_last,copy_first", "--expert-name", "both")
    assert outcome.exit_code == 0, outcome.output
    assert train("--all").exit_code == 0
    library = ExpertLibrary("local://mttldata/library")
    assert library.keys() == ["both", "copy_first", "copy_last"]
    assert library.infos()["both"].tasks == ("copy_last", "copy_first")  # as they were asked for
    assert library.infos()["copy_first"].tasks == ("copy_first",)


def test_keys_of_the_older_command_line_set_the_same_options(app, base_folder, task_folder):
    Path("a.json").write_text(json.dumps({"lora_rank": 2, "total_steps": 9, "precision": "32"}))
    Path("b.json").write_text(json.dumps({"total_steps": 2}))
    outcome = app(
        "train",
        *("-c", "a+b.json", "-k", f"model={base_folder}", f"dataset={task_folder}"),
        *("finetune_task_name=copy_last", "expert_name=predictor", "output_dir=an_expert/"),
        *("library_id=local://lib", "include_task_source=P3", "max_output_length=4"),
    )
    assert outcome.exit_code == 0, outcome.output
    info = ExpertLibrary("local://lib").infos()["predictor"]
    assert info.expert_config["r"] == 2
    assert info.training_config["steps"] == 2
    assert info.training_config["filters"]["task_source"] == ["P3"]
    assert results("an_expert")["experts"][0]["expert_name"] == "predictor"


def test_one_config_file_does_for_both_apps(app, base_folder, task_folder):
    config = {
        **{"lora_rank": 2, "total_steps": 2, "finetune_task_name": ["copy_last", "copy_first"]},
        **{"model": str(base_folder), "dataset": str(task_folder), "precision": "32"},
        **{"merge_or_route": "arrow", "router_temp": 0.5, "subsample_test": 3},
    }
    Path("both.json").write_text(json.dumps(config))
    trained = app("train", "-c", "both.json")
    assert trained.exit_code == 0, trained.output
    assert "without effect here: merge_or_route, router_temp\n" in trained.output
    assert ExpertLibrary("local://mttldata/library").keys() == ["copy_first", "copy_last"]
    evaluated = app("eval", "-c", "both.json")
    assert evaluated.exit_code == 0, evaluated.output
    assert "without effect here: lora_rank, total_steps, finetune_task_name\n" in evaluated.output
    assert results("mttldata/eval")["settings"]["temperature"] == 0.5


def test_each_app_knows_the_keys_of_the_other(app):
    for name in ("train", "eval"):
        app(name, "--help")
    train, evaluate = (sys.modules[f"{name}_app"].main for name in ("train", "eval"))
    assert train.others == evaluate.keys().keys() - train.keys().keys()
    assert evaluate.others == train.keys().keys() - evaluate.keys().keys()


def test_limits_on_rows_hold_for_each_task_of_an_expert(train):
    both = ("--task", "copy_last,copy_first", "--expert-name", "both")
    assert train(*both, "--train-rows", "10", "--validation-rows", "3").exit_code == 0
    training = ExpertLibrary("local://mttldata/library").infos()["both"].training_config
    assert training["rows"] == {"train": 20, "validation": 6}


def test_epochs_count_steps(train):
    assert train("--task", "copy_last", "--epochs", "2", "--batch-size", "10").exit_code == 0
    training = ExpertLibrary("local://mttldata/library").infos()["copy_last"].training_config
    assert training["steps"] == 2 * -(-training["rows"]["train"] // 10)


def test_a_copy_of_the_library_takes_the_expert_if_asked(train):
    train("--task", "copy_last")
    assert train("--task", "copy_first", "--destination", "local://copy").exit_code == 0
    assert ExpertLibrary("local://mttldata/library").keys() == ["copy_last"]
    assert ExpertLibrary("local://copy").keys() == ["copy_first", "copy_last"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--task", "copy_lats"), ("'copy_lats'", "did you mean 'copy_last'")),
        ((), ("which tasks", "--task")),
        (("--task", "copy_last", "--rank", "0"), ("--rank", "0")),
        (("--task", "copy_last", "--layers", "nope"), ("'nope'", "q_proj")),
        (("--task", "copy_last", "--all"), ("--all",)),
        (("--task", "copy_last", "--expert-name", "a/b"), ("'a/b'", "'a_b'")),
        (("--task", "copy_last", "--library", "s3://bucket"), ("'s3'", "local")),
        (("--expert-name", "x", "--all"), ("--expert-name 'x'", "many")),
        (("--task", "copy_last", "--steps", "1", "--epochs", "1"), ("--steps and --epochs",)),
        (("--task", "copy_last", "--task-source", "CoT"), ("no train rows", "CoT")),
        (("-k", "lora_rnk=3"), ("unknown key 'lora_rnk'", "'lora_rank'")),
        (("-k", "lora_rank"), ("KEY=VALUE",)),
        (("-klora_rnk=3",), ("unknown key 'lora_rnk'",)),
        (("-cnope",), ("no config file 'nope'",)),
        (("--task", "copy_last", "--metric", "rougeL"), ("'rougeL'", "rouge_l")),
        (("--task", "copy_last", "--scheduler", "foo"), ("'foo'", "linear")),
        (("--task", "copy_last", "--layers", "*_proj"), ("--layers", "regular expression")),
        (("--task", "copy_last", "--task", "copy_last"), ("twice",)),
        (("-c", "nope"), ("no config file 'nope'", "configs")),
        (("--task", "copy_last", "--benchmarks", "arc-hard"), ("arc-hard", "arc-easy")),
    ],
)
def test_bad_input_is_one_clear_line(train, args, words):
    outcome = train(*args)
    assert outcome.exit_code in (1, 2)
    assert "Traceback" not in outcome.output
    for word in words:
        assert word in last_line(outcome)


def test_a_config_that_is_not_json_says_where(train):
    Path("bad.json").write_text('{"rank": 4,\n oops}')
    outcome = train("-c", "bad.json")
    assert "'bad.json' is not JSON" in last_line(outcome)
    assert "line 2" in last_line(outcome)


def test_a_dataset_that_is_not_there_says_what_to_pass(train):
    outcome = train("--task", "copy_last", dataset="nowhere")
    assert "no dataset at 'nowhere'" in last_line(outcome)


def whole_row(**changes):
    return {"source": "w1 w2", "target": "w2", "task_name": "t"} | changes


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("rows.jsonl", [{"source": "a", "target": "b"}], ("no column task_name", "source, target")),
        ("rows.jsonl", b"not json\n", ("line 1", "'{path}'")),
        ("rows.jsonl", b'{"source": "\xff"}\n', ("line 1", "'{path}'")),
        ("rows.parquet", b"PAR1 not parquet", ("'{path}'", "parquet")),
        ("rows.parquet", [whole_row(target=["b"])], ("'{path}'", "text")),
    ],
)
def test_a_folder_of_bad_rows_is_one_clear_line(train, tmp_path, name, content, words):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "rows" / name
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_text("\n".join(map(json.dumps, content)))
    outcome = train("--task", "t", dataset=path.parent)
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.output
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    for word in words:
        assert word.format(path=path) in last_line(outcome)


def test_a_task_without_rows_to_score_on_is_found_before_training(train, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(whole_row(split="train")) for _ in range(9)))
    outcome = train("--task", "t", dataset=path)
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "no test rows; it has train 9" in last_line(outcome)
    assert ExpertLibrary("local://mttldata/library").keys() == []


def test_a_library_copied_to_itself_is_one_clear_line(train):
    outcome = train("--task", "copy_last", "--library", "local://a", "--destination", "local://a")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "copied to itself" in last_line(outcome)


def test_starter_tasks_of_other_sizes_are_trained_on_and_it_says_so(app, base_folder):
    sizes = ("--train", "8", "--validation", "2", "--test", "3")
    assert app("dataset", "starter", "--task", "products", *sizes).exit_code == 0
    outcome = app(
        "train",
        *("--model", base_folder, "--task", "products", "--steps", "1", "--precision", "32"),
    )
    assert outcome.exit_code == 0, outcome.output
    assert "warning: " in outcome.output
    assert "has products with other sizes" in outcome.output
    assert results()["experts"][0]["n"] == 3


def test_a_model_folder_without_weights_is_one_clear_line(train, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    outcome = train("--task", "copy_last", model=tmp_path / "empty")
    assert "no weights" in last_line(outcome)


def test_a_library_that_cannot_be_written_is_one_clear_line(train, tmp_path):
    (tmp_path / "file").write_text("in the way")
    outcome = train("--task", "copy_last", "--library", "local://file")
    assert outcome.exit_code == 1
    assert "file is in the way" in last_line(outcome)


def test_a_training_that_diverges_is_one_clear_line(train):
    outcome = train("--task", "copy_last", "--learning-rate", "1e30")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "diverged" in last_line(outcome)
    assert ExpertLibrary("local://mttldata/library").keys() == []


def test_a_full_disk_loses_checkpoints_and_not_the_training(train, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mttl_adapters.loop.save_checkpoint", full)
    outcome = train("--task", "copy_last", "--checkpoint-seconds", "0")
    assert outcome.exit_code == 0, outcome.output
    assert outcome.output.count("warning: cannot write the checkpoint") == 1
    assert ExpertLibrary("local://mttldata/library").keys() == ["copy_last"]


def test_an_output_that_cannot_be_written_is_one_clear_line(train):
    Path("file").write_text("in the way")
    outcome = train("--task", "copy_last", "--output", "file")
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.output
    assert "file" in last_line(outcome)
    assert "training" not in outcome.output  # found before it
    assert ExpertLibrary("local://mttldata/library").keys() == []


def test_too_long_rows_are_cut_and_counted(train):
    outcome = train("--task", "copy_last", "--max-input-length", "9")
    assert outcome.exit_code == 0, outcome.output
    assert "rows were too long and lost" in outcome.output


def test_scoring_chooses_and_cuts_rows_as_training_does(train, app):
    limits = ("--max-input-length", "9", "--max-output-length", "1")
    outcome = train("--task", "copy_last", *limits, "--task-source", "P3", "--test-rows", "3")
    assert outcome.exit_code == 0, outcome.output
    scores = ExpertLibrary("local://mttldata/library").scores.table()
    assert len(scores) == 3
    for score in scores:
        assert score.n == 3
        assert (score.recipe["max_input_length"], score.recipe["max_output_length"]) == (9, 1)
    generation = Repository.open("local://mttldata/library").generation
    assert app("eval", "--precision", "32", "--test-rows", "3").exit_code == 0
    assert Repository.open("local://mttldata/library").generation == generation  # the same scores


def test_examples_that_do_not_fit_leave_their_score_out_and_end_nothing(train, tmp_path):
    rows = [whole_row(source="w2 " * 30 + f"w{i}", task_name="long") for i in range(40)]
    (tmp_path / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = train("--task", "long", dataset=tmp_path / "long.jsonl")
    assert outcome.exit_code == 0, outcome.output
    assert "long: base with 2 examples has no score:" in outcome.output
    (found,) = results()["experts"]
    assert found["base_two_shot"] is None
    assert found["base"] is not None


def test_no_hub_is_one_clear_line(app, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    outcome = app(
        "train",
        *("-c", ROOT / "configs/wiki-mmlu/gptneo_125m_flan.json", "-k"),
        *("finetune_task_name=ai2_arc_ARC_Easy_1_0_0", "num_train_epochs=1"),
        *("output_dir=an_expert/", "library_id=local://mttldata/mttladapters-predictor"),
        *("pipeline_eval_tasks=arc-easy", "expert_name=predictor"),
    )
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.output
    assert "hub" in last_line(outcome)


def test_a_killed_training_goes_on_from_its_checkpoint(base_folder, task_folder, tmp_path):
    command = [sys.executable, ROOT / "apps/train", "--model", base_folder]
    command += ["--dataset", task_folder, "--rank", "2", "--task", "copy_last", "--precision", "32"]
    command += ["--steps", "4000", "--test-rows", "2", "--validation-rows", "0"]
    command += ["--checkpoint-seconds", "0.2"]
    checkpoints = tmp_path / "mttldata/train/checkpoints"
    process = subprocess.Popen(
        [str(part) for part in command], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while not any(checkpoints.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert any(checkpoints.glob("*.safetensors"))
    assert Repository.open(f"local://{tmp_path}/mttldata/library").verify() == []
    again = subprocess.run(
        [str(part) for part in command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "went on from step" in again.stdout
    assert not any(checkpoints.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["train", "eval", "dataset", "library"])
def test_help_comes_without_heavy_imports(name):
    code = (
        "import runpy, sys\n"
        "sys.argv = ['x', '--help']\n"
        "try: runpy.run_path(sys.path.pop(0) or '.', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'peft', 'pyarrow'} & sys.modules.keys()\n"
        "sys.exit(f'help imports {heavy}' if heavy else 0)\n"
    ).replace("sys.path.pop(0) or '.'", repr(str(ROOT / "apps" / name)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Options" in done.stdout
