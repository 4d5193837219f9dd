"""Experts for one base id that were made on other weights of it, coming into one library."""

import dataclasses
import warnings

import pytest

from mttl_experts import (
    Expert,
    ExpertInfo,
    ExpertLibrary,
    IncompatibleExpertError,
    IncompatibleExpertWarning,
)

FIELDS = ["model_fingerprint", "tokenizer_digest", "template_digest", "model_architecture"]


@pytest.fixture
def empty(tmp_path):
    return ExpertLibrary(f"local://{tmp_path}/lib", create=True)


def made(name, base="phi-2", **digests):
    return Expert(ExpertInfo(name, expert_model=base, **digests))


def silent(action, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action(*args, **options)


@pytest.mark.parametrize("field", FIELDS)
def test_other_facts_of_one_base_are_a_warning_that_names_both_and_strictly_an_error(empty, field):
    silent(empty.add_expert, made("e1", **{field: "aaa"}))
    other = made("e2", **{field: "bbb"})
    with pytest.raises(IncompatibleExpertError, match=r"'e2'.*'bbb'.*'e1'.*'aaa'"):
        empty.add_expert(other, strict=True)
    assert empty.keys() == ["e1"]
    with pytest.warns(IncompatibleExpertWarning, match=r"'e2'.*'phi-2'.*'bbb'.*'e1'.*'aaa'"):
        empty.add_expert(other)
    assert empty.keys() == ["e1", "e2"]


def test_another_base_one_that_says_nothing_and_one_that_agrees_with_some_are_welcome(empty):
    silent(empty.add_expert, made("e1", model_fingerprint="aaa"))
    silent(empty.add_expert, made("e2", base="llama", model_fingerprint="bbb"), strict=True)
    silent(empty.add_expert, made("e3"), strict=True)
    silent(empty.add_expert, Expert(ExpertInfo("e4", model_fingerprint="ccc")), strict=True)
    with pytest.warns(IncompatibleExpertWarning):
        empty.add_expert(made("e5", model_fingerprint="bbb"))
    silent(empty.add_expert, made("e6", model_fingerprint="bbb"), strict=True)
    silent(empty.add_expert, made("e7", model_fingerprint="aaa"), strict=True)


def test_a_replaced_expert_is_not_compared_with_itself(empty):
    empty.add_expert(made("e1", model_fingerprint="aaa"))
    silent(empty.replace_expert, made("e1", model_fingerprint="bbb"), strict=True)
    silent(empty.add_expert, made("e2", model_fingerprint="bbb"), strict=True)
    with pytest.raises(IncompatibleExpertError, match=r"'ccc'.*'bbb'"):
        empty.replace_expert(made("e2", model_fingerprint="ccc"), strict=True)


def test_a_batch_is_compared_with_what_it_will_leave(empty):
    empty.add_expert(made("e1", model_fingerprint="aaa"))
    with empty.batch():
        with pytest.warns(IncompatibleExpertWarning, match=r"'bbb'.*'aaa'"):
            empty.add_expert(made("e2", model_fingerprint="bbb"))
        empty.remove_expert("e1")
        with pytest.warns(IncompatibleExpertWarning, match=r"'ccc'.*'e2'.*'bbb'"):
            empty.add_expert(made("e3", model_fingerprint="ccc"))
        empty.rename_expert("e2", "e4")
        with pytest.warns(IncompatibleExpertWarning, match=r"'ddd'.*'e3'.*'ccc'"):
            empty.add_expert(made("e5", model_fingerprint="ddd"))
        empty.remove_expert("e4")
        with pytest.warns(IncompatibleExpertWarning, match=r"'bbb'"):
            empty.add_expert(made("e6", model_fingerprint="bbb"))
    with pytest.raises(RuntimeError), empty.batch():
        empty.add_expert(made("e7", base="llama", model_fingerprint="aaa"))
        raise RuntimeError
    silent(empty.add_expert, made("e8", base="llama", model_fingerprint="bbb"), strict=True)


def test_what_others_added_counts_and_so_does_what_is_not_shown(empty, make_expert):
    def lora(name, digest):
        expert = make_expert(name)
        info = dataclasses.replace(expert.expert_info, model_fingerprint=digest)
        return dataclasses.replace(expert, expert_info=info)

    part = ExpertLibrary(empty.uri, model_name="test/llama", read_only=False)
    empty.add_expert(lora("e1", "aaa"))
    other = lora("e2", "bbb")
    with pytest.raises(IncompatibleExpertError, match=r"'bbb'.*'aaa'"):
        part.refresh().add_expert(other, strict=True)
    narrow = ExpertLibrary(empty.uri, selection=[], read_only=False)
    with pytest.raises(IncompatibleExpertError, match=r"'bbb'.*'aaa'"):
        narrow.add_expert(other, strict=True)


def test_what_is_taken_from_another_library_is_compared_as_well(empty, tmp_path):
    empty.add_expert(made("e1", model_fingerprint="aaa"))
    other = ExpertLibrary(f"local://{tmp_path}/other", create=True)
    other.add_expert(made("e2", model_fingerprint="bbb"))
    with pytest.raises(IncompatibleExpertError, match=r"'e2'.*'bbb'.*'e1'.*'aaa'"):
        empty.update_from(other, strict=True)
    assert empty.keys() == ["e1"]
    with pytest.warns(IncompatibleExpertWarning, match=r"'e2'.*'bbb'.*'e1'.*'aaa'"):
        assert empty.update_from(other) == ["e2"]
