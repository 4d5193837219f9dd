from __future__ import annotations

import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mttl_data.benchmarks import BENCHMARKS, evaluate_benchmarks
from mttl_data.errors import DataNotReachableError, TruncationWarning, UnknownTaskError

LABELS = ["A", "B", "C", "D"]


@pytest.fixture
def data_dir(tmp_path):
    """Hub-shaped folders with a few made-up rows."""
    questions = [
        {
            "id": str(i),
            "question": f"What is {i} + 1?" + " Think." * (i % 3),
            "question_stem": f"{i} + 1 is",
            "choices": {"text": [str(i + k) for k in range(4)], "label": LABELS},
            "answerKey": "B",
        }
        for i in range(6)
    ]
    pairs = [{"goal": f"g{i}", "sol1": "do it", "sol2": "do not", "label": i % 2} for i in range(6)]
    yes_no = [
        {"passage": f"p{i}", "question": f"is it {i}", "idx": i, "label": i % 2} for i in range(6)
    ]
    for place, rows in {
        "ai2_arc/ARC-Easy/test": questions,
        "ai2_arc/ARC-Challenge/test-00000-of-00001": questions,
        "openbookqa/main/test": questions,
        "piqa/validation": pairs,
        "super_glue/boolq/validation": yes_no,
    }.items():
        path = tmp_path / f"{place}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
    return tmp_path


@pytest.fixture(scope="module")
def task_manager():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def harness_alone(model, tokenizer, name, data_dir, task_manager):
    """The harness's own way to score, on the task as its own files define it."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    own = {"arc-easy": "arc_easy", "arc-challenge": "arc_challenge"}.get(name, name)
    benchmark = BENCHMARKS[name]
    folder = data_dir / benchmark.dataset.rpartition("/")[2] / (benchmark.config or "")
    file = next(folder.glob(f"{benchmark.split}*.parquet"))
    rows = datasets.Dataset(pq.read_table(file))
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda **_: splits)
        loaded = task_manager.load([own])
    results = evaluator.evaluate(
        lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        task_dict=loaded,
        bootstrap_iters=0,
    )
    return results["results"][own]


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_benchmark_scores_as_the_harness_alone_would(
    model, tokenizer, data_dir, task_manager, name
):
    score = evaluate_benchmarks(model, tokenizer, [name], data_dir=data_dir, batch_size=4)[name]
    expected = harness_alone(model, tokenizer, name, data_dir, task_manager)
    assert score.n == 6
    assert score.acc == pytest.approx(expected["acc,none"])
    assert score.acc_ci95[0] <= score.acc <= score.acc_ci95[1]
    if BENCHMARKS[name].normalised:
        assert score.acc_norm == pytest.approx(expected["acc_norm,none"])
    else:
        assert score.acc_norm is None


def test_several_at_once_with_a_limit_and_progress(model, tokenizer, data_dir):
    told = []
    scores = evaluate_benchmarks(
        model,
        tokenizer,
        ["ARC_Easy", "piqa"],
        data_dir=data_dir,
        limit=3,
        progress=lambda *args: told.append(args),
    )
    assert list(scores) == ["arc-easy", "piqa"]
    assert {score.n for score in scores.values()} == {3}
    assert told[-1] == ("", 18, 18)


def test_nothing_is_printed_or_logged(model, tokenizer, data_dir, capfd):
    level = logging.getLogger("lm_eval").level
    evaluate_benchmarks(model, tokenizer, ["arc-easy"], data_dir=data_dir, limit=2)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    assert logging.getLogger("lm_eval").level == level


def test_the_folder_of_the_dataset_itself_will_do(model, tokenizer, data_dir):
    for folder in (data_dir / "ai2_arc", data_dir / "ai2_arc" / "ARC-Easy"):
        scores = evaluate_benchmarks(model, tokenizer, ["arc-easy"], data_dir=folder, limit=1)
        assert scores["arc-easy"].n == 1


def test_a_row_longer_than_the_context_is_counted_and_told(tiny_llama, tokenizer, data_dir):
    short = tiny_llama(max_position_embeddings=40)
    with pytest.warns(TruncationWarning, match=r"arc-easy: of 6 rows, \d were longer than .* 40"):
        scores = evaluate_benchmarks(short, tokenizer, ["arc-easy"], data_dir=data_dir)
    assert 0 < scores["arc-easy"].cut < 6


def test_one_metric_stands_for_a_benchmark(model, tokenizer, data_dir):
    scores = evaluate_benchmarks(model, tokenizer, ["arc-easy", "boolq"], data_dir=data_dir)
    assert scores["arc-easy"].metric == "acc_norm"
    assert scores["boolq"].metric == "acc"


def test_training_mode_comes_back(tiny_llama, tokenizer, data_dir):
    model = tiny_llama().train()
    evaluate_benchmarks(model, tokenizer, ["piqa"], data_dir=data_dir, limit=1)
    assert model.training


def test_an_unknown_benchmark_lists_the_known(model, tokenizer):
    with pytest.raises(UnknownTaskError, match="arc-challenge, arc-easy, boolq, openbookqa, piqa"):
        evaluate_benchmarks(model, tokenizer, ["mmlu"])
    with pytest.raises(UnknownTaskError, match="did you mean 'arc-easy'"):
        evaluate_benchmarks(model, tokenizer, ["arc-eazy"])


def test_missing_rows_say_what_to_pass(model, tokenizer, tmp_path):
    with pytest.raises(DataNotReachableError, match=r"ai2_arc/ARC-Easy/test\.parquet.*data_dir"):
        evaluate_benchmarks(model, tokenizer, ["arc-easy"], data_dir=tmp_path)


def test_no_hub_says_what_to_pass(model, tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataNotReachableError, match=r"'allenai/ai2_arc'.*pass data_dir=PATH"):
        evaluate_benchmarks(model, tokenizer, ["arc-easy"])


def test_the_real_rows_score(model, tokenizer, test_data):
    names = sorted(BENCHMARKS)
    scores = evaluate_benchmarks(model, tokenizer, names, data_dir=test_data, limit=4)
    assert {name: score.n for name, score in scores.items()} == dict.fromkeys(names, 4)
