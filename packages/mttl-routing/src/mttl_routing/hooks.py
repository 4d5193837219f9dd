"""The hooks by which a base model consults its experts, and what one forward goes through.

Entry hooks sit on the model, its backbone and its encoder: they open and close a :class:`Call`;
what holds for its rows is the business of ``deciding.py``. Layer hooks add what the chosen experts
make of a layer's input to its output, and touch nothing else: so the base may be quantised.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mttl_adapters.chosen import NONE, Chosen
from mttl_routing.blocks import GRANULARITIES, group_of
from mttl_routing.call import Call, Gates, call_of, scope_of, set_call
from mttl_routing.decided import Decided, cache_among, put_in_cache, put_on_states
from mttl_routing.deciding import Decisions, first, token_mask
from mttl_routing.roster import Roster
from mttl_routing.routers import Layer


class _Hook:
    """A method of :class:`Hooks` on a module. A copy of the module has nothing in its place."""

    def __init__(self, method: Callable[..., Any], *args: Any) -> None:
        self._call = partial(method, *args)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as one that does nothing: the copy is the base alone."""
        return _Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    return None


class Hooks:
    """A base model with its hooks, and all that they look at.

    Attributes:
        model: the base.
        router: what chooses.
        roster: the experts as the next forward will see them.
        combine: ``after`` or ``before``.
        granularity: which layers share a decision.
    """

    def __init__(
        self,
        model: Any,
        router: Any,
        roster: Roster,
        *,
        combine: str,
        granularity: str,
        tokenizer: Any,
    ) -> None:
        """Check the choices; nothing is attached yet."""
        if combine not in ("after", "before"):
            raise ValueError(f"combine is {combine!r}; it takes 'after' or 'before'")
        if getattr(router, "combine", combine) != combine:
            raise ValueError(
                f"router {type(router).__name__} is defined for combine={router.combine!r} alone, "
                f"not for {combine!r}"
            )
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity is {granularity!r}; it takes {', '.join(map(repr, GRANULARITIES))}"
            )
        self._by_token = callable(getattr(router, "gates", None))
        if not (self._by_token or callable(getattr(router, "decide", None))):
            raise TypeError(
                f"{router!r} is no router: it has no method gates(x, layer, rows) or decide(prompt)"
            )
        self.model = model
        self.router = router
        self.roster = roster
        self.combine = combine
        self.granularity = granularity
        self._decisions = Decisions(self, model, router, tokenizer)
        self._together: dict[str, tuple[str, ...]] = {}
        self._groups: dict[str, Hashable] = {}
        self._handles: list[Any] = []
        self._entries: dict[nn.Module, tuple[str, ...]] = {}
        self._encoder: nn.Module | None = None

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def attach(self, points: Mapping[str, nn.Module]) -> None:
        """Put the hooks on the model, and on its layers by path."""
        entries = [self.model, getattr(self.model, "base_model", self.model)]
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            self._encoder = self.model.get_encoder()
            entries.append(self._encoder)
            self._handles.append(
                self.model.get_decoder().register_forward_pre_hook(
                    _Hook(self._read), with_kwargs=True
                )
            )
        for module in dict.fromkeys(entries):
            self._entries[module] = tuple(inspect.signature(module.forward).parameters)
            self._handles += [
                module.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True),
                module.register_forward_hook(
                    _Hook(self._leave), with_kwargs=True, always_call=True
                ),
            ]
        self.attach_layers(points)

    def attach_layers(self, points: Mapping[str, nn.Module]) -> None:
        """Put hooks on more layers; once on each."""
        for path, module in points.items():
            if path not in self._groups:
                self._groups[path] = group_of(path, self.model, self.granularity)
                hook = _Hook(self._add, path)
                self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Take all hooks off; once is enough."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # What a forward goes through.

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        scope, outer = scope_of(self), call_of(self)
        if scope.bare or (outer is not None and module is not self.model):
            return
        inputs = {**dict(zip(self._entries[module], args, strict=False)), **kwargs}
        roster = self.roster.without(scope.without)
        call = Call(
            module, roster, self._together, trace=scope.trace, watch=scope.watch, outer=outer
        )
        ids = first(inputs.get("input_ids"), inputs.get("inputs_embeds"))
        if ids is not None and self._encoder is None:
            call.shape = (ids.shape[0], ids.shape[1])
        if scope.trace is not None or scope.watch is not None:
            kept = cache_among(inputs)
            call.start = 0 if kept is None else int(kept.get_seq_length())
            if ids is not None:
                call.mask = token_mask(inputs.get("attention_mask"), ids).bool()
        call.decided = self._decisions.of(scope, roster, inputs)
        set_call(self, call)

    def _leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        call = call_of(self)
        if call is None or call.entry is not module or scope_of(self).bare:
            return
        call.forget()
        set_call(self, call.outer)
        if output is None or call.decided is None:  # None after an error
            return
        kept = cache_among(output)
        if kept is not None:
            put_in_cache(kept, call.decided)
        if module is self._encoder:
            put_on_states(output[0], call.decided)

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = call_of(self)
        if call is not None:
            call.states = kwargs.get("encoder_hidden_states")

    def _add(
        self,
        path: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        """A layer's output with what its experts add, rounded once to the output's dtype."""
        scope = scope_of(self)
        if scope.bare:
            return None
        call = call_of(self)
        if call is None:  # a layer, or a part of the model, that was called by itself
            roster = self.roster.without(scope.without)
            tasks = None if scope.tasks is None else Decided((), tasks=scope.tasks)
            call = Call(None, roster, {}, decided=tasks, trace=scope.trace)
        if path not in call.roster.banks:
            return None
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        layer = call.roster.layer(path, x.device)
        if not layer.present:  # all that change it are switched off
            return None
        flat = x.reshape(-1, x.shape[-1])  # (t, i)
        gates = self._gates(call, layer, x, flat)
        bank = layer.bank
        if self.combine == "before":
            update = bank.apply_before(flat, gates)
            return (output + update.view(output.shape)).to(output.dtype)
        added = bank.add_to(output.reshape(-1, output.shape[-1]), flat, gates)
        return added.view(output.shape)

    def _gates(self, call: Call, layer: Layer, x: Tensor, flat: Tensor) -> Gates:
        rows = call.rows(layer.module, x)
        if not self._by_token:
            gates = call.spread(rows)
        else:
            group = self._groups[layer.module]
            # What reads the encoder's output in a decoder has other tokens than its neighbours.
            shared = None if group is None else (group, x is call.states, x.shape[:-1])
            found = None if shared is None else call.gates.get(shared)
            gates = self.router.gates(flat, layer, rows) if found is None else _on(found, x.device)
            if found is None and call.watch is not None:
                call.watch(self.router, flat, layer, rows, gates, call)
            if shared is not None and found is None:
                call.gates[shared] = gates
        if layer.disabled:
            gates = _without(gates, layer)
        if call.trace is not None:
            call.trace.record(call, layer, rows, gates)
        return gates


def _on(gates: Gates, device: torch.device) -> Gates:
    if isinstance(gates, Tensor):
        return gates.to(device)
    if gates.experts.device == device:
        return gates
    return Chosen(gates.experts.to(device), gates.weights.to(device), gates.tokens)


def _without(gates: Gates, layer: Layer) -> Gates:
    """The gates with those of switched-off experts 0."""
    device = gates.device if isinstance(gates, Tensor) else gates.experts.device

    def switched_on() -> Tensor:
        on = torch.ones(len(layer.experts) + 1, dtype=torch.bool, device=device)
        on[sorted(layer.disabled)] = False
        return on  # the last is for NONE

    on = layer.once(("switched on", device), switched_on)
    if isinstance(gates, Tensor):
        return gates * on[:-1]
    return Chosen(gates.experts.where(on[gates.experts], NONE), gates.weights, gates.tokens)
