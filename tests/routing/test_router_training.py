"""Training of routers, and of routers with their experts."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from mttl_adapters import Bank, Chosen, TrainingConfig, kernels, mean_loss
from mttl_experts import Expert
from mttl_routing import RoutedModel, apply_expert, load_balance, mutual_information, train

FAST = TrainingConfig(learning_rate=3e-2, scheduler="constant", warmup_proportion=0.0)
WIDE = slice(2, 31), slice(31, 61)  # token ids of two kinds


@pytest.fixture
def experts(make_expert):
    return [make_expert(name, size=0.4) for name in ("anna", "bert")]


def ids_of(kind: int, rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 10 * kind)
    span = WIDE[kind]
    return torch.randint(span.start, span.stop, (rows, 8), generator=generator)


def planted(base, experts, n: int, seed: int = 0):
    """Batches whose labels are what one of two experts says, by the kind of a row's tokens."""
    batches = []
    for step in range(n):
        ids, labels = [], []
        for kind, expert in enumerate(experts):
            own = ids_of(kind, 4, seed + 100 * step)
            with torch.no_grad(), apply_expert(base, expert) as routed:
                said = routed(own).logits.argmax(-1)
            ids.append(own)
            labels.append(torch.cat([torch.full((4, 1), -100), said[:, :-1]], dim=1))
        batches.append(
            {
                "input_ids": torch.cat(ids),
                "attention_mask": torch.ones(8, 8, dtype=torch.long),
                "labels": torch.cat(labels),
                "task_names": ("anna",) * 4 + ("bert",) * 4,
            }
        )
    return batches


@pytest.fixture(scope="module")
def mixture(base, make_expert):
    return planted(base, [make_expert(name, size=0.4) for name in ("anna", "bert")], 30)


def weights_of(routed) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in routed.router.named_parameters()}


def assert_same(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def accuracy(routed) -> float:
    """Share of the tokens' weights that goes to the expert of their kind."""
    right = []
    for kind, name in enumerate(("anna", "bert")):
        ids = ids_of(kind, 4, seed=7)
        with routed.trace() as trace, torch.no_grad():
            routed(ids, task_names=name)
        right += [shares.get(name, 0.0) for shares in trace.shares().values()]
    return sum(right) / len(right)


@pytest.mark.parametrize("name", ["softmax", "product_key", "mlp", "poly"])
def test_the_right_experts_are_found(base, experts, mixture, name):
    untouched = {key: value.clone() for key, value in base.state_dict().items()}
    with RoutedModel.from_experts(experts, name, 2, base_model=base) as routed:
        first = mean_loss(routed, mixture)
        report = train(routed, mixture, FAST)
        assert report.train_loss < 0.5 * first
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
        expert = make_expert(name, seed=3 if name == "anna" else 4)
        weights = {
            key: torch.zeros_like(value) if "lora_B" in key else value
            for key, value in expert.expert_weights.items()
        }
        fresh.append(Expert(expert.expert_info, weights))
    made = RoutedModel.from_experts(fresh, "softmax", 1, base_model=base)
    with kernels.using(kernel), made as routed:
        before = mean_loss(routed, mixture[:1])
        train(routed, mixture[:20], FAST, experts=True, balance=0.1)
        learned, after = experts_of(routed), mean_loss(routed, mixture[:1])
    assert after < 0.7 * before
    assert all(value.any() for value in learned.values())
    assert all(not v.any() for e in fresh for n, v in e.expert_weights.items() if "lora_B" in n)


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


def collapsed(base, experts) -> RoutedModel:
    """A router that sends nearly all to the first expert."""
    routed = RoutedModel.from_experts(experts, "mlp", base_model=base)
    with torch.no_grad():
        for bias in routed.router.second_bias.values():
            bias[0] = 5.0
    return routed


def shares_of(routed) -> list[float]:
    ids = torch.cat([ids_of(0, 4), ids_of(1, 4)])
    with routed.trace() as trace, torch.no_grad():
        routed(ids)
    return [shares["anna"] for shares in trace.shares().values()]


@pytest.mark.parametrize("loss", ["balance", "information"])
def test_it_evens_out_a_collapsed_router(base, experts, mixture, loss):
    with collapsed(base, experts) as routed:
        assert min(shares_of(routed)) > 0.9
        train(routed, mixture[:20], replace(FAST, learning_rate=0.3), **{loss: 20.0})
        assert all(0.3 < share < 0.7 for share in shares_of(routed))


@pytest.mark.parametrize("balance", [0.0, 10.0])
def test_balance_sees_behind_the_weights_of_one_chosen_expert(base, experts, mixture, balance):
    """Those are 1 whatever the scores, so that nothing could be learned from them."""
    with RoutedModel.from_experts(experts, "softmax", 1, base_model=base, hidden=8) as routed:
        before = weights_of(routed)
        train(routed, mixture[:2], FAST, balance=balance)
        after = weights_of(routed)
    assert any(not torch.equal(old, after[name]) for name, old in before.items()) == bool(balance)


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


def test_what_cannot_be_trained_is_said(base, experts, mixture, make_expert):
    def refused(router, said, of=experts, data=mixture, **options):
        with (
            RoutedModel.from_experts(of, router, base_model=base) as routed,
            pytest.raises(ValueError, match=said),
        ):
            train(routed, data, **options)

    refused("arrow", "Arrow has no parameters, so there is nothing to train")
    refused("softmax", "no batches", data=[])
    extra = make_expert("extra")
    extra.expert_weights["base_model.model.lm_head.weight"] = torch.zeros(1)
    refused("softmax", "plain LoRA.*'extra' holds .*lm_head", of=[extra], experts=True)
    refused(_ByRow(), "decides by the prompt", balance=0.1)


class _ByRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2))

    def decide(self, prompt):
        return self.bias.softmax(0).expand(len(prompt.input_ids), -1)


def test_a_router_of_prompts_learns_too(base, experts, mixture):
    with RoutedModel.from_experts(experts, _ByRow(), base_model=base) as routed:
        train(routed, [mixture[0]], FAST)
        assert routed.router.bias.abs().max() > 0.01
