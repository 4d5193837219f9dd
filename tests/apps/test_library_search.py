import json
import shutil

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary

PATH = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def weights(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PATH}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"{PATH}.lora_B.weight": torch.randn(8, 2, generator=generator) * scale,
    }


@pytest.fixture
def address(tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    with library.batch():
        for name, task, values in [
            ("adder", "add_numbers", weights(1)),
            ("adder_twice", "double_sums", weights(1, scale=2.0)),
            ("poet", "write_poems", weights(2)),
        ]:
            library.add_expert(Expert(ExpertInfo(name, task, expert_config=CONFIG), values))
    return library.uri


@pytest.fixture
def search(app, address):
    def run(*args):
        return app("library", "search", "--library", address, *args)

    return run


def found(outcome):
    return json.loads(outcome.stdout)["found"]


def test_words_find_experts(search):
    outcome = search("poems")
    assert outcome.exit_code == 0, outcome.output
    assert "poet" in outcome.output
    assert "adder" not in outcome.output
    (row,) = found(search("poems", "--json"))
    assert row["expert_name"] == "poet"
    assert row["tasks"] == ["write_poems"]
    assert 0 < row["score"] <= 1
    assert len(found(search("adder", "--json"))) == 2
    assert len(found(search("adder", "--json", "--limit", "1"))) == 1


def test_words_that_nothing_has_are_said_to_have_found_nothing(search):
    outcome = search("xylophone")
    assert outcome.exit_code == 0
    assert "3 experts) is like 'xylophone'" in outcome.output
    assert found(search("xylophone", "--json")) == []


def test_likeness_to_an_expert_shows_scaled_copies(search):
    outcome = search("--like", "adder")
    assert outcome.exit_code == 0, outcome.output
    assert "scaled" in outcome.output
    first, second = found(search("--like", "adder", "--json"))
    assert (first["expert_name"], first["copy"], second["copy"]) == ("adder_twice", "scaled", None)
    assert first["cosine"] == pytest.approx(1)
    assert first["size"] == pytest.approx(2)


def test_likeness_to_a_folder_finds_what_is_in_the_library(search, address, tmp_path):
    folder = tmp_path / "stranger"
    shutil.copytree(ExpertLibrary(address).path("poet"), folder)
    first = found(search("--like", folder, "--json"))[0]
    assert (first["expert_name"], first["copy"]) == ("poet", "same")


def test_examples_rank_experts_by_their_loss(app, train, tmp_path):
    library = f"local://{tmp_path}/trained"
    outcome = train("--library", library, "--all", "--steps", "30")
    assert outcome.exit_code == 0, outcome.output
    rows = [
        {"source": f"w{n % 2} w{n + 5} w9 w{n // 2 % 2}", "target": f"w{n % 2}"} for n in range(8)
    ]
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    args = ("library", "search", "--like", path, "--library", library)
    outcome = app(*args, "--json")
    assert outcome.exit_code == 0, outcome.output
    first, second = found(outcome)
    assert first["loss"] <= second["loss"]
    assert first["loss"] + first["below_base"] == pytest.approx(
        second["loss"] + second["below_base"]
    )
    generation = ExpertLibrary(library).generation
    assert app(*args, "--json").stdout == outcome.stdout
    assert ExpertLibrary(library).generation == generation
    shown = app(*args).output
    assert "below base" in shown
    path.write_text(json.dumps(rows[0]))
    assert found(app(*args, "--json")) != [first, second]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "no examples"),
        ("{", "line 1"),
        ('{"source": "a", "target": "b"}\n{"source": "a"}', "line 2"),
        ('["a"]', "line 1"),
        (None, "cannot be read"),
    ],
)
def test_examples_that_cannot_be_read_are_one_line(search, tmp_path, content, word):
    path = tmp_path / "examples.jsonl"
    if content is not None:
        path.write_text(content)
    outcome = search("--like", path)
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert word in outcome.output
    assert len(outcome.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "word"),
    [
        ((), "TEXT or --like"),
        (("poems", "--like", "poet"), "TEXT or --like"),
        (("--like", "poe"), "did you mean 'poet'"),
        (("--like", "./nowhere"), "nowhere"),
        (("poems", "--library", "local://nope"), "nope"),
    ],
)
def test_wrong_input_is_one_clear_line(search, args, word):
    outcome = search(*args)
    assert outcome.exit_code in (1, 2)
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert word in outcome.output.replace("\n", " ")


def test_what_cannot_be_compared_is_said(search, address):
    library = ExpertLibrary(address)
    config = CONFIG | {"use_dora": True}
    library.add_expert(Expert(ExpertInfo("dora", expert_config=config), weights(3)))
    untrained = weights(4, scale=0.0)
    library.add_expert(Expert(ExpertInfo("untrained", expert_config=CONFIG), untrained))
    outcome = search("--like", "poet")
    assert "left out: dora: " in outcome.output
    assert set(json.loads(search("--like", "poet", "--json").stdout)["left_out"]) == {"dora"}
    for name in ("dora", "untrained"):
        outcome = search("--like", name)
        assert isinstance(outcome.exception, SystemExit), outcome.exception
        assert name in outcome.output


def test_what_is_damaged_is_said_and_the_others_are_found(search, address):
    assert search("--like", "adder").exit_code == 0
    path = ExpertLibrary(address).path("poet") / "adapter_model.safetensors"
    path.chmod(0o644)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    outcome = search("--like", "adder")
    assert outcome.exit_code == 0, outcome.output
    assert "adder_twice" in outcome.output
    assert "left out: poet: " in outcome.output
    outcome = search("--like", "poet")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "poet" in outcome.output


def test_words_are_compared_by_meaning_with_a_model_of_the_users(search, address, base_folder):
    model = ("--embeddings", base_folder)  # of w0, w1, ...: no word of it is in a name
    rows = found(search("w3", "--json", *model))
    assert {row["expert_name"] for row in rows} == {"adder", "adder_twice", "poet"}
    assert all(-1.0001 <= row["score"] <= 1.0001 for row in rows)
    generation = ExpertLibrary(address).generation
    assert found(search("w3", "--json", *model)) == rows
    assert ExpertLibrary(address).generation == generation
    assert "poet" in search("w3", *model).output
    for args, word in [
        (("w3", "--embeddings", "./nowhere"), "'./nowhere'"),
        (("--like", "poet", *model), "--embeddings compares TEXT"),
    ]:
        outcome = search(*args)
        assert isinstance(outcome.exception, SystemExit), outcome.exception
        assert word in outcome.output
