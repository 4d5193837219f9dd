"""PEFT adapters go into a library and out again with equal logits, older libraries bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mttl_experts import ExpertExistsError, ExpertLibrary
from mttl_experts.interop import find_experts, plan_import, renamed, run_import
from mttl_experts.legacy import RefusedFileError
from mttl_storage import Corrupt, InvalidName, NotFound

SAMPLES = Path(__file__).parent / "samples"


def bring(library, *sources):
    experts = [each for source in sources for each in find_experts(str(source)).experts]
    return run_import(library, plan_import(library, experts))


@pytest.fixture
def library(tmp_path):
    return ExpertLibrary(f"local://{tmp_path / 'library'}", create=True)


@pytest.mark.filterwarnings("ignore")
def test_peft_to_library_to_peft_gives_equal_logits_and_tensors(
    kind, adapted, llama, logits, library, tmp_path
):
    model = adapted(kind)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    assert bring(library, folder) == ["adapter"]

    kept = Path(library.path("adapter"))
    given = json.loads((folder / "adapter_config.json").read_text())
    assert json.loads((kept / "adapter_config.json").read_text()) == given
    before = load_file(folder / "adapter_model.safetensors")
    after = load_file(kept / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    forward = {"task_ids": torch.tensor([0, 1])} if kind == "poly" else {}
    loaded = PeftModel.from_pretrained(llama(), kept).eval()
    want = logits(model, **forward)
    assert torch.equal(logits(loaded, **forward), want)
    assert not torch.allclose(want[:, -7:], logits(llama()))  # the adapter does something


def test_an_adapter_saved_under_transformers_4_loads_with_the_same_logits(library, logits):
    from transformers import MixtralConfig, MixtralForCausalLM

    def base():
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
            num_experts_per_tok=2,
        )  # fmt: skip
        return MixtralForCausalLM(config).eval()

    bring(library, SAMPLES / "mixtral_transformers_4")
    loaded = PeftModel.from_pretrained(base(), library.path("mixtral_transformers_4")).eval()

    weights = library["mixtral_transformers_4"].expert_weights
    layer = "model.layers.0"

    def delta(module):  # the slow obvious version: scaling is 4 / 2
        a, b = (weights[f"base_model.model.{layer}.{module}.lora_{w}.weight"] for w in "AB")
        return 2.0 * b @ a

    ours = base()
    with torch.no_grad():
        ours.model.layers[0].self_attn.q_proj.weight += delta("self_attn.q_proj")
        experts = ours.model.layers[0].mlp.experts
        for number in range(2):
            old = f"block_sparse_moe.experts.{number}"
            experts.gate_up_proj[number, :12] += delta(f"{old}.w1")
            experts.gate_up_proj[number, 12:] += delta(f"{old}.w3")
            experts.down_proj[number] += delta(f"{old}.w2")
        assert not torch.allclose(logits(base()), logits(ours), atol=1e-3)
        torch.testing.assert_close(logits(loaded), logits(ours), atol=1e-5, rtol=1e-5)


@pytest.fixture
def folders(adapted, tmp_path):
    """Folders of PEFT adapters: ``folders("lora", "dora")``."""

    def make(*kinds, into=tmp_path / "adapters"):
        for kind in kinds:
            adapted(kind).save_pretrained(into / kind)
        return into

    return make


def test_one_repository_for_each_adapter_becomes_one_library(folders, library):
    whole = folders("lora", "rslora", "modules_to_save")
    sources = sorted(whole.iterdir())
    assert bring(library, *sources) == ["lora", "modules_to_save", "rslora"]
    assert library.generation == 1
    assert bring(library, *sources) == []
    assert library.generation == 1


def test_all_adapters_below_a_folder_are_found_and_what_is_left_out_is_said(folders):
    whole = folders("lora", "rslora")
    shutil.copytree(whole / "lora", whole / "lora" / "checkpoint-10")
    shutil.copytree(whole / "rslora", whole / "deep" / "er")
    (whole / "training_args.bin").write_bytes(b"x")
    found = find_experts(str(whole))
    assert [each.name for each in found.experts] == ["deep-er", "lora", "rslora"]
    assert any("lora/checkpoint-10" in line for line in found.left_out)
    assert any("training_args.bin" in line for line in found.left_out)
    assert find_experts(str(whole / "lora" / "checkpoint-10")).experts[0].name == "checkpoint-10"


def test_an_adapter_bin_is_read_as_data_and_equals_its_safetensors(folders, library, tmp_path):
    folder = folders("lora") / "lora"
    older = tmp_path / "older"
    older.mkdir()
    shutil.copy(folder / "adapter_config.json", older)
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, older / "adapter_model.bin")
    bring(library, folder, older)
    assert library["lora"].digest == library["older"].digest

    torch.save({"x": Path}, older / "adapter_model.bin")
    with pytest.raises(RefusedFileError, match=r"adapter_model\.bin.*pathlib"):
        bring(library, older)


def test_a_snapshot_of_the_hub_s_cache_is_read_through_its_links(folders, library, tmp_path):
    folder = folders("lora") / "lora"
    snapshot = tmp_path / "snapshots@1" / "abc"
    snapshot.mkdir(parents=True)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (snapshot / file).symlink_to(f"../../adapters/lora/{file}")
    bring(library, folder, snapshot)
    assert library["abc"].digest == library["lora"].digest


def test_hub_ids_are_gathered_into_one_library(folders, library, hub, hub_token):
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.endpoint, token=hub_token)
    for kind in ("lora", "dora"):
        api.create_repo(f"user/{kind}-adapter")
        api.upload_folder(repo_id=f"user/{kind}-adapter", folder_path=folders(kind) / kind)
    sources = ["user/lora-adapter", "hf://user/dora-adapter"]
    assert bring(library, *sources) == ["dora-adapter", "lora-adapter"]
    origin = library["lora-adapter"].expert_info.extra["imported"]
    assert origin == {"format": "peft", "source": "hf://user/lora-adapter"}
    assert bring(library, *sources) == []


def test_card_and_origin_are_kept(folders, library, tmp_path):
    folder = folders("lora") / "lora"
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# card\nlicense: no\n")
    bring(library, folder)
    info = library["lora"].expert_info
    assert info.licence == "apache-2.0"
    assert str(tmp_path) not in json.dumps(info.extra)
    assert info.extra["imported"]["format"] == "peft"


def test_another_expert_of_the_same_name_is_a_conflict_and_nothing_is_done(folders, library):
    whole = folders("lora", "rslora")
    experts = find_experts(str(whole)).experts
    run_import(library, plan_import(library, [renamed(experts[1], "lora")]))
    with pytest.raises(ExpertExistsError, match=r"another expert 'lora' than .*adapters"):
        plan_import(library, experts)
    assert library.keys() == ["lora"]
    with pytest.raises(InvalidName, match=r"each have an expert 'lora'.*--name"):
        plan_import(library, [experts[0], experts[0]])


@pytest.mark.parametrize(
    ("file", "content", "word"),
    [
        ("adapter_config.json", b"{", "adapter_config.json.*is not JSON"),
        ("adapter_config.json", b"[" * 100_000, "is not JSON"),
        ("adapter_config.json", b"{}", "names no peft_type"),
        ("adapter_model.safetensors", b"x" * 100, "adapter_model.safetensors"),
        ("adapter_model.safetensors", None, "no 'adapter_model.safetensors' beside it"),
    ],
)
def test_a_damaged_adapter_is_an_error_that_names_the_file(folders, library, file, content, word):
    folder = folders("lora") / "lora"
    (folder / file).write_bytes(content) if content else (folder / file).unlink()
    with pytest.raises(Corrupt, match=word):
        bring(library, folder)
    assert library.keys() == []


def test_what_is_not_there_is_said(tmp_path, library):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("x")
    for source, word in [
        (tmp_path / "nope", "no folder"),
        (tmp_path / "empty", "no files"),
        (tmp_path / "other", r"no PEFT adapter .* it has notes\.txt"),
        ("just-a-name", "no hub id"),
    ]:
        with pytest.raises(NotFound, match=word):
            find_experts(str(source))
    with pytest.raises(InvalidName, match="a library already"):
        find_experts(library.uri)
