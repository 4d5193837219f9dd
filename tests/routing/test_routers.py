import pytest
import torch
from torch import Tensor

from mttl_adapters.bank import Bank
from mttl_routing import ROUTERS, Arrow, Choice, Fixed, Layer, Router, Rows, Task, Uniform

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
    for router in (Uniform(), Fixed("anna"), Task({}), Arrow({})):
        assert isinstance(router, Router)


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


def test_task_sends_each_row_to_its_expert_and_shares_where_there_are_several():
    router = Task({"anna": ("sum", "sort"), "bert": ("sort",), "cleo": ()})
    rows = Rows(3, 2, ("sum", "sort", None))
    gates = router.gates(torch.zeros(6, 8), make_layer(), rows)
    expected = [[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 0]]
    torch.testing.assert_close(gates, torch.tensor(expected).repeat_interleave(2, dim=0))


def test_task_takes_one_name_for_all_rows_also_without_a_batch_axis():
    gates = Task({"bert": ("sum",)}).gates(torch.zeros(5, 8), make_layer(), Rows(None, 5, "sum"))
    torch.testing.assert_close(gates, torch.tensor([[0.0, 1.0, 0.0]]).expand(5, 3))


def test_task_says_what_it_lacks():
    router = Task({"anna": ("addition",), "bert": ("sorting",)})
    x = torch.zeros(5, 8)
    with pytest.raises(ValueError, match=r"needs the task of each row.*task_names"):
        router.gates(x, make_layer(), Rows(None, 5))
    with pytest.raises(ValueError, match=r"task 'aditoin'.*did you mean 'addition'\?"):
        router.gates(x, make_layer(), Rows(5, 1, "aditoin"))
    with pytest.raises(ValueError, match=r"2 rows .*no batch axis"):
        router.gates(x, make_layer(), Rows(None, 5, ("addition", "sorting")))
