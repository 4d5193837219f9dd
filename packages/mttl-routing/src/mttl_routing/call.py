"""One forward of a routed model: what its rows are, and what its layers share.

A context variable holds it, so that threads, nested blocks and nested models do not see each
other's. It is made where the forward enters the model and gone when that returns.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mttl_adapters.chosen import Chosen
from mttl_routing.decided import Decided
from mttl_routing.roster import Roster
from mttl_routing.routers import Rows, Tasks

if TYPE_CHECKING:
    from mttl_routing.trace import Trace

Gates = Tensor | Chosen


@dataclass(eq=False)
class Generation:
    """One run of ``generate``: its prompt, and what was decided for the prompt's rows.

    Attributes:
        ids: (b, s) of the prompt; None where it did not come as ids.
        mask: (b, s) of the prompt, where it was given.
        decided: once it was; for the steps of a generation without a cache, too.
    """

    ids: Tensor | None = None
    mask: Tensor | None = None
    decided: Decided | None = None


@dataclass(frozen=True, eq=False)
class Scope:
    """What holds for the forwards inside a block, in one thread.

    Attributes:
        tasks: of the rows, as the caller named them.
        without: experts that are switched off.
        bare: whether the base computes alone.
        generation: the run of ``generate`` that the forwards belong to.
        trace: what is told of every gate.
        watch: what is told of every decision of a router for tokens, while it learns.
    """

    tasks: Tasks = None
    without: frozenset[str] = frozenset()
    bare: bool = False
    generation: Generation | None = None
    trace: Trace | None = None
    watch: Callable[..., None] | None = None


@dataclass(eq=False)
class Call:
    """One forward, from the module where it entered to that module's return.

    Attributes:
        entry: the module that was called.
        roster: the experts as they were when it was.
        together: layers that were seen to read one input, by the path of the first; kept by the
            routed model, and added to here.
        decided: for the rows of this batch.
        shape: (rows, tokens of each) as the model was given them; None where that is not known.
        mask: (rows, tokens), False where a token is padding; None where there is none.
        start: tokens of each row that the cache holds already.
        states: the encoder's output that a decoder reads.
        trace: what is told of every gate.
        watch: what is told of every decision, as in :class:`Scope`.
        outer: the forward of the same model that this one is inside of.
        gates: those that several layers share, by the group of layers.
    """

    entry: nn.Module | None
    roster: Roster
    together: dict[str, tuple[str, ...]]
    decided: Decided | None = None
    shape: tuple[int, int] | None = None
    mask: Tensor | None = None
    start: int = 0
    states: Tensor | None = None
    trace: Trace | None = None
    watch: Callable[..., None] | None = None
    outer: Call | None = None
    gates: dict[Hashable, Gates] = field(default_factory=dict, init=False)
    _input: Tensor | None = field(default=None, init=False)
    _version: int = field(default=0, init=False)
    _readers: list[str] = field(default_factory=list, init=False)
    _made: dict[Hashable, Any] = field(default_factory=dict, init=False)
    _spread: dict[int, Gates] = field(default_factory=dict, init=False)
    _lines: Chosen | None = field(default=None, init=False)

    def rows(self, path: str, x: Tensor) -> Rows:
        """The rows of a layer's input (b, ..., i), or (t, i) without a batch axis.

        Layers that read one tensor after each other get one place for what they share.
        """
        version = 0 if x.is_inference() else x._version
        if x is not self._input or version != self._version:
            self._input, self._version = x, version
            self._readers, self._made = [], {}
        self._readers.append(path)
        first = self._readers[0]
        known = self.together.get(first, (first,))
        if path not in known:
            known = (*known, path)
            self.together[first] = known
        layers = self.roster.together(known, x.device)
        count, tokens = self._count(x)
        decided = self.decided
        if decided is None:
            return Rows(count, tokens, None, None, layers, self._made)
        gates = decided.gates
        if gates is not None and gates.device != x.device:
            gates = gates.to(x.device)
        return Rows(count, tokens, decided.tasks, gates, layers, self._made)

    def spread(self, rows: Rows) -> Gates:
        """What was decided for the rows, as gates of their tokens: the same in every layer."""
        if rows.decision is None:
            raise ValueError(
                "this router decides by the prompt, so it needs a call of the whole model: call "
                "the routed model, not a part of it"
            )
        if rows.count is None or rows.count != rows.decision.shape[0]:
            rows.spread(rows.decision)  # its error says what is wrong
        if self._lines is None or self._lines.experts.device != rows.decision.device:
            self._lines = Chosen.from_dense(rows.decision)
        if rows.tokens not in self._spread:
            self._spread[rows.tokens] = Chosen(
                self._lines.experts, self._lines.weights, rows.tokens
            )
        return self._spread[rows.tokens]

    def forget(self) -> None:
        """Let go of what the layers shared."""
        self._input, self._made, self._readers = None, {}, []
        self._spread, self.gates = {}, {}

    def _count(self, x: Tensor) -> tuple[int | None, int]:
        """Rows, and tokens of each; None, and all tokens, where there is no telling."""
        lines = x.shape[:-1].numel()
        if x.dim() > 2:
            count = x.shape[0]
            return count, lines // max(1, count)
        if self.shape is not None and lines in (self.shape[0], self.shape[0] * self.shape[1]):
            return self.shape[0], lines // max(1, self.shape[0])
        return None, lines


# By id of the routed model.
_SCOPES: ContextVar[Mapping[int, Scope]] = ContextVar("scopes", default=MappingProxyType({}))
_CALLS: ContextVar[Mapping[int, Call]] = ContextVar("calls", default=MappingProxyType({}))
_NO_SCOPE = Scope()


def scope_of(model: object) -> Scope:
    """The innermost scope of a routed model in this thread."""
    return _SCOPES.get().get(id(model), _NO_SCOPE)


@contextmanager
def scoped(model: object, scope: Scope) -> Iterator[Scope]:
    """Another scope for the forwards inside the block, in this thread."""
    token = _SCOPES.set({**_SCOPES.get(), id(model): scope})
    try:
        yield scope
    finally:
        _SCOPES.reset(token)


def call_of(model: object) -> Call | None:
    """The forward under way in this thread."""
    return _CALLS.get().get(id(model))


def set_call(model: object, call: Call | None) -> None:
    """Make one the forward under way; None when it is over."""
    calls = {key: value for key, value in _CALLS.get().items() if key != id(model)}
    if call is not None:
        calls[id(model)] = call
    _CALLS.set(calls)


@contextmanager
def resumed(model: object, call: Call | None) -> Iterator[None]:
    """A forward that is over taken up once more, as gradient checkpointing does."""
    before = call_of(model)
    set_call(model, call)
    try:
        yield
    finally:
        if call is not None:
            call.forget()
        set_call(model, before)
