from __future__ import annotations

from pathlib import Path

import pytest

import mttl_data


def test_every_public_name_can_be_had():
    assert len(mttl_data.__all__) > 30
    for name in mttl_data.__all__:
        assert getattr(mttl_data, name) is not None


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nope"):
        _ = mttl_data.nope


def test_the_readme_example_runs(tiny_llama, tokenizer, tmp_path, monkeypatch, capsys):
    readme = Path(__file__).parents[2] / "packages" / "mttl-data" / "README.md"
    example = readme.read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(example, {"model": tiny_llama(max_position_embeddings=1024), "tokenizer": tokenizer})
    assert capsys.readouterr().out.startswith("100 0.0 (0.0")


def test_every_error_of_the_package_derives_from_one():
    import mttl_data.errors

    found = [
        value
        for value in vars(mttl_data.errors).values()
        if isinstance(value, type) and value.__module__ == "mttl_data.errors"
    ]
    assert len(found) > 5
    assert all(issubclass(kind, (mttl_data.DataError, Warning)) for kind in found)
