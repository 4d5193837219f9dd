import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import yaml

from mttl_experts import CardError, Expert, ExpertInfo, ExpertLibrary, Score
from mttl_experts.card import END
from mttl_experts.tensors import from_safetensors


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


@pytest.fixture
def filled(library, make_expert):
    expert = make_expert("e1", "a|task*")
    facts = {"licence": "mit", "tags": ("demo",), "created": "2026-11-24T10:00:00+00:00"}
    info = dataclasses.replace(expert.expert_info, **facts)
    library.add_expert(Expert(info, expert.expert_weights))
    library.add_expert(Expert(ExpertInfo("facts-only", metrics={"validation_loss": 1.25})))
    library.scores.put(library["e1"], Score("a|task*", "exact_match", 0.625, 40))
    return library


def test_a_card_has_front_matter_a_table_and_how_to_load_one(filled):
    text = filled.card()
    assert front_matter(text) == {
        "library_name": "peft",
        "base_model": ["test/llama"],
        "base_model_relation": "adapter",
        "license": "mit",
        "tags": ["mttl", "adapters", "demo", "lora"],
    }
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0].startswith(r"| `e1` | a\|task\* | lora | 2 | test/llama | exact\_match 62.5 %")
    assert rows[0].endswith("| 2026-11-24 |")
    assert "loss 1.250" in rows[1]
    assert "PeftModel.from_pretrained(base, " in text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_a_card_is_written_once_and_keeps_what_is_below_it(filled):
    text = filled.write_card()
    store = filled.repository.store
    assert store.cat_file("README.md").decode() == text == filled.card()
    store.pipe_file("README.md", (text + "\nOur notes.\n").encode())
    filled.tag("e1", "new")
    again = filled.write_card()
    assert again == filled.card() + "\nOur notes.\n"
    assert store.cat_file("README.md").decode() == again
    assert filled.verify() == []
    assert ExpertLibrary(filled.uri).keys() == ["e1", "facts-only"]


def test_a_readme_of_someone_else_is_not_overwritten(filled):
    store = filled.repository.store
    store.pipe_file("README.md", b"# Mine\n")
    with pytest.raises(CardError, match=r"README\.md that is not a card's"):
        filled.write_card()
    store.pipe_file("README.md", f"{END}\n# Mine\n".encode())
    assert filled.write_card().endswith(f"{END}\n# Mine\n")


@pytest.fixture
def on_hub(new_address, hub):
    """An empty library on the hub, what its README says, and its commits there."""
    library = ExpertLibrary(new_address("hf"), create=True)
    name = library.uri.removeprefix("hf://")
    return library, lambda: hub.files(name)["README.md"].decode(), lambda: len(hub.commits(name))


def test_each_change_on_the_hub_is_one_commit_that_has_the_card(on_hub, make_expert):
    library, readme, commits = on_hub
    changes = (
        lambda: library.add_expert(make_expert("e1")),
        lambda: library.add_expert(make_expert("e2", seed=2)),
        lambda: library.scores.put(library["e1"], Score("t", "exact_match", 0.5, 40)),
        lambda: library.rename_expert("e1", "e3"),
        lambda: library.remove_expert("e2"),
    )
    for change in changes:
        before = commits()
        change()
        assert commits() == before + 1
        assert readme() == library.card() == library.write_card()
        assert commits() == before + 1
    assert "| `e3` | " in readme()
    assert "exact\\_match 50.0 %" in readme()
    assert library.verify() == []


def test_the_card_on_the_hub_tells_of_all_writers_and_keeps_what_is_below_it(
    on_hub, make_expert, new_address
):
    library, readme, _ = on_hub
    other = ExpertLibrary(library.uri)
    library.add_expert(make_expert("e1"))
    library.repository.store.pipe_file("README.md", (readme() + "\nOurs.\n").encode())
    part = ExpertLibrary(library.uri, selection="e1", read_only=False)
    other.add_expert(make_expert("e2", seed=2))  # does not know of the first yet
    part.tag("e1", "new")
    assert readme() == library.refresh().card() + "\nOurs.\n"
    assert library.keys() == ["e1", "e2"]
    assert ExpertLibrary(new_address("hf"), create=True).update_from(library) == ["e1", "e2"]


def test_a_readme_of_someone_else_on_the_hub_stays(on_hub, make_expert):
    library, readme, _ = on_hub
    library.repository.store.pipe_file("README.md", b"# Mine\n")
    library.add_expert(make_expert("e1"))
    assert readme() == "# Mine\n"


def test_nothing_in_a_card_is_taken_for_markup(library, make_expert):
    expert = make_expert("e1", "x\n---\n# <script>")
    info = dataclasses.replace(expert.expert_info, tags=('a: "b"\n- c',), expert_model="/tmp/x y")
    library.add_expert(Expert(info, expert.expert_weights))
    text = library.card()
    assert "base_model" not in front_matter(text)
    assert front_matter(text)["tags"][2] == 'a: "b"\n- c'
    assert r"x --- \# \<script\>" in text


def test_peft_loads_an_expert_from_the_hub_by_its_name(new_address, make_expert, llama, tmp_path):
    library = ExpertLibrary(new_address("hf"), create=True)
    expert = make_expert("e1")
    library.add_expert(expert)
    text = library.write_card()
    repo = library.uri.removeprefix("hf://")
    assert f'PeftModel.from_pretrained(base, "{repo}", subfolder="e1")' in text
    base, out = tmp_path / "base", tmp_path / "out"
    llama().save_pretrained(base)
    # In a process of its own: huggingface_hub takes its address once, when it is imported.
    code = f"""
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(base)!r})
PeftModel.from_pretrained(base, {repo!r}, subfolder="e1").save_pretrained({str(out)!r})
"""
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    loaded = from_safetensors(out / "adapter_model.safetensors")
    assert loaded.keys() == expert.expert_weights.keys()
    assert all(torch.equal(loaded[name], expert.expert_weights[name]) for name in loaded)
