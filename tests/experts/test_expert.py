import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mttl_experts import Expert, ExpertInfo

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
TABLE = st.dictionaries(TEXT, st.none() | st.integers() | TEXT | st.lists(st.integers()))
KNOWN = {f.name for f in dataclasses.fields(ExpertInfo)} | {"format"}
EXTRA = st.dictionaries(TEXT.filter(lambda key: key not in KNOWN), st.integers())


@settings(max_examples=50, deadline=None)
@given(
    st.builds(
        ExpertInfo,
        expert_name=TEXT,
        expert_task_name=st.none() | TEXT | st.lists(TEXT).map(tuple),
        parent_node=st.none() | TEXT,
        parents=st.lists(TEXT).map(tuple),
        expert_config=st.none() | TABLE,
        training_config=st.none() | TABLE,
        expert_model=st.none() | TEXT,
        model_fingerprint=st.none() | TEXT,
        metrics=st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False)),
        tags=st.lists(TEXT).map(tuple),
        created=st.none() | TEXT,
        extra=EXTRA,
    )
)
def test_info_goes_through_json_and_comes_back_the_same(info):
    data = json.loads(json.dumps(info.to_dict()))
    assert data["format"] == 1
    assert ExpertInfo.from_dict(data) == info
    assert ExpertInfo.from_dict(data).to_dict() == data


def test_the_name_alone_is_enough_and_unset_facts_take_no_room():
    info = ExpertInfo(expert_name="e1")
    assert info.to_dict() == {"format": 1, "expert_name": "e1"}
    assert info.tasks == ()
    assert ExpertInfo("e1", expert_task_name="t").tasks == ("t",)
    assert ExpertInfo("e1", expert_task_name=["t", "u"]).tasks == ("t", "u")


def test_an_unknown_key_is_kept():
    data = {"format": 1, "expert_name": "e1", "colour": "blue"}
    info = ExpertInfo.from_dict(data)
    assert info.extra == {"colour": "blue"}
    assert info.to_dict() == data


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expert_name", 3),
        ("expert_name", ""),
        ("expert_task_name", 3),
        ("expert_task_name", ["a", 3]),
        ("parents", "e1"),
        ("tags", [1]),
        ("expert_config", "lora"),
        ("expert_config", {"r": torch.ones(1)}),
        ("metrics", None),
        ("metrics", [1.0]),
        ("expert_model", {"id": "x"}),
        ("created", 1700000000),
        ("extra", 3),
    ],
)
def test_a_wrong_type_is_an_error_that_names_the_field(field, value):
    with pytest.raises(TypeError, match=rf"ExpertInfo\.{field}"):
        ExpertInfo(**({"expert_name": "e1"} | {field: value}))


def test_bad_data_is_an_error_that_says_what_is_wrong():
    with pytest.raises(TypeError, match="expert_name is missing"):
        ExpertInfo.from_dict({"format": 1})
    with pytest.raises(TypeError, match="format takes a whole number"):
        ExpertInfo.from_dict({"format": "1", "expert_name": "e1"})
    with pytest.raises(TypeError, match="an expert's info is a dict"):
        ExpertInfo.from_dict([1])
    with pytest.raises(ValueError, match=r"'e1' has info of format 2.*upgrade"):
        ExpertInfo.from_dict({"format": 2, "expert_name": "e1"})
    with pytest.raises(ValueError, match=r"metrics\.loss is nan"):
        ExpertInfo("e1", metrics={"loss": float("nan")})
    with pytest.raises(ValueError, match="extra holds 'tags'"):
        ExpertInfo("e1", extra={"tags": []})


def test_a_peft_config_can_be_given_as_it_is():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["v_proj", "q_proj"], task_type="CAUSAL_LM")
    info = ExpertInfo("e1", expert_config=config.to_dict())
    assert info.expert_config["target_modules"] == ["q_proj", "v_proj"]
    assert info.expert_config["peft_type"] == "LORA"
    assert ExpertInfo.from_dict(json.loads(json.dumps(info.to_dict()))) == info


def test_info_does_not_change_with_the_data_it_was_made_from():
    config = {"r": 4, "target_modules": ["q"]}
    info = ExpertInfo("e1", expert_config=config)
    config["target_modules"].append("k")
    info.to_dict()["expert_config"]["r"] = 8
    assert info.expert_config == {"r": 4, "target_modules": ["q"]}


def test_the_digest_is_of_weights_and_config_alone(make_expert):
    expert = make_expert("e1")
    renamed = dataclasses.replace(expert.expert_info, expert_name="e2", tags=("x",))
    assert Expert(renamed, dict(reversed(expert.expert_weights.items()))).digest == expert.digest
    assert make_expert("e1", seed=1).digest != expert.digest
    assert make_expert("e1", lora_alpha=8).digest != expert.digest


def test_files_are_a_peft_folder_that_names_the_base(make_expert):
    files = make_expert().files()
    assert sorted(files) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "test/llama"
    assert config["r"] == 2


def test_an_expert_without_weights_has_no_files():
    expert = Expert(expert_info=ExpertInfo(expert_name="e1", expert_task_name="t"))
    assert expert.name == "e1"
    assert expert.files() == {}


def test_weights_need_a_config_and_a_tensor(make_expert):
    weights = make_expert().expert_weights
    with pytest.raises(ValueError, match=r"'e1' has weights but no ExpertInfo\.expert_config"):
        Expert(ExpertInfo("e1"), weights).files()
    with pytest.raises(ValueError, match="'e1' has no tensor in its weights"):
        Expert(ExpertInfo("e1", expert_config={}), {}).files()
    with pytest.raises(TypeError, match="expert_weights takes tensors by name, not list"):
        Expert(ExpertInfo("e1"), [1])
    with pytest.raises(TypeError, match="expert_info takes an ExpertInfo, not str"):
        Expert("e1")
