import pytest
import torch
from torch import Tensor

from mttl_adapters.bank import Bank
from mttl_routing import (
    ROUTERS,
    Arrow,
    Choice,
    Fixed,
    Layer,
    Prompt,
    Router,
    Rows,
    SequenceRouter,
    Task,
    Uniform,
)

EXPERTS = ("anna", "bert", "cleo")


def make_layer(ranks: tuple[int, ...] = (2, 2, 2), experts: tuple[str, ...] = EXPERTS) -> Layer:
    bank = Bank.from_factors([(torch.zeros(r, 8), torch.zeros(6, r), 1.0) for r in ranks])
    return Layer("block.linear", experts, bank)


def make_prototypes(seed: int = 0, absent: tuple[str, ...] = ()) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    vectors = {name: torch.randn(8, generator=generator) for name in EXPERTS}
    return {n: {} if n in absent else {"block.linear": v / v.norm()} for n, v in vectors.items()}


def test_every_router_keeps_the_protocol_and_names_its_paper():
    for kind in ROUTERS.values():
        assert kind.paper.startswith("https://arxiv.org/abs/")
    for router in (Uniform(), Fixed("anna"), Arrow({})):
        assert isinstance(router, Router)
    assert isinstance(Task({}), SequenceRouter)


def test_uniform_gives_every_expert_the_same():
    gates = Uniform().gates(torch.zeros(5, 8, dtype=torch.bfloat16), make_layer(), Rows(None, 5))
    torch.testing.assert_close(gates.dense(3), torch.full((5, 3), 1 / 3))


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_arrow_equals_a_slow_loop(top_k, temperature):
    prototypes = make_prototypes()
    x = torch.randn(5, 8)
    arrow = Arrow(prototypes, Choice(top_k, temperature))
    gates = arrow.gates(x, make_layer(), Rows(None, 5)).dense(3)
    for token in range(5):
        scores = [
            abs(float(x[token].double() @ prototypes[name]["block.linear"].double())) / temperature
            for name in EXPERTS
        ]
        kept = sorted(range(3), key=lambda e: -scores[e])[:top_k]
        weights = torch.tensor([scores[e] for e in kept]).softmax(0)
        expected = torch.zeros(3).scatter(0, torch.tensor(kept), weights)
        torch.testing.assert_close(gates[token], expected, rtol=1e-4, atol=1e-5)


def test_arrow_never_chooses_an_expert_that_leaves_the_layer_alone():
    layer = make_layer(ranks=(2, 0, 2))
    x = torch.randn(50, 8)
    gates = Arrow(make_prototypes(absent=("bert",))).gates(x, layer, Rows(None, 5)).dense(3)
    assert (gates[:, 1] == 0).all()
    assert (gates[:, [0, 2]] > 0).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(50))


def test_arrow_does_not_see_the_sign_of_a_prototype():
    one = make_prototypes()
    other = {n: {m: -v for m, v in modules.items()} for n, modules in one.items()}
    x = torch.randn(5, 8)
    routers = Arrow(one, Choice(2)), Arrow(other, Choice(2))
    gates = [router.gates(x, make_layer(), Rows(None, 5)).dense(3) for router in routers]
    torch.testing.assert_close(*gates, rtol=0, atol=0)


def test_arrow_scores_a_bfloat16_input_in_float32():
    prototypes = make_prototypes()
    x = torch.randn(500, 8).bfloat16()
    arrow = Arrow(prototypes, Choice(1))
    gates = arrow.gates(x, make_layer(), Rows(None, 500)).dense(3)
    wide = arrow.gates(x.float(), make_layer(), Rows(None, 500)).dense(3)
    torch.testing.assert_close(gates, wide)
    assert gates.dtype == torch.float32


def make_prompt(n_rows: int, tasks, disabled: tuple[int, ...] = ()) -> Prompt:
    ids = torch.zeros(n_rows, 4, dtype=torch.long)
    return Prompt(ids, torch.ones_like(ids), tasks, EXPERTS, frozenset(disabled))


def test_task_sends_each_row_to_its_expert_and_shares_where_there_are_several():
    router = Task({"anna": ("sum", "sort"), "bert": ("sort",), "cleo": ()})
    gates = router.decide(make_prompt(3, ("sum", "sort", None)))
    torch.testing.assert_close(gates, torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]]))
    gates = router.decide(make_prompt(3, ("sum", "sort", None), disabled=(0,)))
    torch.testing.assert_close(gates, torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]]))


def test_task_takes_one_name_for_all_rows():
    gates = Task({"bert": ("sum",)}).decide(make_prompt(5, "sum"))
    torch.testing.assert_close(gates, torch.tensor([[0.0, 1.0, 0.0]]).expand(5, 3))


def test_task_follows_the_experts(make_expert):
    router = Task({"anna": ("sum",), "bert": ("sort",)})
    router.follow([make_expert("cleo", task="sum")], ["anna"])
    gates = router.decide(make_prompt(2, ("sum", "sort")))
    torch.testing.assert_close(gates, torch.tensor([[0.0, 0, 1], [0, 1, 0]]))


def test_task_says_what_it_lacks():
    router = Task({"anna": ("addition",), "bert": ("sorting",)})
    with pytest.raises(ValueError, match=r"needs the task of each row.*task_names"):
        router.decide(make_prompt(5, None))
    with pytest.raises(ValueError, match=r"task 'aditoin'.*did you mean 'addition'\?"):
        router.decide(make_prompt(5, "aditoin"))
    with pytest.raises(ValueError, match=r"named for 2 rows, the batch has 5"):
        router.decide(make_prompt(5, ("addition", "sorting")))
