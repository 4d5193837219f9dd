"""Older libraries come in bit for bit; each trap of that format that importing could fall into."""

import io
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mttl_experts import (
    ExpertExistsError,
    ExpertLibrary,
    UnsupportedAdapterError,
    lora_modules,
)
from mttl_experts.interop import find_experts, plan_import, run_import
from mttl_experts.legacy import RefusedFileError
from mttl_storage import Corrupt, NotFound, filesystem

SAMPLE = Path(os.environ.get("MTTL_TEST_DATA", "nowhere"), "older_library")
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
CONFIG = {
    "class_name": "mttl.models.modifiers.lora.LoRAConfig",
    "modify_modules": ".*self_attn.*",
    "modify_layers": "q_proj",
    "lora_rank": 2,
    "lora_alpha": 16.0,
    "lora_dropout": 0.05,
    "lora_init_b_random": False,
    "tie_params": None,
}


def weights(rank=2, seed=0, features=(6, 6), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for module in MODULES:
        made[f"{module}.lora_a"] = torch.randn(features[0], rank, generator=generator).to(dtype)
        made[f"{module}.lora_b"] = torch.randn(rank, features[1], generator=generator).to(dtype)
    return made


class Older:
    """Writes an older library into a folder."""

    def __init__(self, path):
        self.path = path
        path.mkdir()

    def __str__(self):
        return str(self.path)

    def add(self, name, tensors=None, config=CONFIG, **facts):
        facts = {
            "expert_name": name,
            "class_name": "mttl.models.library.expert_library.MetadataEntry",
            "expert_task_name": f"{name}_task",
            "parent_node": None,
            "expert_config": config,
            "training_config": {"model": "org/base", "learning_rate": 1e-4},
            "expert_model": "org/base",
            "expert_deleted": False,
        } | facts
        torch.save(facts, self.path / f"{name}.meta")
        torch.save(weights() if tensors is None else tensors, self.path / f"{name}.ckpt")

    def keep(self, file, data, config=None):
        torch.save({"data": data, "config": config}, self.path / file)


@pytest.fixture
def older(tmp_path):
    return Older(tmp_path / "older")


@pytest.fixture
def library(tmp_path):
    return ExpertLibrary(f"local://{tmp_path / 'library'}", create=True)


def bring(library, source, token=None):
    return run_import(library, plan_import(library, find_experts(str(source), token).experts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_are_bit_identical_also_where_layers_are_square(older, library, dtype):
    given = weights(dtype=dtype)
    older.add("one", given)
    bring(library, older)
    found = library["one"].expert_weights
    assert len(found) == len(given)
    for key, tensor in given.items():
        module, _, which = key.rpartition(".")
        ours = found[f"base_model.model.{module}.lora_{which[-1].upper()}.weight"]
        assert ours.dtype == dtype
        assert torch.equal(ours, tensor.T)
    for module, factors in lora_modules(library["one"]).items():
        x = torch.randn(3, 6)
        a, b = (given[f"{module}.lora_{which}"].float() for which in "ab")
        ours = factors.scaling * (factors.b.float() @ factors.a.float())  # (o, i)
        torch.testing.assert_close(x @ ours.T, 16.0 / 2 * (x @ a @ b))


def test_experts_of_different_alpha_and_rank_keep_their_own_scaling(older, library):
    older.add("one")
    older.add("two", weights(rank=4), CONFIG | {"lora_rank": 4, "lora_alpha": 4})
    bring(library, older)
    scalings = {
        name: {factors.scaling for factors in lora_modules(expert).values()}
        for name, expert in library.items()
    }
    assert scalings == {"one": {8.0}, "two": {1.0}}


def test_facts_are_mapped_and_what_has_no_field_is_kept(older, library):
    older.add("one", expert_task_name="a,b", parent_node="root", note={"x": [1, 2]})
    bring(library, older)
    info = library["one"].expert_info
    assert info.tasks == ("a", "b")
    assert info.parent_node == "root"
    assert info.expert_model == "org/base"
    assert info.training_config == {"model": "org/base", "learning_rate": 1e-4}
    kept = info.extra["imported"]["facts"]
    assert kept == {"expert_config": CONFIG, "note": {"x": [1, 2]}}
    config = info.expert_config
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 16.0, 0.05)
    assert config["target_modules"] == sorted(MODULES)


def test_a_deleted_expert_stays_deleted_and_can_be_restored(older, library):
    older.add("gone", expert_deleted=True)
    older.add("here")
    assert bring(library, older) == ["gone", "here"]
    assert library.keys() == ["here"]
    assert bring(library, older) == []
    library.restore_expert("gone")
    assert library.digest("gone") == library.digest("here")
    assert bring(library, older) == []
    assert library.keys() == ["gone", "here"]


def test_importing_again_is_one_commit_and_then_none(older, library):
    for number in range(5):
        older.add(f"e{number}", weights(seed=number))
    older.keep("e1.prototypes.bin", np.arange(3.0))
    assert len(bring(library, older)) == 5
    assert library.generation == 1
    assert bring(library, older) == []
    assert library.generation == 1
    older.add("e1", weights(seed=77))
    with pytest.raises(ExpertExistsError, match="another expert 'e1'"):
        bring(library, older)


def test_auxiliary_data_is_found_by_name_and_never_by_substring(older, library):
    older.add("e1", weights(seed=1))
    older.add("e10", weights(seed=10))
    older.add("e1.embeddings", weights(seed=2))
    older.keep("e1.embeddings.bin", np.float32([1]), {"n": 1})
    older.keep("e10.embeddings.bin", np.float32([10]), {"n": 1})
    older.keep("e1.embeddings.embeddings.bin", np.float32([2]), {"n": 1})
    bring(library, older)
    recipe = {"kind": "older:embeddings", "version": 1, "config": {"n": 1}}
    found = library.artifacts.for_each(recipe)
    assert {name: value["data"].tolist() for name, value in found.items()} == {
        "e1": [1.0],
        "e10": [10.0],
        "e1.embeddings": [2.0],
    }


def test_auxiliary_data_belongs_to_the_weights_it_came_from(older, library):
    older.add("one")
    older.keep("one.prototypes.bin", np.float32([1]))
    bring(library, older)
    recipe = {"kind": "older:prototypes", "version": 1, "config": None}
    assert library.artifacts.get(library["one"], recipe)["data"].tolist() == [1.0]
    (tmp := older.path.parent / "next").mkdir()
    shutil.copy(older.path / "one.meta", tmp)
    torch.save(weights(seed=5), tmp / "one.ckpt")
    other = find_experts(str(tmp)).experts[0].read()
    library.replace_expert(other)
    assert library.artifacts.get(library["one"], recipe) is None


@pytest.mark.parametrize(
    ("data", "tensors", "rest"),
    [
        ({"m1": {"v": np.float32([1, 2])}, "m2": torch.ones(2)}, {"data/m1/v", "data/m2"}, None),
        ([np.float32([1]), np.float32([2])], {"data/0", "data/1"}, None),
        ({"loss": 0.5, "names": ["a"]}, set(), {"loss": 0.5, "names": ["a"]}),
        ({"v": torch.ones(2), "n": 3}, {"data/v"}, {"v": None, "n": 3}),
        (np.float32(1.5), set(), 1.5),
    ],
)
def test_whatever_auxiliary_data_holds_nothing_vanishes(older, library, data, tensors, rest):
    older.add("one")
    older.keep("one.some-thing_1.bin", data, {"c": 1})
    bring(library, older)
    recipe = {"kind": "older:some-thing_1", "version": 1, "config": {"c": 1}}
    if tensors:
        assert set(library.artifacts.get(library["one"], recipe)) == tensors
        recipe |= {"part": "plain"}
    assert library.artifacts.get(library["one"], recipe) == rest


def test_what_is_left_out_is_said(older):
    older.add("one")
    shutil.copy(older.path / "one.ckpt", older.path / "orphan.ckpt")
    older.keep("nobody.embeddings.bin", np.float32([1]))
    (older.path / "notes.txt").write_text("x")
    (older.path / "README.md").write_text("x")
    older.add("gone", expert_deleted=True)
    (older.path / "gone.ckpt").unlink()
    older.keep("gone.embeddings.bin", np.float32([1]))
    found = find_experts(str(older))
    lines = dict(line.split(": ", 1) for line in found.left_out)
    assert lines.keys() == {
        "orphan.ckpt", "nobody.embeddings.bin", "notes.txt", "gone.embeddings.bin"
    }  # fmt: skip
    assert "no orphan.meta" in lines["orphan.ckpt"]


DAMAGES = {
    "half": (".meta", lambda data: data[: len(data) // 2], RefusedFileError),
    "empty": (".meta", lambda data: b"", RefusedFileError),
    "other": (".meta", lambda data: saved({"expert_name": "else"}), Corrupt),
    "list": (".meta", lambda data: saved(["one"]), Corrupt),
    "type": (".meta", lambda data: saved({"expert_name": "one", "expert_model": 3}), Corrupt),
    "deleted": (".meta", lambda data: saved({"expert_name": "one", "expert_deleted": 1}), Corrupt),
    "weights": (".ckpt", lambda data: data[:-200], RefusedFileError),
    "flipped": (".ckpt", lambda data: data.replace(b"lora_a", b"lora_x", 1), RefusedFileError),
    "plain": (".ckpt", lambda data: saved([1]), Corrupt),
    "keys": (".ckpt", lambda data: saved({"m.kv": torch.ones(2, 2)}), UnsupportedAdapterError),
    "rank": (".ckpt", lambda data: saved(weights(rank=3)), Corrupt),
    "half a pair": (".ckpt", lambda data: saved(dict(list(weights().items())[:3])), Corrupt),
}


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(("ending", "damage", "error"), DAMAGES.values(), ids=DAMAGES)
def test_corrupt_metadata_is_an_error_that_names_the_file(older, library, ending, damage, error):
    older.add("one")
    older.add("two")
    path = older.path / f"one{ending}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(error, match=rf"one\{ending}"):
        bring(library, older)
    assert library.keys() == []


def test_missing_weights_are_an_error_that_names_the_file(older, library):
    older.add("one")
    (older.path / "one.ckpt").unlink()
    with pytest.raises(Corrupt, match=r"'one.meta'.*has no 'one.ckpt'"):
        bring(library, older)


def test_a_kind_without_counterpart_is_refused_by_name(older, library):
    older.add("one", config=CONFIG | {"class_name": "mttl.models.modifiers.kv.KVAdapterConfig"})
    with pytest.raises(UnsupportedAdapterError, match=r"one\.ckpt.*'KVAdapterConfig'"):
        bring(library, older)


@pytest.mark.parametrize("slot", ["one.meta", "one.ckpt", "one.embeddings.bin"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_library_runs_no_code(older, library, tmp_path, slot, protocol):
    canary = tmp_path / "ran"

    class Hostile:
        def __reduce__(self):
            return (os.mkdir, (str(canary),))

    older.add("one")
    older.keep("one.embeddings.bin", np.float32([1]))
    for content in (pickle.dumps({"a": Hostile()}, protocol), _archive(Hostile(), protocol)):
        (older.path / slot).write_bytes(content)
        with pytest.raises(RefusedFileError, match=slot.replace(".", r"\.")):
            bring(library, older)
    assert not canary.exists()
    assert library.keys() == []
    assert library.artifacts.entries() == []


def _archive(value, protocol):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol))
    return buffer.getvalue()


# The same on every backend, read through its filesystem.


def test_an_older_library_is_read_on_any_backend(scheme, new_address, older, library):
    place = new_address(scheme)
    older.add("one")
    older.add("gone", expert_deleted=True)
    older.keep("one.embeddings.bin", np.float32([1]))
    store = filesystem(place)
    store.prepare()
    store.pipe({path.name: path.read_bytes() for path in older.path.iterdir()})
    assert bring(library, place) == ["gone", "one"]
    assert library["one"].digest == find_experts(str(older)).experts[1].read().digest
    assert len(library.artifacts.entries()) == 1
    extra = library["one"].expert_info.extra["imported"]
    assert extra.get("source") == (place if scheme in ("az", "hf") else None)


def test_a_hub_id_may_name_a_folder_and_a_revision(
    older, library, hub, hub_token, monkeypatch, tmp_path
):
    from huggingface_hub import HfApi

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    older.add("one")
    api = HfApi(endpoint=hub.endpoint, token=hub_token)
    api.create_repo("user/older-at")
    first = api.upload_folder(repo_id="user/older-at", folder_path=older.path, path_in_repo="sub")
    api.upload_file(repo_id="user/older-at", path_in_repo="sub/one.ckpt", path_or_fileobj=b"new")
    with pytest.raises(RefusedFileError, match=r"one\.ckpt"):
        bring(library, "user/older-at/sub")
    assert bring(library, f"user/older-at/sub@{first.oid}") == ["one"]
    source = library["one"].expert_info.extra["imported"]["source"]
    assert source == f"hf://user/older-at/sub@{first.oid}"
    for missing in ("user/older-at/no", "user/older-at@no", "user/none", "user/none@main"):
        with pytest.raises(NotFound):
            bring(library, missing)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="MTTL_TEST_DATA has no older_library")
def test_the_real_sample_comes_in_bit_for_bit(library):
    assert bring(library, SAMPLE) == ["arc_easy", "cluster_0", "gone", "wiqa"]
    assert library.keys() == ["arc_easy", "cluster_0", "wiqa"]
    for name, expert in library.items():
        given = torch.load(SAMPLE / f"{name}.ckpt", weights_only=True)
        for module, factors in lora_modules(expert).items():
            assert torch.equal(factors.a.T, given[f"{module}.lora_a"])
            assert torch.equal(factors.b.T, given[f"{module}.lora_b"])
    assert library.verify() == []
    assert bring(library, SAMPLE) == []
    assert library["cluster_0"].expert_info.tasks == ("task_a", "task_b", "task_c")
    assert len(library.artifacts.entries()) == 2
