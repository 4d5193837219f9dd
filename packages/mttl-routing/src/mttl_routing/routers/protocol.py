"""What a router is: from the tokens at one layer, or the rows of a prompt, to gates of experts.

Any object with a ``gates`` or a ``decide`` method is one; the names in ``ROUTERS`` build those of
this package. A router with parameters is an ``nn.Module``, and gradients reach them by its gates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from torch import Tensor

from mttl_adapters.bank import Bank
from mttl_adapters.chosen import Chosen
from mttl_experts import Expert

Made = TypeVar("Made")
Tasks = str | tuple[str | None, ...] | None
Observe = Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Layer:
    """One adapted layer of a routed model, as a router sees it.

    A layer never changes. After experts were added, removed, replaced, enabled or disabled there is
    another ``Layer`` in its place, so what :meth:`once` keeps is never out of date.

    Attributes:
        module: its path in the base model.
        experts: names of all experts of the routed model, in the order of the gates' columns, which
            is the same in every layer.
        bank: their factors here (``bank.factors()``); an expert that leaves this layer alone has
            rank 0 in it.
        disabled: columns of the experts that are switched off; gates given to them count as 0.
    """

    module: str
    experts: tuple[str, ...]
    bank: Bank
    disabled: frozenset[int] = frozenset()
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @cached_property
    def enabled(self) -> tuple[int, ...]:
        """Columns of the experts that may be chosen, whether they change this layer or not."""
        if not self.disabled:
            return tuple(range(len(self.experts)))
        return tuple(index for index in range(len(self.experts)) if index not in self.disabled)

    @cached_property
    def present(self) -> tuple[int, ...]:
        """Columns of the experts that may be chosen and change this layer."""
        if min(self.bank.ranks, default=0) > 0:
            return self.enabled
        return tuple(index for index in self.enabled if self.bank.ranks[index] > 0)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made when first asked for, and kept as long as the layer stays so.

        Args:
            key: of this router and this use, such as ``(self, "prototypes", x.device)``.
            make: gives the value; two threads may both call it, and both then get one result.
        """
        if key not in self._kept:
            self._kept.setdefault(key, make())
        return cast("Made", self._kept[key])

    def forget(self, key: Hashable) -> None:
        """Drop what :meth:`once` keeps under a key, if there is something."""
        self._kept.pop(key, None)


@dataclass(frozen=True, eq=False)
class Rows:
    """Where the tokens of one call come from: ``tokens`` follow one another in each row.

    Attributes:
        count: rows of the batch; None where the layer's input has no batch axis.
        tokens: tokens of each row; of the whole input where there is no batch axis.
        tasks: one task name for all rows, or one a row, where None is no task; None when the caller
            named no tasks.
        decision: (b, e), what the router's own ``decide`` gave for each row at prefill; None for a
            router without it.
        layers: those that are given this very input in each forward, as far as forwards so far have
            shown, in the order of their calls. The layer asked for is one of them.
    """

    count: int | None
    tokens: int
    tasks: Tasks = None
    decision: Tensor | None = None
    layers: tuple[Layer, ...] = ()
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def spread(self, per_row: Tensor) -> Tensor:
        """(b, e), one line a row, as (t, e), one line a token."""
        if self.count is None or per_row.shape[0] != self.count:
            rows = "no batch axis" if self.count is None else f"{self.count} rows"
            raise ValueError(
                f"decisions for {per_row.shape[0]} rows cannot be given to the tokens of a layer "
                f"whose input has {rows}"
            )
        return per_row.repeat_interleave(self.tokens, dim=0)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` gives, made once for all layers that get this very input in this forward.

        So that q, k and v, which read one tensor, need one product with all their prototypes
        (``layers`` says whose). It is gone with the input.
        """
        if key not in self._made:
            self._made[key] = make()
        return cast("Made", self._made[key])


@dataclass(frozen=True, eq=False)
class Prompt:
    """The rows of a call as they come in at prefill; what a decision for a whole row may rest on.

    Of an encoder-decoder model, what the encoder is given.

    Attributes:
        input_ids: (b, s).
        attention_mask: (b, s), 1 where a token counts.
        tasks: one task name for all rows, or one a row; None when the caller named no tasks.
        experts: names of all experts of the routed model, in the order of the gates' columns.
        disabled: columns of the experts that are switched off; gates given to them count as 0.
        tokenizer: of the base model, for :meth:`texts`; None where the model was given none.
        observe: gives :meth:`activations`; None where there is no model to run.
    """

    input_ids: Tensor
    attention_mask: Tensor
    tasks: Tasks = None
    experts: tuple[str, ...] = ()
    disabled: frozenset[int] = frozenset()
    tokenizer: Any = field(default=None, repr=False)
    observe: Observe | None = field(default=None, repr=False)
    _seen: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def enabled(self) -> tuple[int, ...]:
        """Columns of the experts that may be chosen."""
        return tuple(index for index in range(len(self.experts)) if index not in self.disabled)

    def texts(self) -> list[str]:
        """Text of each row, without padding and special tokens.

        Raises:
            ValueError: when the routed model was given no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                "routing by the prompt's text needs a tokenizer, and this routed model has none: "
                "give tokenizer=..., or a base_model from load_base_model, which brings its own"
            )
        kept = [
            ids[mask.bool()].tolist()
            for ids, mask in zip(self.input_ids, self.attention_mask, strict=True)
        ]
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in kept]

    def activations(self, modules: Sequence[str]) -> dict[str, Tensor]:
        """Inputs of these modules as the base alone sees the prompt, by module path.

        One forward of the base for all that were not asked for before.

        Returns:
            (b, s, i) each, without gradient, padding included.
        """
        absent = [module for module in modules if module not in self._seen]
        if absent:
            if self.observe is None:
                raise ValueError("this prompt comes without a model, so it has no activations")
            self._seen.update(self.observe(absent))
        return {module: self._seen[module] for module in modules}


@runtime_checkable
class Router(Protocol):
    """Decides for each token what share of each expert it gets."""

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor | Chosen:
        """Gates of the tokens at one layer; the layer adds Σ_e g_e s_e B_e A_e x to its output.

        Called at every forward pass, with and without a KV cache, for every adapted layer; so a
        decision may rest on a token's ``x`` and on its row, never on how many tokens came along.

        Args:
            x: (t, i), the layer's input in the model's dtype, padding included, row after row.
            layer: which layer this is, and its experts.
            rows: which row each token is in, and the rows' tasks.

        Returns:
            (t, e) float32 on the device of ``x``, one column for each of ``layer.experts``; an
            expert with gate 0 is not computed where that saves time. Or a ``Chosen``, which names
            the few that are not 0 and spares the (t, e) numbers. With ``combine="before"`` also
            (t, q, e), apart for q slices of the experts' A and B (``Bank.apply_before``).
        """
        ...


@runtime_checkable
class SequenceRouter(Protocol):
    """Decides once for each row, from its prompt, what share of each expert its tokens get."""

    def decide(self, prompt: Prompt) -> Tensor:
        """Gates of the rows, for all their tokens in all layers.

        Called at prefill. The decision then travels with its row in the cache: through beams,
        several returned sequences and every later token. A forward without a cache decides anew
        from what it is given. A router that has ``gates`` as well is asked for those at each
        layer, and finds this decision in ``rows.decision``.

        Returns:
            (b, e) float32, one column for each of ``prompt.experts``.
        """
        ...


@runtime_checkable
class FollowsExperts(Protocol):
    """A router that keeps something for each expert, and is told when they change at run time.

    One without this method is not told: it finds the experts in the layers and prompts it is given.
    """

    def follow(self, added: Sequence[Expert], removed: Sequence[str]) -> None:
        """Take up some experts and forget others; a name in both is an expert that was replaced."""
        ...


AnyRouter = Router | SequenceRouter
