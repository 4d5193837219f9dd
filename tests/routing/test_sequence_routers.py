"""Routers that decide for a whole row by its prompt, each beside a slow version of its maths."""

import itertools
import math
import os
import re
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mttl_adapters.bank import Bank
from mttl_experts import ExpertLibrary, lora_modules
from mttl_routing import RoutedModel, apply_expert
from mttl_routing.observing import inputs_of
from mttl_routing.routers import Layer, Prompt, Rows, SequenceRouter
from mttl_routing.routers.embedding import BaseEmbedding, TextEmbedding, examples_digest
from mttl_routing.routers.linear import logistic
from mttl_routing.routers.logo import Logo, last_queries
from mttl_routing.routers.lorauter import Lorauter
from mttl_routing.routers.nearest import Nearest, shares
from mttl_routing.routers.predictor import Predictor
from mttl_routing.routers.retrieval import Retrieval, RetrievalThenTokens
from mttl_routing.routers.words import Words

COUNTED = ("add", "sum", "sort", "letters", "name", "capital", "country", "numbers")
NAMES = ("anna", "bert", "cleo", "dora-the-name")
EXAMPLES = {
    "anna": ["add the two numbers", "sum of two numbers", "add one number"],
    "bert": ["sort the letters", "sort the words of the list"],
    "cleo": ["name the capital", "name the country of the capital", "capital of one country"],
}


def counts(texts) -> Tensor:
    """An encoder of one's own."""
    return torch.tensor([[text.count(word) for word in COUNTED] for text in texts]).float()


@pytest.fixture
def ask(base, tokenizer):
    """Makes the prompt of some texts, padded on either side."""

    def make(texts, *, side="right", experts=NAMES, disabled=(), tasks=None, extra=0) -> Prompt:
        rows = [tokenizer(text)["input_ids"] for text in texts]
        width = max(map(len, rows)) + extra
        ids, mask = torch.zeros(len(rows), width).long(), torch.zeros(len(rows), width).long()
        for line, row in enumerate(rows):
            where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[line, where], mask[line, where] = torch.tensor(row), 1

        def observe(paths):
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            return inputs_of(
                base, paths, input_ids=ids, attention_mask=mask, position_ids=positions
            )

        return Prompt(ids, mask, tasks, tuple(experts), frozenset(disabled), tokenizer, observe)

    return make


def slow_tfidf(texts: list[str], corpus: list[str]) -> list[dict[tuple[str, ...], float]]:
    """Unit TF-IDF vectors over single words and signs and pairs of them, term by term."""

    def terms(text: str) -> Counter[tuple[str, ...]]:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        return Counter([(word,) for word in words] + list(itertools.pairwise(words)))

    documents = Counter(term for text in corpus for term in set(terms(text)))
    vectors = []
    for text in texts:
        weights = {
            term: (1 + math.log(count)) * (1 + math.log((1 + len(corpus)) / (1 + documents[term])))
            for term, count in terms(text).items()
            if term in documents
        }
        norm = math.sqrt(sum(w * w for w in weights.values())) or 1.0
        vectors.append({term: w / norm for term, w in weights.items()})
    return vectors


def test_words_score_by_the_cosine_with_the_mean_tfidf_vector(mixed_experts):
    texts = list(EXAMPLES.values())
    corpus = [text for some in texts for text in some]
    queries = ["Sum the numbers!", "sort, sort the list", "nothing known", "name of capital"]
    words = Words(list(EXAMPLES), Words.fit(texts))
    expected = torch.zeros(len(queries), len(texts))
    for column, some in enumerate(texts):
        centroid: Counter = Counter()
        for vector in slow_tfidf(some, corpus):
            centroid.update(vector)
        norm = math.sqrt(sum(w * w for w in centroid.values()))
        for row, query in enumerate(slow_tfidf(queries, corpus)):
            expected[row, column] = sum(w * centroid[term] for term, w in query.items()) / norm
    torch.testing.assert_close(torch.from_numpy(words.of_texts(queries)), expected)


@pytest.mark.parametrize("n_classes", [1, 2, 3])
@pytest.mark.parametrize("head", ["words", "vectors"])
def test_a_classifier_is_one_linear_map_that_tells_its_classes_apart(n_classes, head):
    if head == "words":
        texts = list(EXAMPLES.values())[:n_classes]
        words = Words(list(EXAMPLES)[:n_classes], Words.fit(texts, "logistic"))
        logits = words.of_texts([text for some in texts for text in some])
        owners = np.repeat(np.arange(n_classes), [len(some) for some in texts])
    else:
        generator = np.random.default_rng(0)
        owners = np.arange(30) % n_classes
        rows = generator.normal(size=(30, 4)) * [1, 10, 0.1, 1] + owners[:, None] * [9, 0, 0, 9]
        logits = logistic(rows, owners, n_classes)(torch.from_numpy(rows).float()).numpy()
    assert logits.shape == (len(owners), n_classes)
    assert (logits.argmax(1) == owners).all()


@pytest.mark.parametrize("kind", ["hidden", "input"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_bases_embedding_is_the_mean_over_the_tokens_that_count(
    base, loaded, tokenizer, ask, kind, side
):
    texts = ["add the two numbers", "sort", "name the country of the capital"]
    embedding = BaseEmbedding(loaded, kind, batch_size=2)
    expected = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        states = base(ids, output_hidden_states=True).hidden_states
        expected.append(states[-1 if kind == "hidden" else 0][0].double().mean(0).float())
    expected = torch.stack(expected)
    torch.testing.assert_close(embedding.of(ask(texts, side=side, extra=3)), expected)
    torch.testing.assert_close(embedding.of_examples(texts), expected)
    batch = {"input_ids": ask(texts).input_ids, "attention_mask": ask(texts).attention_mask}
    torch.testing.assert_close(embedding.of_examples([texts[0], batch])[1:], expected)


def slow_means(embedding, examples) -> dict[str, Tensor]:
    return {
        name: torch.stack([embedding.of_examples([one])[0] for one in some]).double().mean(0)
        for name, some in examples.items()
    }


@pytest.mark.parametrize("features", ["words", "hidden", "input", "encoder"])
@pytest.mark.parametrize("head", ["centroid", "logistic"])
def test_predictor_gives_each_row_to_the_expert_of_its_examples(
    mixed_experts, loaded, ask, features, head
):
    if features == "encoder":
        features = counts
    predictor = Predictor.fit(
        mixed_experts, EXAMPLES, features=features, head=head, base_model=loaded
    )
    assert isinstance(predictor, SequenceRouter)
    texts = [some[-1] for some in EXAMPLES.values()]
    gates = predictor.decide(ask(texts))
    torch.testing.assert_close(gates, torch.eye(3, 4))
    reordered = predictor.decide(ask(texts[::-1], side="left", extra=4, experts=NAMES[::-1]))
    torch.testing.assert_close(reordered, torch.eye(3, 4).flip(0, 1))
    # Switched off, or no longer there: the next best, and the base alone where nobody is left.
    assert (predictor.decide(ask(texts, disabled=(0,)))[0] > 0).tolist()[0] is False
    assert (predictor.decide(ask(texts, experts=NAMES[3:])) == 0).all()


@pytest.mark.parametrize("of", ["hidden", "input"])
def test_a_base_that_was_set_up_for_checkpointing_gives_plain_vectors(base, loaded, of):
    base.enable_input_require_grads()
    try:
        assert not BaseEmbedding(loaded, of).of_examples(["add one"]).requires_grad
    finally:
        base.disable_input_require_grads()


@pytest.mark.parametrize("top_k", [1, 2, 9])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_nearest_centroids_equal_a_slow_loop(mixed_experts, loaded, ask, top_k, temperature):
    predictor = Predictor.fit(
        mixed_experts,
        EXAMPLES,
        features="hidden",
        base_model=loaded,
        top_k=top_k,
        temperature=temperature,
    )
    embedding = BaseEmbedding(loaded)
    means = slow_means(embedding, EXAMPLES)
    texts = ["add the capital", "list of numbers", "sort"]
    gates = predictor.decide(ask(texts, side="left"))
    for row, text in enumerate(texts):
        x = embedding.of_examples([text])[0].double()
        cosine = [float(x @ m / x.norm() / m.norm()) for m in means.values()]
        kept = sorted(range(3), key=lambda e: -cosine[e])[:top_k]
        weights = torch.tensor([cosine[e] / temperature for e in kept]).softmax(0)
        expected = torch.zeros(4).scatter(0, torch.tensor(kept), weights)
        torch.testing.assert_close(gates[row], expected, rtol=1e-4, atol=1e-5)


def test_predictor_says_what_it_lacks(mixed_experts, loaded):
    with pytest.raises(ValueError, match=r"'ana' is named.*'anna'"):
        Predictor.fit(mixed_experts, {"ana": ["add"]})
    with pytest.raises(ValueError, match=r"no examples of \['anna'\]"):
        Predictor.fit(mixed_experts, {"anna": []})
    with pytest.raises(ValueError, match=r"takes the base model"):
        Predictor.fit(mixed_experts, EXAMPLES, features="hidden")
    with pytest.raises(ValueError, match=r"one vector for each"):
        Predictor.fit(mixed_experts, EXAMPLES, features=lambda texts: torch.zeros(3))
    with pytest.raises(ValueError, match=r"head is 'tree'"):
        Predictor.fit(mixed_experts, EXAMPLES, head="tree")
    with pytest.raises(ValueError, match=r"tokenizer"):
        BaseEmbedding(loaded.model).of_examples(["add"])


@pytest.mark.parametrize("features", ["words", "hidden"])
@pytest.mark.parametrize("head", ["centroid", "logistic"])
def test_what_is_fitted_is_kept_beside_the_experts_and_never_stale(
    mixed_experts, loaded, ask, tmp_path, monkeypatch, features, head
):
    with ExpertLibrary(f"local://{tmp_path}", create=True).batch("experts") as library:
        for expert in mixed_experts:
            library.add_expert(expert)

    def fit(examples):
        return Predictor.fit(
            mixed_experts,
            examples,
            features=features,
            head=head,
            base_model=loaded,
            library=ExpertLibrary(f"local://{tmp_path}"),
        )

    prompt = ask(["add the capital", "list of numbers"])
    first = fit(EXAMPLES).scorer.scores(prompt)
    entries = len(library.refresh().artifacts.entries())
    with monkeypatch.context() as patch:
        patch.setattr(Words, "fit", None)
        patch.setattr(BaseEmbedding, "of_examples", None)
        torch.testing.assert_close(fit(EXAMPLES).scorer.scores(prompt), first)
    other = fit(EXAMPLES | {"anna": ["big big country"]}).scorer.scores(prompt)
    assert (other - first).abs().max() > 1e-3
    assert len(library.refresh().artifacts.entries()) == entries + 1


def test_an_encoder_without_a_name_keeps_nothing_and_one_with_a_name_does(mixed_experts, tmp_path):
    library = ExpertLibrary(f"local://{tmp_path}", create=True)
    for features, kept in [(counts, 0), (TextEmbedding(counts, "counts"), 3)]:
        Predictor.fit(mixed_experts, EXAMPLES, features=features, library=library)
        assert len(library.refresh().artifacts.entries()) == kept


def test_examples_are_known_by_their_content():
    batch = {"input_ids": torch.tensor([[1, 2]])}
    digests = {
        examples_digest(some)
        for some in (["ab"], ["a", "b"], ["b", "a"], [batch], [{"input_ids": torch.tensor([[1]])}])
    }
    assert len(digests) == 5
    explicit = batch | {"attention_mask": torch.ones(1, 2).long()}
    assert examples_digest([batch]) == examples_digest([explicit])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_lorauter_equals_a_slow_loop(make_expert, loaded, ask, top_k):
    """Tasks, not experts, compete; several experts of a task share what it gets."""
    experts = [
        make_expert("anna", task=("adding", "sorting")),
        make_expert("bert", task="sorting"),
        make_expert("cleo", task="unknown"),
        make_expert("dora-the-name", task="unknown"),
    ]
    examples = dict(zip(("adding", "sorting", "naming"), EXAMPLES.values(), strict=True))
    router = Lorauter.fit(
        experts, examples, pairs={"naming": ["cleo"]}, base_model=loaded, top_k=top_k
    )
    assert isinstance(router, SequenceRouter)
    whose = {"adding": [0], "sorting": [0, 1], "naming": [2]}
    embedding = BaseEmbedding(loaded)
    means = slow_means(embedding, examples)
    texts = ["add the capital", "list of numbers", "sort"]
    gates = router.decide(ask(texts, side="left", extra=2))
    for row, text in enumerate(texts):
        x = embedding.of_examples([text])[0].double()
        cosine = {task: float(x @ m / x.norm() / m.norm()) for task, m in means.items()}
        kept = sorted(cosine, key=lambda task: -cosine[task])[:top_k]
        total = sum(math.exp(cosine[task] / 0.2) for task in kept)
        expected = torch.zeros(4)
        for task in kept:
            for column in whose[task]:
                expected[column] += math.exp(cosine[task] / 0.2) / total / len(whose[task])
        torch.testing.assert_close(gates[row], expected, rtol=1e-4, atol=1e-5)
    # A task whose experts are all off is passed over; one that keeps some goes to those.
    gates = router.decide(ask(texts, disabled=(0, 2)))
    torch.testing.assert_close(gates, torch.tensor([[0.0, 1, 0, 0]]).expand(3, 4))


def test_lorauter_refuses_a_task_that_nobody_serves(make_expert, loaded):
    with pytest.raises(ValueError, match=r"tasks \['naming'\] have no expert"):
        Lorauter.fit([make_expert("anna")], {"naming": ["name"]}, base_model=loaded)
    with pytest.raises(ValueError, match=r"'bert' is named"):
        Lorauter.fit(
            [make_expert("anna")], {"naming": ["a"]}, pairs={"naming": ["bert"]}, base_model=loaded
        )


@pytest.mark.parametrize("signal", ["norm", "entropy"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("top_k", [1, 2, 20])
def test_logo_equals_a_slow_loop(base, mixed_experts, tokenizer, ask, signal, side, top_k):
    router = Logo(mixed_experts, signal=signal, top_k=top_k)
    assert router.module == "model.layers.1.self_attn.q_proj"
    texts = ["add the two numbers", "sort", "name the country of the capital"]
    gates = router.decide(ask(texts, side=side, extra=2))
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        h = inputs_of(base, [router.module], input_ids=ids)[router.module][0, -1].double()
        scores = {}
        for column, expert in enumerate(mixed_experts):
            f = lora_modules(expert).get(router.module)
            if f is None:
                continue
            o = f.scaling * f.b.double() @ f.a.double() @ h
            p = o.exp() / o.exp().sum()
            entropy = -sum(float(q) * math.log(float(q)) for q in p)
            scores[column] = float(o.norm()) if signal == "norm" else 1 / entropy
        assert 3 not in scores  # it leaves the projection alone
        kept = sorted(scores, key=lambda e: -scores[e])[:top_k]
        expected = torch.zeros(4)
        for column in kept:
            expected[column] = scores[column] / sum(scores[e] for e in kept)
        torch.testing.assert_close(gates[row], expected, rtol=1e-4, atol=1e-5)


def test_logo_follows_the_experts(make_expert, mixed_experts, ask):
    router, texts = Logo(mixed_experts, top_k=9), ["add the two numbers", "sort"]
    before = router.decide(ask(texts, experts=(*NAMES, "emil")))
    assert (before[:, 4] == 0).all()
    new = [make_expert("emil"), make_expert("bert", seed=5)]
    router.follow(new, ["bert", "anna"])
    after = router.decide(ask(texts, experts=(*NAMES, "emil")))
    assert (after[:, 0] == 0).all()
    assert (after[:, [1, 2, 4]] > 0).all()
    fresh = Logo([mixed_experts[2], *new], top_k=9)
    torch.testing.assert_close(fresh.decide(ask(texts, experts=(*NAMES, "emil"))), after)


def test_logo_reads_the_queries_of_the_last_block_or_asks_which():
    paths = [f"model.layers.{n}.self_attn.{p}" for n in (2, 10, 9) for p in ("q_proj", "v_proj")]
    assert last_queries(paths) == "model.layers.10.self_attn.q_proj"
    t5 = ["encoder.block.1.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.q"]
    assert last_queries(t5) == t5[0]
    with pytest.raises(ValueError, match=r"module='h.0.attn.c_attn'"):
        last_queries(["h.0.attn.c_attn"])


def test_logo_refuses_what_it_does_not_know(make_expert):
    with pytest.raises(ValueError, match="signal is 'sign'"):
        Logo([make_expert("anna")], signal="sign")
    with pytest.raises(ValueError, match="no expert adapts 'lm_head'"):
        Logo([make_expert("anna")], module="lm_head")


@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_retrieval_gives_equal_shares_to_the_nearest(mixed_experts, loaded, ask, top_k):
    router = Retrieval.fit(mixed_experts, EXAMPLES, base_model=loaded, top_k=top_k)
    embedding = BaseEmbedding(loaded)
    means = slow_means(embedding, EXAMPLES)
    texts = ["add the capital", "list of numbers", "sort"]
    gates = router.decide(ask(texts, side="left", extra=1))
    for row, text in enumerate(texts):
        x = embedding.of_examples([text])[0].double()
        cosine = [float(x @ m / x.norm() / m.norm()) for m in means.values()]
        kept = sorted(range(3), key=lambda e: -cosine[e])[:top_k]
        assert gates[row].nonzero().flatten().tolist() == sorted(kept)
        torch.testing.assert_close(gates[row, kept], torch.full((len(kept),), 1 / len(kept)))
    assert (router.decide(ask(texts, experts=NAMES[3:])) == 0).all()


class ByNorm:
    """Tokens shared among the experts that may be chosen, by what each adds to them."""

    def gates(self, x, layer, rows):
        added = [s * (x.float() @ a.float().T) @ b.float().T for a, b, s in layer.bank.factors()]
        scores = torch.stack([update.norm(dim=1) for update in added], dim=1)
        off = [column for column in range(len(layer.experts)) if column not in layer.enabled]
        scores[:, off] = -torch.inf
        return scores.softmax(1)


def test_retrieval_then_tokens_asks_the_other_router_about_the_retrieved_alone(
    mixed_experts, loaded, ask
):
    path = "model.layers.1.self_attn.q_proj"
    factors = [lora_modules(expert).get(path) for expert in mixed_experts]
    nothing = (torch.zeros(0, 32), torch.zeros(32, 0), 1.0)
    bank = Bank.from_factors([(f.a, f.b, f.scaling) if f else nothing for f in factors])
    layer = Layer(path, NAMES, bank)
    router = Retrieval.fit(mixed_experts, EXAMPLES, base_model=loaded, top_k=2, tokens=ByNorm())
    assert isinstance(router, RetrievalThenTokens)
    x = torch.randn(4 * 5, 32, generator=torch.Generator().manual_seed(0))
    decision = torch.tensor([[0.5, 0.5, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    gates = router.gates(x, layer, Rows(4, 5, decision=decision)).view(4, 5, 4)
    for row, token in itertools.product(range(4), range(5)):
        kept = decision[row].nonzero().flatten()
        expected = torch.zeros(4)
        if len(kept):
            token_x = x[5 * row + token].double()
            added = [
                factors[e].scaling * factors[e].b.double() @ factors[e].a.double() @ token_x
                for e in kept
            ]
            lined_up = [float(update.norm()) for update in added]
            expected[kept] = torch.tensor(lined_up).softmax(0)
        torch.testing.assert_close(gates[row, token], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="saw the prompts"):
        router.gates(x, layer, Rows(4, 5))


def test_shares_are_zero_where_nothing_can_be_chosen():
    assert (shares(torch.zeros(2, 0), [], 3, 2, 1.0) == 0).all()
    with pytest.raises(ValueError, match="top_k is 0"):
        Predictor(Nearest({"anna": torch.ones(2)}, TextEmbedding(normalize)), top_k=0)
    with pytest.raises(ValueError, match="temperature is 0"):
        Predictor(Nearest({"anna": torch.ones(2)}, TextEmbedding(normalize)), temperature=0)


def made(name: str, experts, loaded):
    """Each router by way of a routed model's own options."""
    if name == "retrieval then tokens":
        tokens = ByNorm()
        return {
            "router": Retrieval.fit(experts, EXAMPLES, base_model=loaded, top_k=2, tokens=tokens)
        }
    examples = dict(EXAMPLES)
    return {"router": name} | ({} if name == "logo" else {"examples": examples})


@pytest.mark.parametrize(
    "name", ["predictor", "lorauter", "logo", "retrieval", "retrieval then tokens"]
)
@pytest.mark.parametrize("mode", [{}, {"num_beams": 4}], ids=["greedy", "beam"])
def test_generation_with_a_cache_equals_without_and_row_by_row(
    base, mixed_experts, loaded, ask, name, mode
):
    prompt = ask(["add the two numbers", "sort the list", "name the capital of one"], side="left")
    together = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}
    short = {"max_new_tokens": 5, "do_sample": False} | mode
    options = made(name, mixed_experts, loaded)
    with RoutedModel.from_experts(mixed_experts, base_model=loaded, top_k=2, **options) as routed:
        cached = routed.generate(**together, **short)
        assert torch.equal(cached, routed.generate(**together, **short, use_cache=False))
        for row, (ids, mask) in enumerate(zip(*together.values(), strict=True)):
            alone = routed.generate(ids[mask.bool()][None], **short)
            assert torch.equal(cached[row, -5:], alone[0, -5:])
        threads = [None, None]

        def run(index: int) -> None:
            threads[index] = routed.generate(**together, **short)

        started = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        assert all(torch.equal(each, cached) for each in threads)
    assert not torch.equal(cached, base.generate(**together, **short))


def test_a_row_predicted_to_be_an_experts_own_equals_that_expert(
    base, make_expert, mixed_experts, loaded, ask
):
    prompt = ask(["add one number", "sort the letters"], side="left")
    inputs = {"input_ids": prompt.input_ids, "attention_mask": prompt.attention_mask}
    with torch.no_grad():
        with RoutedModel.from_experts(
            mixed_experts, "predictor", base_model=loaded, examples=EXAMPLES
        ) as routed:
            together = routed(**inputs).logits
        for row, expert in enumerate(mixed_experts[:2]):
            with apply_expert(base, expert) as alone:
                kept = prompt.attention_mask[row].bool()
                torch.testing.assert_close(
                    together[row, kept], alone(**inputs).logits[row, kept], rtol=1e-4, atol=1e-4
                )


def test_a_router_that_is_fitted_says_what_it_is_fitted_on(mixed_experts, loaded):
    with pytest.raises(ValueError, match=r"'predictor' is fitted on examples.*examples="):
        RoutedModel.from_experts(mixed_experts, "predictor", base_model=loaded)


@pytest.mark.slow
@pytest.mark.skipif("MTTL_TEST_DATA" not in os.environ, reason="MTTL_TEST_DATA names no real data")
@pytest.mark.parametrize("head", ["centroid", "logistic"])
def test_words_tell_the_flan_tasks_apart(head, make_expert):
    """48 tasks, 12,011 training prompts; the 1,501 test prompts have none of them among them."""
    folder = Path(os.environ["MTTL_TEST_DATA"], "flan_flat")
    rows = parquet.read_table(folder / "train.parquet").to_pylist()
    train, test = ([r for r in rows if r["split"] == split] for split in ("train", "test"))
    texts: dict[str, list[str]] = {}
    for row in train:
        some = texts.setdefault(row["task_name"], [])
        if head == "centroid" or len(some) < 16:  # a classifier of all takes minutes
            some.append(row["source"])
    assert len(texts) == 48
    words = Words(list(texts), Words.fit(list(texts.values()), head))
    scores = words.of_texts([row["source"] for row in test])
    found = [words.names[column] for column in scores.argmax(1)]
    accuracy = np.mean([name == row["task_name"] for name, row in zip(found, test, strict=True)])
    assert accuracy > (0.99 if head == "centroid" else 0.95), accuracy
