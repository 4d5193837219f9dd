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
