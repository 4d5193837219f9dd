"""Search by meaning, with a tiny BERT in a folder."""

import json
import sys

import pytest
import torch

from mttl_experts import Expert, ExpertInfo, ExpertLibrary
from mttl_experts.search import EmbeddingError
from mttl_experts.search import embeddings as embeddings_module
from mttl_experts.search.embeddings import Embedder

WORDS = ["sums", "numbers", "add", "poems", "verses", "write", "maps", "rivers"]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Saves a tiny BERT in which words of one meaning have nearly one vector."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    def make(seed=0, noted=None, prompts=None):
        folder = tmp_path_factory.mktemp("embedder")
        torch.manual_seed(seed)
        words = ["[PAD]", "[UNK]", *WORDS]
        backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
        backend.normalizer = normalizers.Lowercase()
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
        )
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=32,
        )
        model = BertModel(config)
        with torch.no_grad():
            table = model.embeddings.word_embeddings.weight
            table.mul_(50)
            table[0:2] = 0
            for word, like in (("numbers", "sums"), ("add", "sums"), ("verses", "poems")):
                near = table[words.index(like)] + 0.1 * torch.randn(16)
                table[words.index(word)] = near
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if noted is not None:
            (folder / "1_Pooling").mkdir()
            (folder / "1_Pooling/config.json").write_text(json.dumps(noted))
        if prompts is not None:
            (folder / "config_sentence_transformers.json").write_text(
                json.dumps({"prompts": prompts})
            )
        return str(folder)

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


@pytest.fixture
def described(tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    for name, task in (("adder", "add_numbers"), ("poet", "write_poems"), ("guide", "maps")):
        library.add_expert(Expert(ExpertInfo(name, task)))
    return library


@pytest.fixture
def embedded(monkeypatch):
    """Texts that were embedded, as they are."""
    real, texts = Embedder.documents, []

    def documents(self, given):
        texts.extend(given)
        return real(self, given)

    monkeypatch.setattr(Embedder, "documents", documents)
    return texts


def names(matches):
    return [match.name for match in matches]


def test_a_word_that_no_expert_has_finds_what_means_the_same(described, model):
    assert described.search.text("verses") == []
    found = described.search.text("verses", embeddings=model)
    assert found[0].name == "poet"
    assert sorted(names(found)) == ["adder", "guide", "poet"]
    assert found[0].score > found[1].score + 0.1
    assert found[0].score <= 1 + 1e-6
    assert names(described.search.text("sums", 1, embeddings=model)) == ["adder"]


CLS = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True}
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


@pytest.mark.parametrize("noted", [None, MEAN, CLS, {"pooling_mode": "cls"}], ids=str)
def test_scores_are_cosines_of_the_models_own_vectors(make_model, noted):
    from transformers import AutoModel, AutoTokenizer

    folder = make_model(noted=noted, prompts={"query": "maps ", "document": None})
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    vectors = []
    for text in ("maps verses", "write poems", "add"):
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vectors.append(hidden[0] if noted in (CLS, {"pooling_mode": "cls"}) else hidden.mean(0))
    one, *others = torch.nn.functional.normalize(torch.stack(vectors), dim=1)
    embedder = Embedder(folder)
    torch.testing.assert_close(embedder.query("verses"), one)
    torch.testing.assert_close(embedder.documents(["write poems", "add"]), torch.stack(others))
    assert embedder.digest == Embedder(folder).digest


def test_many_and_long_texts_are_embedded_as_each_by_itself(model):
    embedder = Embedder(model)
    texts = [" ".join(WORDS[: 1 + n % 8]) * (1 + n % 3) for n in range(70)] + ["poems " * 100]
    alone = torch.stack([embedder.documents([text])[0] for text in texts])
    torch.testing.assert_close(embedder.documents(texts), alone, atol=1e-5, rtol=1e-5)


def test_another_pooling_is_refused_by_name(make_model):
    with pytest.raises(EmbeddingError, match="lasttoken"):
        Embedder(make_model(noted={"pooling_mode": "lasttoken"}))


def test_each_text_is_embedded_once_and_again_when_it_changed(described, model, embedded):
    found = described.search.text("verses", embeddings=model)
    assert len(embedded) == 3
    generation = described.generation
    assert described.search.text("verses", embeddings=model) == found
    again = ExpertLibrary(described.uri)
    assert again.search.text("verses", embeddings=model) == found
    assert (len(embedded), again.generation) == (3, generation)
    again.update_info("guide", expert_task_name="verses")
    again.remove_expert("poet")
    assert names(again.search.text("verses", embeddings=model)) == ["guide", "adder"]
    assert embedded[3:] == ["guide\nverses"]
    again.restore_expert("poet")
    assert len(again.search.text("verses", embeddings=model)) == 3
    assert len(embedded) == 4


def test_another_model_or_another_pooling_has_vectors_of_its_own(tmp_path, make_model, embedded):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    library.add_expert(Expert(ExpertInfo("poet", "write_poems")))
    for number, model in enumerate(
        (make_model(), make_model(seed=1), make_model(noted={"pooling_mode": "cls"}))
    ):
        library.search.text("verses", embeddings=model)
        assert len(embedded) == number + 1
    library.search.text("verses", embeddings=make_model())  # the same in another folder
    assert len(embedded) == 3


def test_vectors_of_a_part_do_not_push_out_the_rest_for_ever(
    tmp_path, model, embedded, monkeypatch
):
    monkeypatch.setattr(embeddings_module, "SPARE", 2)
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    for number in range(4):
        library.add_expert(Expert(ExpertInfo(f"e{number}")))
    library.search.text("verses", embeddings=model)
    part = ExpertLibrary(library.uri, selection="e0,e1")
    part.search.text("verses", embeddings=model)
    assert len(embedded) == 4
    for number in range(20):
        library.update_info("e3", tags=(f"t{number}",))
        library.search.text("verses", embeddings=model)
    assert len(embedded) == 24
    (entry,) = library.artifacts.entries()
    kept = library.artifacts.get([], entry.recipe)["texts"]
    assert 4 <= len(kept) <= 12


def test_a_library_that_is_only_read_and_an_empty_one_answer(tmp_path, model):
    library = ExpertLibrary(f"local://{tmp_path}/lib", create=True)
    assert library.search.text("verses", embeddings=model) == []
    library.add_expert(Expert(ExpertInfo("poet")))
    reader = ExpertLibrary(library.uri, read_only=True)
    assert names(reader.search.text("verses", embeddings=model)) == ["poet"]
    assert reader.refresh().generation == 1


def test_what_is_missing_is_one_line_that_says_what_to_do(tmp_path, monkeypatch, described):
    for wrong in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(EmbeddingError, match="give the folder or hub id") as caught:
            described.search.text("verses", embeddings=str(wrong))
        assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EmbeddingError, match=r"mttl-experts\[embeddings\]"):
        described.search.text("verses", embeddings="any/model")
