"""Training of routers, and of routers with their experts."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mttl_adapters import Bank, Chosen, DivergedError, TrainingConfig, kernels, mean_loss
from mttl_experts import Expert
from mttl_routing import (
    RoutedModel,
    load_balance,
    mutual_information,
    task_information,
    train,
)
from tests.routing.two_kinds import accuracy, ids_of, rows_of, two_experts

FAST = TrainingConfig(learning_rate=3e-2, scheduler="constant", warmup_proportion=0.0)


@pytest.fixture(scope="module")
def experts(make_expert):
    return two_experts(make_expert)


@pytest.fixture(scope="module")
def mixture(base, experts):
    """Batches whose labels are what one of the two experts says, by the kind of a row's tokens."""
    batches = []
    for step in range(40):
        own = [rows_of(base, expert, kind, 100 * step) for kind, expert in enumerate(experts)]
        batch = {name: torch.cat([rows[name] for rows in own]) for name in own[0]}
        batches.append(batch | {"task_names": ("anna",) * 4 + ("bert",) * 4})
    return batches


def weights_of(routed) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in routed.router.named_parameters()}


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("name", "rate"), [("softmax", 2e-2), ("product_key", 2e-2), ("mlp", 1e-2), ("poly", 0.3)]
)
def test_the_right_experts_are_found(base, experts, mixture, name, rate):
    untouched = {key: value.clone() for key, value in base.state_dict().items()}
    with RoutedModel.from_experts(experts, name, 2, base_model=base) as routed:
        first = mean_loss(routed, mixture)
        config = TrainingConfig(learning_rate=rate)  # which falls, so that the end is calm
        report = train(routed, mixture * 2, config)
        assert report.train_loss < first - 0.5
        assert accuracy(routed) >= 0.95
        assert not routed.training
        assert not routed.router.training
    assert_same(base.state_dict(), untouched)
    assert not any(p.requires_grad or p.grad is not None for p in base.parameters())


def test_the_same_seed_gives_the_same_router(base, experts, mixture):
    found = []
    for _ in range(2):
        with RoutedModel.from_experts(experts, "poly", base_model=base) as routed:
            state = torch.get_rng_state()
            train(routed, mixture[:3], FAST)
            assert torch.equal(torch.get_rng_state(), state)
            found.append(weights_of(routed))
    assert_same(*found)


def test_a_router_and_its_experts_may_train_at_two_speeds(base, experts, mixture):
    first = {expert.name: expert.expert_weights for expert in experts}
    moved = {}
    for rate in (0.1, None):
        config = TrainingConfig(learning_rate=1e-4, scheduler="constant", warmup_proportion=0.0)
        with RoutedModel.from_experts(experts, "poly", base_model=base) as routed:
            before = weights_of(routed)
            train(routed, mixture[:1], config, experts=True, router_learning_rate=rate)
            ways = [(weights_of(routed)[name], value) for name, value in before.items()]
            ways += [
                (value, first[name.split()[0]][name.split()[1]])
                for name, value in experts_of(routed).items()
            ]
            moved[rate] = [(now - then).abs().max().item() for now, then in ways]
    # The first step of Adam is the learning rate, wherever there is a gradient.
    assert moved[0.1][0] == pytest.approx(0.1, rel=1e-3)
    assert moved[None][0] == pytest.approx(1e-4, rel=1e-2)
    for of_experts in (moved[0.1][1:], moved[None][1:]):
        assert max(of_experts) == pytest.approx(1e-4, rel=1e-2)


def test_without_a_config_the_router_has_its_own_rate(base, experts, mixture):
    for name, rate in (("poly", 0.1), ("softmax", 1e-3)):
        with RoutedModel.from_experts(experts, name, 2, base_model=base) as routed:
            before = weights_of(routed)
            train(routed, mixture[:2], experts=True)
            steps = [(weights_of(routed)[key] - value).abs().max() for key, value in before.items()]
            # Two steps of a linear schedule: the whole rate and half of it.
            assert max(steps).item() == pytest.approx(1.5 * rate, rel=0.1)


def test_a_rate_that_cannot_train_is_refused_and_one_that_diverges_is_named(base, experts, mixture):
    with RoutedModel.from_experts(experts, "poly", base_model=base) as routed:
        for rate in (0.0, -1.0):
            with pytest.raises(ValueError, match=f"_learning_rate is {rate}; it must be above 0"):
                train(routed, mixture[:1], router_learning_rate=rate)
        routed.router.logits.of("model.layers.1.mlp.down_proj").data.fill_(torch.nan)
        with pytest.raises(DivergedError, match=r"at learning rate 0\.5; lower"):
            train(routed, mixture[:1], router_learning_rate=0.5)


def test_one_expert_a_token_needs_another_loss_to_learn_from(base, experts, mixture):
    """Its weight is 1 whatever the scores; balance sees behind it."""
    with RoutedModel.from_experts(experts, "softmax", 1, base_model=base) as routed:
        with pytest.raises(ValueError, match="would teach it nothing; take top_k=2, or a balance"):
            train(routed, mixture[:2], FAST)
        before = weights_of(routed)
        train(routed, mixture[:2], FAST, balance=0.1)
        now = weights_of(routed)
        assert any((now[name] - value).abs().max() > 1e-3 for name, value in before.items())


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("with_experts", [False, True])
def test_an_interrupted_training_ends_as_if_nothing_had_happened(
    base, experts, mixture, tmp_path, with_experts
):
    path = tmp_path / "checkpoint.safetensors"
    options = {"validation": mixture[8:9], "experts": with_experts, "balance": 0.1}
    config = replace(FAST, evaluate_every=2)

    def made():
        return RoutedModel.from_experts(experts, "softmax", 1, base_model=base)

    def stop(_what, done, _total):
        if done == 4:
            raise StoppedError

    with made() as routed:
        train(routed, mixture[:6], config, **options)
        whole = weights_of(routed), experts_of(routed)
    resuming = {**options, "checkpoint": path, "checkpoint_seconds": -1.0}
    with made() as routed, pytest.raises(StoppedError):
        train(routed, mixture[:6], config, progress=stop, **resuming)
    with made() as routed:
        report = train(routed, mixture[:6], config, **resuming)
        assert report.resumed_from == 3
        assert_same(weights_of(routed), whole[0])
        assert_same(experts_of(routed), whole[1])


def experts_of(routed) -> dict[str, torch.Tensor]:
    return {
        f"{expert.name} {name}": value
        for expert in map(routed.expert, routed.experts)
        for name, value in expert.expert_weights.items()
    }


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_experts_and_router_learn_together(base, make_expert, mixture, kernel):
    fresh = []
    for name in ("anna", "bert"):
        expert = make_expert(name, targets=("down_proj", "v_proj"))
        weights = {
            key: torch.zeros_like(value) if "lora_B" in key else value
            for key, value in expert.expert_weights.items()
        }
        fresh.append(Expert(expert.expert_info, weights))
    made = RoutedModel.from_experts(fresh, "softmax", 1, base_model=base)
    with kernels.using(kernel), made as routed:
        before = mean_loss(routed, mixture[:1])
        train(routed, mixture, FAST, experts=True, balance=0.1)
        learned, after = experts_of(routed), mean_loss(routed, mixture[:1])
    assert after < 0.7 * before
    assert all(value.any() for value in learned.values())
    assert not any(v.any() for e in fresh for n, v in e.expert_weights.items() if "lora_B" in n)


def test_trained_experts_are_saved_with_their_router(base, experts, mixture, tmp_path):
    ids = mixture[0]["input_ids"]
    with RoutedModel.from_experts(experts, "softmax", 1, base_model=base) as routed:
        train(routed, mixture[:3], FAST, experts=True)
        routed.save_pretrained(tmp_path / "kept")
        with torch.no_grad():
            expected = routed(ids).logits
    again = RoutedModel.from_pretrained(tmp_path / "kept", base_model=base)
    with again as routed, torch.no_grad():
        torch.testing.assert_close(routed(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_gradients_of_a_learnable_bank_are_right(kernel):
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    bank = Bank.from_factors([(drawn(r, 4), drawn(3, r), 0.5 + r) for r in (2, 0, 1)]).learnable()
    x, weights = drawn(5, 4), drawn(5, 2)
    chosen = torch.tensor([[0, 2], [2, -1], [0, 1], [1, 2], [2, 0]])
    slab = bank.slabs[0]

    def grouped(a, b, weights):
        return bank.apply_grouped(x, Chosen(chosen, weights))

    with kernels.using(kernel):
        with torch.no_grad():
            bank.apply_grouped(
                x, Chosen(chosen, weights)
            )  # and what it keeps lets gradients through
        assert torch.autograd.gradcheck(grouped, (slab.a, slab.b, weights.requires_grad_()))


@pytest.fixture(scope="module")
def hardly_labelled(mixture):
    """With one label each, so that little but the losses over the gates is learned from."""
    few = [batch | {"labels": torch.full_like(batch["labels"], -100)} for batch in mixture]
    for batch in few:
        batch["labels"][0, 1] = 5
    return few


def test_balance_evens_out_a_collapsed_router(base, experts, hardly_labelled):
    config = replace(FAST, learning_rate=1e-2)
    with RoutedModel.from_experts(experts, "softmax", 1, base_model=base) as routed:
        train(routed, hardly_labelled, config, balance=-20.0)  # away from what it is for
        assert max(abs(share - 0.5) for share in shares_of(routed)) > 0.4
        train(routed, hardly_labelled, config, balance=20.0)
        assert all(0.3 < share < 0.7 for share in shares_of(routed))


def test_information_evens_out_a_collapsed_router_and_makes_it_decide(
    base, experts, hardly_labelled
):
    config = replace(FAST, learning_rate=1e-2)
    with RoutedModel.from_experts(experts, "mlp", base_model=base) as routed:
        for bias in routed.router.second_bias.values():
            bias.data[0] = 4.0
        assert all(share > 0.8 for share in shares_of(routed))
        train(routed, hardly_labelled, config, information=20.0)
        assert all(0.3 < share < 0.7 for share in shares_of(routed))
        with routed.trace() as trace, torch.no_grad():
            routed(ids_of(0, 4))
        weights = torch.tensor(trace.table()["weight"])
        assert torch.maximum(weights, 1 - weights).mean() > 0.9


@pytest.mark.parametrize("name", ["mlp", "poly"])
def test_information_about_tasks_gives_each_task_experts_of_its_own(
    base, experts, hardly_labelled, name
):
    config = replace(FAST, learning_rate=1e-2 if name == "mlp" else 0.3)
    with RoutedModel.from_experts(experts, name, base_model=base) as routed:
        train(routed, hardly_labelled, config, task_information=20.0)
        found = []
        for kind, task in enumerate(("anna", "bert")):
            with routed.trace() as trace, torch.no_grad():
                routed(ids_of(kind, 4), task_names=task)
            found.append([shares.get("anna", 0.0) for shares in trace.shares().values()])
    assert all(abs(one - other) > 0.7 for one, other in zip(*found, strict=True))


def shares_of(routed) -> list[float]:
    """The first expert's share of the tokens of both kinds, in each layer."""
    ids = torch.cat([ids_of(0, 4), ids_of(1, 4)])
    with routed.trace() as trace, torch.no_grad():
        routed(ids)
    return [shares.get("anna", 0.0) for shares in trace.shares().values()]


def test_the_losses_are_what_they_are_said_to_be():
    even, certain = torch.full((6, 3), 1 / 3), torch.eye(3).repeat(2, 1)
    one = torch.tensor([[1.0, 0.0, 0.0]]).repeat(6, 1)
    assert load_balance(even, certain).item() == pytest.approx(1.0)
    assert load_balance(certain, certain).item() == pytest.approx(1.0)
    skewed = torch.tensor([[0.7, 0.2, 0.1]]).repeat(4, 1)
    top = Chosen(torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1))
    assert load_balance(skewed, top).item() == pytest.approx(3 * (0.75 * 0.7 + 0.25 * 0.2))
    assert mutual_information(even).item() == pytest.approx(0.0, abs=1e-6)
    assert mutual_information(one).item() == pytest.approx(0.0, abs=1e-6)
    assert mutual_information(certain).item() == pytest.approx(torch.tensor(3.0).log().item())


def test_information_about_tasks_is_what_it_is_said_to_be():
    tasks = torch.tensor([0, 0, 1, 1, 2, 2])
    own = torch.eye(3).repeat_interleave(2, dim=0)
    assert task_information(own, tasks).item() == pytest.approx(torch.tensor(3.0).log().item())
    # Tokens of one task may share two experts as they like, if no other task has those.
    pair = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    halves = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1], [0, 0, 1]])
    known = [task_information(shares, tasks[:4]).item() for shares in (pair, halves)]
    assert known == pytest.approx([torch.tensor(2.0).log().item()] * 2)
    alike = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).repeat(3, 1)
    assert task_information(alike, tasks).item() == pytest.approx(0.0, abs=1e-6)
    weights = torch.rand(6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: task_information(w.softmax(1), tasks), (weights,))


def test_padding_takes_no_part_in_the_losses(base, experts, mixture):
    batch = {k: v for k, v in mixture[0].items() if k != "task_names"}
    padded = {
        key: torch.nn.functional.pad(value, (0, 5), value={"labels": -100}.get(key, 0))
        for key, value in batch.items()
    }
    found = []
    for data in (batch, padded):
        with RoutedModel.from_experts(experts, "softmax", 1, base_model=base) as routed:
            report = train(routed, [data], FAST, balance=1.0, information=0.5)
            found.append((report.train_loss, weights_of(routed)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)


@pytest.mark.parametrize("with_experts", [False, True])
def test_activation_checkpointing_changes_nothing(base, experts, mixture, with_experts):
    found = []
    for checkpointing in (False, True):
        with RoutedModel.from_experts(experts, "softmax", 1, base_model=base) as routed:
            if checkpointing:
                routed.activation_checkpointing_enable()
            try:
                train(routed, mixture[:3], FAST, experts=with_experts, balance=0.3)
            finally:
                base.activation_checkpointing_disable()
                base.disable_input_require_grads()  # which the former leaves on
            found.append(weights_of(routed) | experts_of(routed))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-5)


def test_micro_batches_and_blocks(base, experts, mixture):
    found = []
    for micro in (None, 4):
        with RoutedModel.from_experts(
            experts, "softmax", 2, base_model=base, granularity="block"
        ) as routed:
            train(routed, mixture[:2], replace(FAST, micro_batch_size=micro))
            found.append(weights_of(routed))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-2, atol=1e-4)


def test_what_cannot_be_trained_is_said(base, experts, mixture):
    def refused(router, said, of=experts, data=mixture, **options):
        with (
            RoutedModel.from_experts(of, router, base_model=base) as routed,
            pytest.raises(ValueError, match=said),
        ):
            train(routed, data, **options)

    refused("arrow", "Arrow has no parameters, so there is nothing to train")
    refused("softmax", "no batches", data=[])
    refused(_ByRow(), "decides by the prompt", balance=0.1)
    nameless = [{k: v for k, v in batch.items() if k != "task_names"} for batch in mixture[:1]]
    refused("softmax", "names none; give task_names", data=nameless, task_information=0.1)


class _ByRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def decide(self, prompt):
        return self.bias.softmax(0).expand(len(prompt.input_ids), -1)


@pytest.mark.parametrize(("name", "combine"), [("poly", "after"), ("mhr", "before")])
def test_routers_by_task_learn_with_the_losses_over_gates(base, experts, mixture, name, combine):
    with RoutedModel.from_experts(experts, name, 2, combine, base_model=base) as routed:
        before = weights_of(routed)
        train(routed, mixture[:2], FAST, information=0.1)
        after = weights_of(routed)
    assert not any(torch.equal(before[key], after[key]) for key in before)


def test_a_router_of_prompts_learns_too(base, experts, mixture):
    with RoutedModel.from_experts(experts, _ByRow(), base_model=base) as routed:
        train(routed, [mixture[0]], FAST)
        assert routed.router.bias.abs().max() > 0.01
