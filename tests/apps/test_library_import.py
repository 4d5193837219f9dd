import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from mttl_experts import ExpertLibrary

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["layer"]}


@pytest.fixture
def adapter(tmp_path):
    """Writes a PEFT adapter: ``adapter("name", seed=1)``."""

    def make(name, seed=0):
        folder = tmp_path / "adapters" / name
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        weights = {
            f"base_model.model.layer.lora_{which}.weight": torch.randn(shape, generator=generator)
            for which, shape in (("A", (2, 4)), ("B", (3, 2)))
        }
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
        save_file(weights, folder / "adapter_model.safetensors")
        return folder

    return make


@pytest.fixture
def run(app):
    """``apps/library import``."""
    return partial(app, "library", "import")


def test_import_says_what_it_will_do_asks_and_does_it_once(run, adapter):
    one, two = adapter("one"), adapter("two", seed=1)
    (one / "optimizer.pt").write_bytes(b"x")
    args = (one, two, "--into", "local://lib")
    refused = run(*args, answer="n\n")
    assert refused.exit_code == 1
    assert "2 experts to import into local://lib" in refused.output
    assert "optimizer.pt" in refused.output
    with pytest.raises(FileNotFoundError):
        ExpertLibrary("local://lib")

    done = run(*args, answer="y\n")
    assert done.exit_code == 0, done.output
    assert "PEFT lora" in done.output
    assert "2 experts, generation 1" in done.output

    again = run(*args)
    assert again.exit_code == 0
    assert "there already, the same: one, two" in again.output
    assert "nothing to import" in again.output
    assert ExpertLibrary("local://lib").generation == 1


def test_import_under_another_name_selected_or_excluded(run, adapter):
    whole = adapter("one").parent
    adapter("two", seed=1)
    assert run(whole, "--into", "lib", "--yes", "--name", "x", "--select", "two").exit_code == 0
    out = run(whole, "--into", "lib", "--exclude", "two", "--json")
    assert json.loads(out.stdout)["added"] == ["one"]
    assert ExpertLibrary("lib").keys() == ["one", "x"]
    assert "no source has" in run(whole, "--into", "lib", "--exclude", "thre").output


def test_a_damaged_expert_is_one_line_and_can_be_left_out(run, adapter):
    whole = adapter("one").parent
    (adapter("two") / "adapter_config.json").write_text("{")
    broken = run(whole, "--into", "lib", "--yes")
    assert broken.exit_code == 1
    (line,) = broken.output.strip().splitlines()
    assert "two/adapter_config.json" in line
    assert run(whole, "--into", "lib", "--yes", "--exclude", "two").exit_code == 0
    assert ExpertLibrary("lib").keys() == ["one"]


def test_a_conflict_is_one_clear_line(run, adapter):
    folder = adapter("one")
    run(folder, "--into", "lib", "--yes")
    adapter("one", seed=3)
    outcome = run(folder, "--into", "lib", "--yes")
    assert outcome.exit_code == 1
    (line,) = outcome.output.strip().splitlines()
    assert "another expert 'one'" in line
    missing = run("nope", "--into", "lib", "--yes")
    assert len(missing.output.strip().splitlines()) == 1


def test_plain_adapters_are_listed_as_they_lie(app, adapter):
    one = adapter("one")
    adapter("two", seed=1)
    listed = app("library", "list", one.parent, "--json")
    assert listed.exit_code == 0, listed.output
    assert [row["expert_name"] for row in json.loads(listed.output)] == ["one", "two"]
    assert app("library", "verify", one.parent).exit_code == 0
    removed = app("library", "remove", "one", "--yes", "--library", one.parent)
    assert removed.exit_code == 1
    assert (one / "adapter_config.json").exists()


def test_two_adapters_of_one_name_are_told_apart_or_refused(app, adapter):
    adapter("a/b")
    adapter("a-b", seed=1)
    listed = app("library", "list", adapter("c").parent)
    assert listed.exit_code == 1
    assert "would both be the expert 'a-b'" in " ".join(listed.output.split())


def test_add_takes_one_adapter_leaves_the_same_and_replaces_when_told(app, adapter):
    def add(*args):
        return app("library", "add", *args, "--library", "local://lib", "--json")

    first = json.loads(add(adapter("one"), "--task", "a", "--task", "b").stdout)
    assert first["changed"]
    library = ExpertLibrary("local://lib")
    assert library["one"].expert_info.tasks == ("a", "b")
    assert library.digest("one") == first["digest"]
    again = json.loads(add(adapter("one"), "--task", "a", "--task", "b").stdout)
    assert not again["changed"]

    other = adapter("one", seed=1)
    refused = add(other)
    assert isinstance(refused.exception, SystemExit)
    assert "another name" in refused.output or "replace" in refused.output
    replaced = json.loads(add(other, "--replace").stdout)
    assert replaced["digest"] != first["digest"]
    assert ExpertLibrary("local://lib").at(1).digest("one") == first["digest"]
    named = json.loads(add(other, "--name", "two").stdout)
    assert (named["expert"], named["digest"]) == ("two", replaced["digest"])


@pytest.mark.parametrize(("source", "word"), [("adapters", "import"), ("nowhere", "nowhere")])
def test_add_refuses_what_is_not_one_adapter(app, adapter, tmp_path, source, word):
    adapter("one"), adapter("two", seed=1)
    outcome = app("library", "add", tmp_path / source, "--library", "local://lib")
    assert isinstance(outcome.exception, SystemExit), outcome.exception
    assert word in outcome.output
    assert not (tmp_path / "lib").exists()
