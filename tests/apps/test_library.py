import json
from pathlib import Path

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary
from mttl_storage import Corrupt

NAME = "base_model.model.layer"


@pytest.fixture
def address(tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    weights = {
        f"{NAME}.lora_A.weight": torch.ones(2, 4),
        f"{NAME}.lora_B.weight": torch.ones(3, 2),
    }
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}
    info = ExpertInfo("one", "a_task", expert_config=config, expert_model="some/base")
    library.add_expert(Expert(info, weights))
    library.add_expert(Expert(ExpertInfo("two", "another_task")))
    return library.uri


def test_list_shows_every_expert(app, address):
    shown = app("library", "list", address).output
    assert "one" in shown
    assert "another_task" in shown
    rows = json.loads(app("library", "list", address, "--json").output)
    assert [row["expert_name"] for row in rows] == ["one", "two"]
    assert (rows[0]["rank"], rows[0]["kind"]) == (2, "lora")


def test_show_has_facts_and_digests(app, address):
    facts = json.loads(app("library", "show", "one", "--library", address, "--json").output)
    assert facts["expert_model"] == "some/base"
    assert set(facts["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    assert "some/base" in app("library", "show", "one", "--library", address).output


def test_verify_finds_a_flipped_bit(app, address):
    assert app("library", "verify", address).exit_code == 0
    (path,) = Path(address.removeprefix("local://")).rglob("adapter_model.safetensors")
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    outcome = app("library", "verify", address)
    assert outcome.exit_code == 1
    assert "adapter_model.safetensors" in outcome.output


def test_verify_for_programs_prints_json_alone(app, address, monkeypatch):
    monkeypatch.setattr("mttl_experts.jobs.progress._QUIET_SECONDS", -1.0)
    outcome = app("library", "verify", address, "--json")
    assert json.loads(outcome.stdout)["problems"] == []
    assert "verifying" in outcome.stderr


def test_list_asks_for_all_facts_once_and_a_bad_one_is_one_line(app, address, monkeypatch):
    calls = []

    def infos(library):
        calls.append(library)
        raise Corrupt("info of expert 'one' cannot be read")

    monkeypatch.setattr(ExpertLibrary, "infos", infos)
    outcome = app("library", "list", address)
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert "'one' cannot be read" in outcome.output
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("args", "word"),
    [(("list", "local://nope"), "nope"), (("show", "on", "--library", "{address}"), "'one'")],
)
def test_what_is_not_there_is_one_clear_line(app, address, args, word):
    outcome = app("library", *(arg.format(address=address) for arg in args))
    assert outcome.exit_code == 1
    assert "Traceback" not in outcome.output
    assert word in outcome.output.strip().splitlines()[-1]
