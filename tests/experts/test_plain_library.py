"""A folder or hub repository of plain PEFT adapters opens as a library, as it lies."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from mttl_experts import ExpertLibrary, ExpertNotFoundError, UnsupportedAdapterError, lora_modules
from mttl_experts.interop import PlainExpertLibrary
from mttl_storage import Corrupt, NotFound, ReadOnly, filesystem


@pytest.fixture
def place(scheme, new_address, make_expert):
    """An address with two adapters and a note."""
    address = new_address(scheme)
    store = filesystem(address)
    store.prepare()
    files = {"note.txt": b"x"}
    for seed, name in enumerate(("one", "deep/two")):
        for file, content in make_expert(seed=seed).files().items():
            files[f"{name}/{file}"] = content.replace(b"test/llama", b"org/base%d" % seed)
    store.pipe(files)
    return address


def contents(address):
    store = filesystem(address)
    return {entry.key: store.cat_file(entry.key) for entry in store.scan("")}


def test_plain_adapters_are_a_library_that_is_only_read(place, make_expert, new_address):
    before = contents(place)
    library = ExpertLibrary.get_expert_library(place)
    assert isinstance(library, PlainExpertLibrary)
    assert library.keys() == ["deep-two", "one"]
    for seed, name in enumerate(("one", "deep-two")):
        expert, want = library[name], make_expert(seed=seed)
        assert expert.expert_info.expert_model == f"org/base{seed}"
        for key, tensor in want.expert_weights.items():
            assert torch.equal(expert.expert_weights[key], tensor)
        assert lora_modules(expert).keys() == lora_modules(want).keys()
        weights = Path(library.path(name), "adapter_model.safetensors").read_bytes()
        entry = library.repository.item(f"experts/{name}").files["adapter_model.safetensors"]
        assert hashlib.sha256(weights).hexdigest() == entry.sha256
    part = ExpertLibrary.get_expert_library(place, model_name="org/base0")
    assert part.keys() == ["one"]
    with pytest.raises(ExpertNotFoundError, match="'one'"):
        ExpertLibrary.get_expert_library(place, selection="on")
    for change in (
        lambda: library.add_expert(make_expert("three")),
        lambda: library.remove_expert("one"),
        lambda: library.artifacts.put(library["one"], {"kind": "x"}, 1),
        lambda: library.repository.gc(),
    ):
        with pytest.raises(ReadOnly, match="plain PEFT adapters"):
            change()
    assert library.artifacts.get_or_make(library["one"], {"kind": "x"}, lambda: 5) == 5
    assert library.verify() == []
    assert library.repository.history() == library.history() == []
    with pytest.raises(NotFound, match="'one' of .* has no history: it is a plain PEFT adapter"):
        library.log("one")
    with pytest.raises(ExpertNotFoundError, match="no expert 'two'"):
        library.log("two")
    assert contents(place) == before  # nothing was written

    copy = ExpertLibrary.get_expert_library(place, destination_id=new_address("local"))
    assert copy.keys() == library.keys()
    assert copy.verify() == []
    assert contents(place) == before


def test_the_very_file_is_mapped_on_the_local_disk(new_address, make_expert):
    folder = Path(new_address("local").removeprefix("local://"))
    folder.mkdir()
    for file, content in make_expert().files().items():
        (folder / file).write_bytes(content)
    library = PlainExpertLibrary(str(folder))
    assert library.keys() == [folder.name]
    assert library.path(folder.name) == folder
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 10)
    with pytest.raises(Corrupt, match="was changed since"):
        dict(library[folder.name].expert_weights)
    assert "changed since" in str(library.verify()[0])
    for file, content in make_expert(seed=4).files().items():
        (folder / file).write_bytes(content)
    assert library.refresh().verify() == []


def test_what_cannot_be_shown_is_said(tmp_path, make_expert):
    with pytest.raises(NotFound, match="no repository and no PEFT adapter"):
        ExpertLibrary.get_expert_library(str(tmp_path / "none"))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "one" / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedAdapterError, match="import it"):
        ExpertLibrary.get_expert_library(str(tmp_path))
    library = ExpertLibrary.get_expert_library(str(tmp_path / "new"), create=True)
    assert type(library) is ExpertLibrary
