import copy
import importlib.util

import pytest
import torch

from mttl_adapters import base_models, embedded
from mttl_adapters.base_models import BaseModelError, fingerprint, load_base_model, tokenizer_digest
from mttl_adapters.embedded import EmbeddedModelError


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    path = tmp_path / "base"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_folder_is_loaded_frozen_with_its_tokenizer(folder, model):
    base = load_base_model(str(folder), dtype="float32")
    assert base.model_id == str(folder)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.tokenizer.pad_token is not None
    for name, parameter in model.named_parameters():
        assert torch.equal(base.model.get_parameter(name), parameter)


@pytest.mark.parametrize("typed", ["base", "./base", "~/base", "{folder}/../base", "link"])
def test_a_folder_has_one_id_however_it_is_typed(folder, monkeypatch, typed):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    (folder.parent / "link").symlink_to(folder)
    base = load_base_model(typed.format(folder=folder))
    assert base.model_id == str(folder.resolve())


def test_the_hub_id_of_the_embedded_model_means_it(folder, monkeypatch):
    monkeypatch.setattr(base_models, "embedded_folder", lambda *_: folder)
    for name in ("embedded", embedded.EMBEDDED_ID):
        assert load_base_model(name).model_id == embedded.EMBEDDED_ID


def test_the_fingerprint_does_not_depend_on_the_number_format(folder):
    one = load_base_model(str(folder), dtype="float32")
    other = load_base_model(str(folder), dtype="bfloat16")
    assert other.model.dtype == torch.bfloat16
    assert one.fingerprint == other.fingerprint


def test_other_weights_have_another_fingerprint(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.05)
    assert fingerprint(other) != fingerprint(model)


def test_the_digest_of_a_tokenizer_does_not_depend_on_its_last_call(tokenizer):
    before = tokenizer_digest(tokenizer)
    tokenizer.pad_token = "<pad>"
    tokenizer(["w1", "w2 w3"], padding=True, truncation=True, max_length=3)
    assert tokenizer_digest(tokenizer) == before


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(BaseModelError, match="no model folder"):
        load_base_model(str(tmp_path / "nope"))


def test_a_folder_without_weights_is_told_from_one_without_a_model(tmp_path, folder):
    with pytest.raises(BaseModelError, match=r"no config\.json"):
        load_base_model(str(tmp_path))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="no weights"):
        load_base_model(str(folder))


def test_a_damaged_folder_is_one_clear_line(folder):
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(BaseModelError, match="cannot load the model") as caught:
        load_base_model(str(folder))
    assert "\n" not in str(caught.value)


def test_no_hub_is_one_clear_line_that_says_what_to_pass(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(BaseModelError, match="pass a local folder") as caught:
        load_base_model("some-user/some-model")
    assert "some-user/some-model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_its_package_the_embedded_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match=r"mttl-adapters\[embedded\]"):
        embedded.embedded_gguf()


def test_bfloat16_is_chosen_where_the_processor_multiplies_it(folder, monkeypatch):
    for native in (True, False):
        monkeypatch.setattr(base_models, "multiplies_bfloat16", lambda device, n=native: n)
        base = load_base_model(str(folder), device="cpu")
        assert base.model.dtype == (torch.bfloat16 if native else torch.float32)


@pytest.fixture(scope="module")
def embedded_tokenizer():
    return embedded.gguf_tokenizer(embedded.embedded_gguf())


def test_the_embedded_tokenizer_keeps_every_id_of_its_file(embedded_tokenizer):
    assert len(embedded_tokenizer) == 49152
    assert embedded_tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert embedded_tokenizer.bos_token_id == 1
    assert embedded_tokenizer.eos_token_id == embedded_tokenizer.pad_token_id == 2
    assert embedded_tokenizer.unk_token_id == 0
    assert len(embedded_tokenizer.all_special_ids) == 17


def test_the_embedded_tokenizer_splits_digits_and_comes_back(embedded_tokenizer):
    text = "It isn't 12345,  naïve 日本 ✓\n\tx"
    ids = embedded_tokenizer(text).input_ids
    assert embedded_tokenizer.decode(ids) == text
    tokens = embedded_tokenizer.convert_ids_to_tokens(ids)
    assert [t for t in tokens if t.isascii() and t.isdigit()] == list("12345")


def test_the_embedded_chat_template_asks_for_an_answer(embedded_tokenizer):
    text = embedded_tokenizer.apply_chat_template(
        [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text.endswith("<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.slow
def test_the_embedded_model_answers(tmp_path):
    steps = []
    base = load_base_model(cache=tmp_path, progress=lambda what, done, total: steps.append(done))
    assert steps == [0, 1, 2, 3, 4]
    assert base.model_id == embedded.EMBEDDED_ID
    prompt = base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = base.model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert "Paris" in base.tokenizer.decode(ids[0])
