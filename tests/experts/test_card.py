import dataclasses

import pytest
import yaml

from mttl_experts import CardError, Expert, ExpertInfo, ExpertLibrary, Score
from mttl_experts.card import END


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


def test_nothing_in_a_card_is_taken_for_markup(library, make_expert):
    expert = make_expert("e1", "x\n---\n# <script>")
    info = dataclasses.replace(expert.expert_info, tags=('a: "b"\n- c',), expert_model="/tmp/x y")
    library.add_expert(Expert(info, expert.expert_weights))
    text = library.card()
    assert "base_model" not in front_matter(text)
    assert front_matter(text)["tags"][2] == 'a: "b"\n- c'
    assert r"x --- \# \<script\>" in text


def test_peft_loads_an_expert_from_the_hub_by_its_name(new_address, make_expert, llama):
    import torch
    from peft import PeftModel

    library = ExpertLibrary(new_address("hf"), create=True)
    expert = make_expert("e1")
    library.add_expert(expert)
    text = library.write_card()
    repo = library.uri.removeprefix("hf://")
    assert f'PeftModel.from_pretrained(base, "{repo}", subfolder="e1")' in text
    model = PeftModel.from_pretrained(llama(), repo, subfolder="e1")
    ids = torch.arange(6)[None]
    on = model(ids).logits
    with model.disable_adapter():
        assert not torch.allclose(on, model(ids).logits)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert torch.equal(layer.lora_A["default"].weight, expert.expert_weights[name])
