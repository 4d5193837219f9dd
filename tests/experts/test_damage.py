"""What others may have done to a library's files is found, and named."""

import pytest

from mttl_experts import (
    Expert,
    ExpertInfo,
    ExpertLibrary,
    LocalExpertLibrary,
)
from mttl_experts.expert import CONFIG_FILE, WEIGHTS_FILE
from mttl_storage import Corrupt


def bare(name, task=None, **facts):
    return Expert(expert_info=ExpertInfo(name, task, **facts))


def test_corrupt_facts_are_an_error_that_names_the_expert(library):
    """FIELD: corrupt metadata vanishes silently."""
    library.repository.add("experts/bad", {}, {"format": 1, "tags": "not a list"})
    with pytest.raises(Corrupt, match=r"expert 'bad'.*ExpertInfo\.tags"):
        library.infos()
    with pytest.raises(Corrupt, match="expert 'bad'"):
        library.get_expert("bad")


def test_a_flipped_bit_in_the_weights_is_found_on_reading(tmp_path, make_expert):
    library = LocalExpertLibrary(str(tmp_path), create=True)
    library.add_expert(make_expert("e1"))
    (file,) = tmp_path.rglob("adapter_model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    again = LocalExpertLibrary(str(tmp_path))
    with pytest.raises(Corrupt, match="e1"):
        dict(again["e1"].expert_weights)


def test_a_token_is_never_shown(tmp_path):
    library = ExpertLibrary(str(tmp_path), token="s3cret", create=True)
    assert "s3cret" not in repr(library)
    assert "s3cret" not in repr(vars(library))
    assert "s3cret" not in "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_verify_finds_what_a_reader_would_stumble_over(library, make_expert):
    library.add_expert(make_expert("good"))
    library.add_expert(bare("facts-only"))
    assert library.verify() == []
    files = make_expert("e").files()
    info = make_expert("e").expert_info.to_dict()
    library.repository.add("experts/cut", files | {WEIGHTS_FILE: files[WEIGHTS_FILE][:-1]}, info)
    library.repository.add("experts/half", {WEIGHTS_FILE: files[WEIGHTS_FILE]}, info)
    library.repository.add("experts/text", files | {CONFIG_FILE: b"{"}, info)
    library.repository.add("experts/odd", files, {"format": 1, "tags": 3})
    found = {problem.where: problem.what for problem in library.verify()}
    assert sorted(found) == [f"experts/{name}" for name in ("cut", "half", "odd", "text")]
    assert "not a whole safetensors" in found["experts/cut"]
    assert "has no 'adapter_config.json'" in found["experts/half"]
    assert "ExpertInfo.tags" in found["experts/odd"]


def test_verify_names_a_damaged_expert_once(tmp_path, make_expert):
    library = LocalExpertLibrary(str(tmp_path), create=True)
    library.add_expert(make_expert("e1"))
    (file,) = tmp_path.rglob("adapter_model.safetensors")
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:-1])
    seen = []
    problems = library.verify(lambda done, total, name: seen.append((done, total)))
    assert [problem.where for problem in problems] == ["experts/e1"]
    assert seen[-1] == (2, 2)
