import pytest
import torch
from torch import Tensor

from mttl_adapters.bank import Bank
from mttl_experts import lora_modules
from mttl_routing import ROUTERS, Arrow, Layer, Router, Rows, Task, Uniform
from mttl_routing.routers import arrow_prototypes

EXPERTS = ("anna", "bert", "cleo")
NO_ROWS = Rows(None, 5)


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
    for router in (Uniform(), Task({}), Arrow({})):
        assert isinstance(router, Router)


def test_uniform_gives_every_expert_the_same():
    gates = Uniform().gates(torch.zeros(5, 8, dtype=torch.bfloat16), make_layer(), NO_ROWS)
    torch.testing.assert_close(gates, torch.full((5, 3), 1 / 3))


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_arrow_equals_a_slow_loop(top_k, temperature):
    prototypes = make_prototypes()
    x = torch.randn(5, 8)
    gates = Arrow(prototypes, top_k=top_k, temperature=temperature).gates(x, make_layer(), NO_ROWS)
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
    gates = Arrow(make_prototypes(absent=("bert",)), top_k=3).gates(x, layer, NO_ROWS)
    assert (gates[:, 1] == 0).all()
    assert (gates[:, [0, 2]] > 0).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(50))


def test_arrow_does_not_see_the_sign_of_a_prototype():
    one = make_prototypes()
    other = {n: {m: -v for m, v in modules.items()} for n, modules in one.items()}
    x = torch.randn(5, 8)
    gates = [Arrow(p, top_k=2).gates(x, make_layer(), NO_ROWS) for p in (one, other)]
    torch.testing.assert_close(*gates, rtol=0, atol=0)


def test_arrow_scores_a_bfloat16_input_in_float32():
    prototypes = make_prototypes()
    x = torch.randn(500, 8).bfloat16()
    arrow = Arrow(prototypes, top_k=1)
    gates = arrow.gates(x, make_layer(), NO_ROWS)
    torch.testing.assert_close(gates, arrow.gates(x.float(), make_layer(), NO_ROWS))
    assert gates.dtype == torch.float32


@pytest.mark.parametrize("rslora", [False, True])
def test_a_prototype_is_the_direction_that_its_expert_amplifies_most(make_expert, rslora):
    expert = make_expert("anna", rank=5, rslora=rslora, targets=("q_proj", "down_proj"))
    prototypes = arrow_prototypes(expert)
    factors = lora_modules(expert)
    assert prototypes.keys() == factors.keys()
    for module, f in factors.items():
        delta = f.scaling * f.b @ f.a
        torch.testing.assert_close(prototypes[module].norm(), torch.tensor(1.0))
        torch.testing.assert_close(
            (delta @ prototypes[module]).norm(), torch.linalg.matrix_norm(delta, ord=2)
        )


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
        router.gates(x, make_layer(), NO_ROWS)
    with pytest.raises(ValueError, match=r"task 'aditoin'.*did you mean 'addition'\?"):
        router.gates(x, make_layer(), Rows(5, 1, "aditoin"))
    with pytest.raises(ValueError, match=r"2 rows .*no batch axis"):
        router.gates(x, make_layer(), Rows(None, 5, ("addition", "sorting")))


@pytest.mark.parametrize("top_k", [0, -1, True, 2.0])
def test_arrow_refuses_a_top_k_that_is_no_count(top_k):
    with pytest.raises(ValueError, match="top_k is"):
        Arrow({}, top_k=top_k)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_arrow_refuses_a_temperature_that_is_not_above_zero(temperature):
    with pytest.raises(ValueError, match="temperature is"):
        Arrow({}, temperature=temperature)
