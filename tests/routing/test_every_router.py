"""What every router keeps to: a slow loop, and what users expect of a causal language model.

One entry in ``CASES`` puts a router under all of it.
"""

import copy
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mttl_experts import ExpertLibrary, lora_modules
from mttl_routing import ROUTERS, RoutedModel, apply_expert, calibration, centroids, train_gates

TOP_K, TEMPERATURE = 2, 0.7
WEIGHTS = {"anna": 0.7, "cleo": -0.4}
ALIKE = ("anna", "cleo", "emil")  # of one rank, for combine="before"


@dataclass(frozen=True)
class Case:
    """A router by name.

    Attributes:
        score: an expert's score of one token, in float64, from what :class:`Seen` holds of it; None
            where ``gate`` says the gate itself.
        gate: the gate of an expert, by its name, the row's task and how many experts there are.
        row: the gates of a whole row by expert, from its token ids and :class:`Prompts`; where
            there is a ``score`` too, that decides among those whose gate is not 0.
        blend: the gate of an expert, one number or one a head, from what :class:`Seen` holds of it,
            and the row's task.
        options: for ``RoutedModel.from_library``.
        with_data: whether it learns from batches.
        learns: whether it has parameters; they are drawn anew, so that they tell.
        chooses: whether it takes ``top_k`` of the scores, and all else of a ``Choice``.
        tasks: of the rows, where it goes by them.
        ways: to combine that it is defined for.
    """

    score: Callable[[Tensor, Any], float] | None = None
    gate: Callable[[str, str, int], float] | None = None
    row: Callable[[list[int], Any], dict[str, float]] | None = None
    blend: Callable[[Any, str], Tensor] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    with_data: bool = False
    learns: bool = False
    chooses: bool = True
    tasks: tuple[str, ...] = ()
    ways: tuple[str, ...] = ("after", "before")


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std(correction=0)


def by_prototype(x, of):
    return abs(float(x @ torch.linalg.svd(of.delta).Vh[0]))


def by_norm(x, of):
    return float((of.delta @ x).norm())


def by_calibrated_norm(x, of):
    mean, deviation = of.calibration.double()
    return float(((of.delta @ x).norm() - mean) / deviation)


def by_centroid(x, of):
    return float(x @ of.centroid.double()) / float(
        x.norm() * of.centroid.double().norm() * math.sqrt(len(x))
    )


def by_gate(x, of):
    return float(standardised(x) @ standardised(of.gate.double())) / math.sqrt(len(x))


def best(scores: Mapping[str, float], k: int) -> list[str]:
    return sorted(scores, key=lambda name: -scores[name])[:k]


def by_words(ids, prompts):
    return {best(prompts.by_words(ids), 1)[0]: 1.0}


def by_nearest_tasks(ids, prompts):
    cosines = prompts.by_states(ids)
    weights = {name: math.exp(cosines[name] / 0.2) for name in best(cosines, 3)}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def by_last_token(ids, prompts):
    norms = prompts.by_last_token(ids)
    kept = best(norms, TOP_K)
    return {name: norms[name] / sum(norms[each] for each in kept) for name in kept}


def by_retrieval(ids, prompts):
    found = best(prompts.by_states(ids), TOP_K)
    return {name: 1 / len(found) for name in found}


def by_softmax(x, of):
    return float((of.learned["of_token"] @ x) @ (of.learned["of_expert"] @ of.own("embeddings")))


def by_product_key(x, of):
    query, half = of.learned["query"] @ x, len(of.learned["query"]) // 2
    side = math.ceil(math.sqrt(of.count))
    first, second = of.learned["first"][of.line // side], of.learned["second"][of.line % side]
    return float(query[:half] @ first + query[half:] @ second)


def by_network(x, of):
    hidden = (of.learned["first"] @ x + of.learned["first_bias"]).relu()
    return float(of.own("second") @ hidden + of.own("second_bias"))


def by_task(of, task):
    """Of all experts, those that leave the layer alone as well."""
    z, tasks = of.learned["logits"], of.tasks
    opened = (z[tasks.index(task)] if task in tasks else z.mean(0)).sigmoid()  # (e) or (q, e)
    return (opened / opened.sum(-1, keepdim=True))[..., of.line]


CASES = {
    "arrow": Case(by_prototype),
    "spectr": Case(by_norm),
    "seqr": Case(by_norm),
    "seqr, calibrated": Case(by_calibrated_norm, with_data=True),
    "centroid": Case(by_centroid, with_data=True),
    "phatgoose": Case(by_gate, with_data=True),
    "uniform": Case(gate=lambda name, task, count: 1 / count),
    "fixed": Case(
        gate=lambda name, task, count: WEIGHTS.get(name, 0.0), options={"weights": WEIGHTS}
    ),
    "task": Case(
        gate=lambda name, task, count: float(name == task), tasks=("cleo", "anna", "cleo")
    ),
    "predictor": Case(row=by_words),
    "lorauter": Case(row=by_nearest_tasks),
    "logo": Case(row=by_last_token),
    "retrieval": Case(row=by_retrieval),
    "retrieval, then arrow": Case(by_prototype, row=by_retrieval, options={"then": "arrow"}),
    "softmax": Case(by_softmax, learns=True),
    "product_key": Case(by_product_key, learns=True),
    "mlp": Case(by_network, learns=True, chooses=False),
    "poly": Case(blend=by_task, learns=True, tasks=("cleo", "anna", "a task that nobody knows")),
    "mhr": Case(
        blend=by_task,
        learns=True,
        tasks=("cleo", "anna", "a task that nobody knows"),
        ways=("before",),
    ),
}
QUERIES = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="session")
def libraries(mixed_experts, make_expert):
    """One of mixed ranks and modules, and one of equal ranks, by the way to combine."""
    made = {}
    for combine, experts in {
        "after": mixed_experts,
        "before": [make_expert(name, targets=("q_proj", "down_proj")) for name in ALIKE],
    }.items():
        made[combine] = ExpertLibrary(f"virtual://every-router-{combine}", create=True)
        with made[combine].batch():
            for expert in experts:
                made[combine].add_expert(expert)
    return made


def batches_of(expert):
    """Two batches of each expert's own, one of them padded."""
    generator = torch.Generator().manual_seed(sum(map(ord, expert.name)))
    made = []
    for width in (0, 3):
        ids = torch.randint(2, 61, (3, 8), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :width] = 0
        made.append(
            {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        )
    return made


def examples_of(experts) -> dict[str, list[Any]]:
    """Rows of each expert's own, and of its task, which is of its name."""
    return {expert.name: batches_of(expert) for expert in experts}


@pytest.fixture(params=list(CASES))
def case(request):
    return request.param


@pytest.fixture
def routed_by(loaded, libraries):
    def make(name: str, library=None, combine: str = "", top_k: int = TOP_K, **options):
        case = CASES[name]
        router = name.partition(",")[0]
        combine = combine or case.ways[0]
        library = libraries[combine] if library is None else library
        if case.with_data:
            options["batches"] = batches_of
        if case.row is not None and router != "logo":
            options["examples"] = examples_of(library.values())
        made = RoutedModel.from_library(
            library,
            router,
            top_k,
            combine,
            TEMPERATURE,
            base_model=loaded,
            **{**case.options, **options},
        )
        if case.learns:
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():
                for parameter in made.router.parameters():
                    parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        return made

    return make


def tasks_of(name: str, rows: int = 3) -> dict[str, Any]:
    tasks = CASES[name].tasks
    return {"task_names": tasks[:rows]} if tasks else {}


@torch.no_grad()
def logits_of(model, tokens: Tensor, **kwargs) -> Tensor:
    return model(tokens, **kwargs).logits


def seen_of(base, experts):
    """What the slow loop knows of each expert at each module."""
    known: dict[str, dict[str, SimpleNamespace]] = {}
    for expert in experts:
        learned = {
            "centroid": centroids(base, expert, batches_of(expert)),
            "calibration": calibration(base, expert, batches_of(expert)),
            "gate": train_gates(base, expert, batches_of(expert)),
        }
        for path, f in lora_modules(expert).items():
            known.setdefault(path, {})[expert.name] = SimpleNamespace(
                a=f.a.double(),
                b=f.b.double() * f.scaling,
                delta=f.scaling * f.b.double() @ f.a.double(),
                **{kind: values[path] for kind, values in learned.items()},
            )
    return known


class Prompts:
    """What the slow loop compares a row with: each expert's examples, and its last queries."""

    def __init__(self, base, experts, known) -> None:
        self.base = copy.deepcopy(base).double()
        self.examples = {
            expert.name: [
                row[kept.bool()].tolist()
                for batch in batches_of(expert)
                for row, kept in zip(batch["input_ids"], batch["attention_mask"], strict=True)
            ]
            for expert in experts
        }
        self.queries = known[QUERIES]

    def by_words(self, ids: list[int]) -> dict[str, float]:
        """Cosines of TF-IDF vectors over words and pairs of them, with the sum of examples'."""
        corpus = [terms(row) for rows in self.examples.values() for row in rows]
        documents = Counter(term for some in corpus for term in set(some))

        def vector(row: list[int]) -> Counter:
            weights = {
                term: (1 + math.log(n)) * (1 + math.log((1 + len(corpus)) / (1 + documents[term])))
                for term, n in Counter(terms(row)).items()
                if term in documents
            }
            norm = math.sqrt(sum(w * w for w in weights.values())) or 1.0
            return Counter({term: w / norm for term, w in weights.items()})

        query, found = vector(ids), {}
        for name, rows in self.examples.items():
            centroid = sum((vector(row) for row in rows), Counter())
            norm = math.sqrt(sum(w * w for w in centroid.values()))
            found[name] = sum(w * centroid[term] for term, w in query.items()) / norm
        return found

    def by_states(self, ids: list[int]) -> dict[str, float]:
        """Cosines of the means of last hidden states, with the mean of the examples'."""
        x, found = self._state(ids), {}
        for name, rows in self.examples.items():
            mean = torch.stack([self._state(row) for row in rows]).mean(0)
            found[name] = float(x @ mean / x.norm() / mean.norm())
        return found

    def by_last_token(self, ids: list[int]) -> dict[str, float]:
        """Norms of what each expert adds to the queries of the base's last block."""
        seen: list[Tensor] = []
        hook = self.base.get_submodule(QUERIES).register_forward_pre_hook(
            lambda module, args: seen.append(args[0][0, -1])
        )
        self.base(torch.tensor([ids]))
        hook.remove()
        return {name: float((of.delta @ seen[0]).norm()) for name, of in self.queries.items()}

    def _state(self, ids: list[int]) -> Tensor:
        states = self.base(torch.tensor([ids]), output_hidden_states=True).hidden_states
        return states[-1][0].mean(0)


def terms(ids: list[int]) -> list[Any]:
    return [*ids, *itertools.pairwise(ids)]


@pytest.fixture(scope="session")
def known(base, libraries):
    return {
        combine: seen_of(base, list(library.values())) for combine, library in libraries.items()
    }


@pytest.fixture(scope="session")
def prompts(base, libraries, known):
    return {
        combine: Prompts(base, library.values(), known[combine])
        for combine, library in libraries.items()
    }


def with_learned(known, router):
    """What the slow loop knows of each expert at each module, and what a router learned there."""
    state = {name: value.double() for name, value in router.state_dict().items()}
    found: dict[str, dict[str, SimpleNamespace]] = {}
    for path, here in known.items():
        ending = "." + path.replace(".", "/")
        learned = {n.removesuffix(ending): v for n, v in state.items() if n.endswith(ending)}
        found[path] = {
            name: Learned(
                a=of.a,
                b=of.b,
                delta=of.delta,
                learned=learned,
                line=router.names.index(name),
                count=len(router.names),
                tasks=getattr(router, "tasks", ()),
            )
            for name, of in here.items()
        }
    return found


class Learned(SimpleNamespace):
    """An expert at a module, and the router's tensors there."""

    def own(self, part: str) -> Tensor:
        """The expert's line of one of them."""
        return self.learned[part][self.line]


def slow_logits(
    base, known, prompts, case: Case, n_experts: int, combine: str, tokens: Tensor
) -> Tensor:
    """In float64, by a loop over tokens and experts."""
    model = copy.deepcopy(base).double()
    tasks = case.tasks or (None,) * len(tokens)
    of_row = [{} if case.row is None else case.row(ids, prompts) for ids in tokens.tolist()]

    def gates_of(x, here, row, task):
        if case.gate is not None:
            return {name: case.gate(name, task, n_experts) for name in here}
        if case.blend is not None:
            return {name: case.blend(of, task) for name, of in here.items()}
        if case.row is not None:
            here = {name: of for name, of in here.items() if of_row[row].get(name)}
            if case.score is None:
                return {name: of_row[row][name] for name in here}
        scores = {name: case.score(x, of) / TEMPERATURE for name, of in here.items()}
        kept = best(scores, TOP_K if case.chooses else len(scores))
        total = sum(math.exp(scores[name]) for name in kept)
        return {name: math.exp(scores[name]) / total for name in kept}

    def hook(here, module, args, output):
        added = torch.zeros_like(output)
        for row, task in enumerate(tasks):
            for place in range(output.shape[1]):
                x = args[0][row, place]
                gates = gates_of(x, here, row, task)
                if combine == "after":
                    for name, gate in gates.items():
                        added[row, place] += gate * (here[name].delta @ x)
                elif gates:
                    a = sum(here[name].a * each_of(gate, len(x)) for name, gate in gates.items())
                    b = sum(
                        here[name].b * each_of(gate, output.shape[-1])[:, None]
                        for name, gate in gates.items()
                    )
                    added[row, place] = b @ (a @ x)
        return output + added

    for path, here in known.items():
        module = model.get_submodule(path)
        module.register_forward_hook(lambda m, args, out, here=here: hook(here, m, args, out))
    return logits_of(model, tokens)


def each_of(gate, features: int) -> Tensor:
    """One number for each feature, from one for all or one for each head's slice of them."""
    gate = torch.as_tensor(gate, dtype=torch.float64).reshape(-1)
    return gate.repeat_interleave(features // len(gate))


@pytest.mark.parametrize(
    ("case", "combine"), [(name, way) for name, of in CASES.items() for way in of.ways]
)
def test_it_equals_a_slow_loop(base, libraries, known, prompts, routed_by, case, combine, tokens):
    of_experts = known[combine]
    with routed_by(case, combine=combine) as routed:
        actual = logits_of(routed, tokens, **tasks_of(case))
        if CASES[case].learns:
            of_experts = with_learned(of_experts, routed.router)
    expected = slow_logits(
        base,
        of_experts,
        prompts[combine],
        CASES[case],
        len(libraries[combine]),
        combine,
        tokens,
    )
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=2e-4)
    assert not torch.allclose(logits_of(base, tokens).double(), expected, atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_see_its_neighbours_or_its_padding(routed_by, case, side, tokens):
    lengths = (9, 4, 6)
    rows = [tokens[row, :length] for row, length in enumerate(lengths)]
    ids, mask = torch.zeros(2, 3, 9, dtype=torch.long)
    spans = [slice(9 - n, 9) if side == "left" else slice(0, n) for n in lengths]
    for row, span in enumerate(spans):
        ids[row, span], mask[row, span] = rows[row], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    names = tasks_of(case).get("task_names", (None,) * 3)
    with routed_by(case) as routed:
        together = logits_of(
            routed, ids, attention_mask=mask, position_ids=positions, **tasks_of(case)
        )
        for row, span in enumerate(spans):
            own = {"task_names": [names[row]]} if names[row] else {}
            alone = logits_of(routed, rows[row][None], **own)[0]
            torch.testing.assert_close(together[row, span], alone, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_experts_makes_no_difference(loaded, libraries, routed_by, case, tokens):
    combine = CASES[case].ways[0]
    experts = list(libraries[combine].values())
    with routed_by(case) as routed:
        expected, router = logits_of(routed, tokens, **tasks_of(case)), routed.router
    for order in (experts[::-1], experts[2:] + experts[:2]):
        with RoutedModel(loaded, order, router, combine=combine) as routed:
            actual = logits_of(routed, tokens, **tasks_of(case))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["greedy", "beam", "assisted"])
def test_generate_with_a_cache_equals_generate_without(base, routed_by, case, mode, tokens):
    rows = 1 if mode == "assisted" else 3
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    if mode == "beam":
        options["num_beams"] = 4
    ids = tokens[:rows]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # one row is padded
    assistant = {"assistant_model": copy.deepcopy(base)} if mode == "assisted" else {}
    inputs = {"attention_mask": mask, **tasks_of(case, rows), **options}
    with routed_by(case) as routed:
        with_cache = routed.generate(ids, **inputs, **assistant)
        without = routed.generate(ids, **inputs, use_cache=False)
    assert with_cache.tolist() == without.tolist()


def test_two_threads_do_not_disturb_each_other(routed_by, case, tokens):
    prompts = [tokens, tokens.flip(1)]
    inputs = {"max_new_tokens": 6, "do_sample": False, **tasks_of(case)}
    found: dict[int, list[list[int]]] = {}
    with routed_by(case) as routed:
        expected = [routed.generate(prompt, **inputs).tolist() for prompt in prompts]

        def run(index: int) -> None:
            found[index] = routed.generate(prompts[index], **inputs).tolist()

        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [found[0], found[1]] == expected


def test_its_own_expert_alone_is_that_expert(base, make_expert, routed_by, case, tokens):
    expert = make_expert("anna", targets=("q_proj", "down_proj"))
    with apply_expert(base, expert) as routed:
        expected = logits_of(routed, tokens)
    library = ExpertLibrary(f"virtual://own-{case.replace(',', '').replace(' ', '-')}", create=True)
    library.add_expert(expert)
    own = {"weights": "anna"} if case == "fixed" else {}
    with routed_by(case, library, top_k=1, **own) as routed:
        tasks = {"task_names": "anna"} if tasks_of(case) else {}
        actual = logits_of(routed, tokens, **tasks)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.25}, {"threshold": 0.4999}, {"null": True}, {"top_p": 0.25, "null": True}],
)
@pytest.mark.parametrize(
    "case", [name for name, of in CASES.items() if of.score and of.chooses and not of.row]
)
def test_routers_that_choose_take_all_of_the_choice(base, routed_by, case, options, tokens):
    with routed_by(case) as routed:
        plain = logits_of(routed, tokens)
    with routed_by(case, **options) as routed:
        other = logits_of(routed, tokens)
        alone = logits_of(routed, tokens[1:2])
    torch.testing.assert_close(other[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, other, atol=1e-4)


def test_every_case_is_a_router_and_older_names_are_the_same_ones():
    assert {name.partition(",")[0] for name in CASES} <= set(ROUTERS)
    for older, name in {"avg_act": "centroid", "oracle": "task", "rkhs": "softmax"}.items():
        assert ROUTERS[older] == ROUTERS[name]
