"""Training of a routed model: its router over frozen experts, or both from scratch.

The loop is that of :mod:`mttl_adapters`; here is what moves in it, and the losses over the gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mttl_adapters.chosen import Chosen
from mttl_adapters.loop import Objective, n_labelled, seeded, train_parameters
from mttl_adapters.losses import IGNORED, labelled_loss, scales_logits
from mttl_adapters.progress import Progress
from mttl_adapters.training_config import TrainingConfig, TrainingReport
from mttl_experts import Expert, lora_modules
from mttl_routing.call import Call, Gates
from mttl_routing.losses import load_balance, mutual_information, task_information
from mttl_routing.roster import Roster
from mttl_routing.routers import Layer, Rows
from mttl_routing.routers.learned import ScoringRouter

if TYPE_CHECKING:
    from mttl_routing.routed_model import RoutedModel

TASKS = "task_names"
LEARNING_RATE = 1e-3


def train(
    routed: RoutedModel,
    mixture: Sequence[Mapping[str, Any]],
    config: TrainingConfig | None = None,
    *,
    experts: bool = False,
    router_learning_rate: float | None = None,
    balance: float = 0.0,
    information: float = 0.0,
    task_information: float = 0.0,
    validation: Sequence[Mapping[str, Any]] = (),
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 10.0,
    progress: Progress | None = None,
) -> TrainingReport:
    """Train the parameters of a routed model's router in place, one optimiser step a batch.

    What moves is each parameter of ``routed.router`` (an ``nn.Module``) that wants a gradient, and
    with ``experts=True`` the factors of every expert too, in float32; never the base. Minimised is
    the mean loss of the labelled tokens, plus ``balance`` times the :func:`load_balance`, minus
    ``information`` times the :func:`mutual_information` of the gates with the tokens, and minus
    ``task_information`` times that with the rows' tasks, all over the tokens that are no padding,
    and their mean over the layers that decide. An expert that was trained is put back under its
    name, with the info it had.

    Seeded by ``config.seed``: the same arguments give the same numbers, also when interrupted and
    called again with the same ``checkpoint``. It works under activation checkpointing.

    Args:
        routed: what is trained; the experts that are switched off stay out of it.
        mixture: batches with ``input_ids``, ``attention_mask``, ``labels`` (b, s; -100 is no loss)
            and, where the router goes by them, ``task_names``, one a row.
        config: optimiser, schedule and seed; None is :class:`TrainingConfig` for the experts, and
            for the router its own learning rate: its attribute ``learning_rate`` if it has one (0.1
            in ``poly`` and ``mhr``), else 1e-3.
        experts: whether the experts are trained as well.
        router_learning_rate: peak rate of the router's parameters, where it is not the config's:
            the two-speed learning rate of Polytropon.
        balance: weight of the load-balance loss.
        information: weight of the mutual information of expert and token.
        task_information: weight of that of expert and task; batches then need ``task_names``.
        validation: batches whose mean loss, without those three, picks the weights to keep.
        checkpoint: file to save to and to go on from; the caller removes it when done.
        checkpoint_seconds: at least this long lies between two saves.
        progress: told of each step.

    Raises:
        ValueError: there is nothing to train, or nothing to train on, or no gates to balance.
        DivergedError: a loss or a weight became infinite or no number.
    """
    if config is None:
        config = TrainingConfig()
        if router_learning_rate is None:
            router_learning_rate = learning_rate_of(routed.router)
    if router_learning_rate is not None and router_learning_rate <= 0:
        raise ValueError(f"router_learning_rate is {router_learning_rate!r}; it must be above 0")
    before = routed._hooks.roster
    learning = _learnable(before) if experts else before
    of_router = _router_parameters(routed.router)
    parameters = of_router | _expert_parameters(learning, experts)
    if not parameters:
        raise ValueError(
            f"router {type(routed.router).__name__} has no parameters, so there is nothing to "
            "train; give one that has, such as 'softmax', or train experts=True"
        )
    gate_losses = _Weights(balance, information, task_information)
    if not experts and not any(gate_losses) and _is_deaf(routed.router):
        raise ValueError(
            "a router that keeps one expert a token gives it all the weight, whatever it scores, "
            "so this training would teach it nothing; take top_k=2, or a balance loss"
        )
    rates = {} if router_learning_rate is None else dict.fromkeys(of_router, router_learning_rate)
    was_training = routed.model.training
    router_was_training = getattr(routed.router, "training", False)
    objective = _objective(routed, gate_losses)
    with seeded(routed, config.seed), _frozen(routed.model):
        try:
            routed._hooks.roster = learning
            routed.train()
            report = train_parameters(
                routed, parameters, mixture, config, objective=objective, rates=rates,
                validation=validation, checkpoint=checkpoint,
                checkpoint_seconds=checkpoint_seconds, progress=progress,
            )  # fmt: skip
        finally:
            routed._hooks.roster = before
            routed.train(was_training)
            if isinstance(routed.router, nn.Module):
                routed.router.train(router_was_training)
    if experts:
        for expert in _trained(learning):
            routed.replace_expert(expert)
    return report


def learning_rate_of(router: Any) -> float:
    """The rate that a router's parameters train by, where nothing else is said."""
    return float(getattr(router, "learning_rate", LEARNING_RATE))


def _is_deaf(router: Any) -> bool:
    """Whether the loss of the tokens says nothing to a router: its one weight is always 1."""
    return isinstance(router, ScoringRouter) and router.choice.top_k == 1


class _Weights(NamedTuple):
    """Of the losses over the gates."""

    balance: float
    information: float
    task_information: float


@dataclass(eq=False)
class _Watch:
    """The terms over the gates of one forward, one for each layer that decided in it."""

    weights: _Weights
    terms: dict[str, Tensor] = field(default_factory=dict)

    def __call__(
        self, router: Any, x: Tensor, layer: Layer, rows: Rows, gates: Gates, call: Call
    ) -> None:
        """Told of a decision; told again when a checkpointed layer is computed again."""
        n_experts = len(layer.experts)
        if callable(getattr(router, "probabilities", None)):
            shares = router.probabilities(x, layer, rows)
        else:
            shares = gates.dense(n_experts) if isinstance(gates, Chosen) else gates
            if shares.dim() == 3:  # of several heads
                shares = gates = shares.mean(dim=1)
        weights, term = self.weights, shares.new_zeros(())
        tasks = _tasks(rows, shares) if weights.task_information else None
        if call.mask is not None and call.mask.numel() == len(shares):
            counting = call.mask.flatten().to(shares.device)
            shares, gates = shares[counting], _those(gates, counting)
            tasks = None if tasks is None else tasks[counting]
        if weights.balance:
            term = term + weights.balance * load_balance(shares, gates)
        if weights.information:
            term = term - weights.information * mutual_information(shares)
        if tasks is not None:
            term = term - weights.task_information * task_information(shares, tasks)
        self.terms[layer.module] = term

    def mean(self) -> Tensor:
        if not self.terms:
            raise ValueError(
                "balance and information are losses over the gates of tokens, and this router "
                "decides by the prompt; leave them 0"
            )
        terms = list(self.terms.values())
        return torch.stack([term.to(terms[0].device) for term in terms]).mean()


def _tasks(rows: Rows, shares: Tensor) -> Tensor:
    """(t,) the task of each token, counted as they are met."""
    if rows.tasks is None:
        raise ValueError(
            "task_information is about the rows' tasks, and this batch names none; give task_names"
        )
    names = (rows.tasks,) if isinstance(rows.tasks, str) else rows.tasks
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_rows = torch.tensor([numbers[name] for name in names], device=shares.device)
    return of_rows.repeat_interleave(len(shares) // len(names))


def _those(gates: Gates, counting: Tensor) -> Gates:
    if isinstance(gates, Tensor):
        return gates[counting]
    each = gates.each()
    return Chosen(each.experts[counting], each.weights[counting])


def _objective(routed: RoutedModel, weights: _Weights) -> Objective:
    """The loss of the labelled tokens, and while learning the terms over the gates beside it."""
    watched = any(weights)
    whole = _whole(routed)
    count = _n_labels if routed.config.is_encoder_decoder else n_labelled

    def loss(model: Any, part: dict[str, Any]) -> tuple[Tensor, int]:
        rows = dict(part)
        tasks = rows.pop(TASKS, None)
        watch = _Watch(weights) if watched and torch.is_grad_enabled() else None
        with routed._scoped(watch=watch), nullcontext() if tasks is None else routed.tasks(tasks):
            if whole or "attention_mask" not in rows:
                n = count(rows)
                total = model(**rows, use_cache=False).loss * n
            else:
                total, n = labelled_loss(model, rows)
        return (total if watch is None else total + n * watch.mean()), n

    return Objective(loss, count)


def _whole(routed: RoutedModel) -> bool:
    """Whether the loss takes the model's own forward, not the head at labelled tokens alone."""
    head = routed.model.get_output_embeddings()
    adapted = any(routed.model.get_submodule(path) is head for path in routed._hooks.roster.banks)
    scaled = scales_logits(routed.config) is not None
    return adapted or bool(routed.config.is_encoder_decoder) or scaled


def _n_labels(batch: Mapping[str, Any]) -> int:
    """Of an encoder-decoder model, whose labels are all that its decoder is to say."""
    return int((batch["labels"] != IGNORED).sum())


def _router_parameters(router: Any) -> dict[str, Tensor]:
    if not isinstance(router, nn.Module):
        return {}
    return {f"router.{n}": p for n, p in router.named_parameters() if p.requires_grad}


def _learnable(roster: Roster) -> Roster:
    """The same experts with factors that learn."""
    return Roster(
        roster.experts,
        {path: bank.learnable() for path, bank in roster.banks.items()},
        roster.disabled,
    )


def _expert_parameters(roster: Roster, wanted: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, bank in roster.banks.items() if wanted else ():
        found[f"experts.{path}.a"], found[f"experts.{path}.b"] = bank.slabs[0].a, bank.slabs[0].b
    return found


def _trained(roster: Roster) -> Iterator[Expert]:
    """The experts with the factors that their banks now have."""
    for column, expert in enumerate(roster.experts):
        weights = {}
        for path in lora_modules(expert):
            a, b, _ = next(islice(roster.banks[path].factors(), column, None))
            for part, factor in (("A", a), ("B", b)):
                weights[f"base_model.model.{path}.lora_{part}.weight"] = (
                    factor.detach().to("cpu", copy=True).contiguous()
                )
        yield Expert(expert.expert_info, weights)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients into the base meanwhile."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
