"""Experts on a base model, which may come, go, and be switched off while it is in use.

The hooks on the base are in ``hooks.py``, the experts at one moment in ``roster.py``. How all of it
is built, used and saved as one model is in ``routed_model.py``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from mttl_adapters.bank import Bank
from mttl_experts import Expert
from mttl_routing.attachment import Base, attachment_points, check_one_path
from mttl_routing.call import Scope, scope_of, scoped
from mttl_routing.cohort import check_one_base
from mttl_routing.hooks import Hooks
from mttl_routing.roster import Roster
from mttl_routing.routers import AnyRouter, FollowsExperts, Tasks
from mttl_routing.sources import Source

if TYPE_CHECKING:
    from mttl_routing.trace import Trace

TaskNames = str | Sequence[str | None]

_ROUTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class AttachedExperts:
    """A base model whose adapted layers consult experts by a router.

    The hooks sit on the base itself, which is routed until :meth:`remove` or the end of a ``with``
    block. A base carries the experts of one routed model at a time.

    Attributes:
        model: the transformers model, with the hooks in place.
    """

    model: Any

    def __init__(
        self,
        base: Base,
        experts: Sequence[Expert],
        router: AnyRouter,
        *,
        combine: str,
        granularity: str,
        source: Source,
        tokenizer: Any,
        strict: bool,
    ) -> None:
        """Check that the experts fit the base, and attach them, in the order of the columns."""
        self._base = base
        self.model = base.model
        if self.model in _ROUTED:
            raise ValueError(
                "this base model carries a routed model already; call that one's remove() first, "
                "or use it in a `with` block"
            )
        names = [expert.name for expert in experts]
        if len(set(names)) < len(names):
            raise ValueError(f"experts of one name cannot be told apart: {names!r}")
        experts = [expert.unread() for expert in experts]
        banks = source.banks(experts)
        self._points = attachment_points(base, experts, banks, strict=strict)
        check_one_path(self._points)
        self._source, self._strict = source, strict
        self._changing = threading.Lock()
        self._hooks = Hooks(
            self.model,
            router,
            Roster(tuple(experts), banks),
            combine=combine,
            granularity=granularity,
            tokenizer=tokenizer or base.tokenizer,
        )
        self._check_combined(self._hooks.roster)
        if isinstance(router, nn.Module):
            router.to(self.model.device)
        self._hooks.attach(self._points)
        _ROUTED.add(self.model)

    # What holds inside a block, in this thread.

    @contextmanager
    def tasks(self, names: TaskNames) -> Iterator[Self]:
        """Name the tasks of the rows for all calls inside, in this thread.

        Args:
            names: one task for every row, or one a row, None for a row without one.
        """
        with self._scoped(**named_tasks(names)):
            yield self

    @contextmanager
    def without(self, *names: str) -> Iterator[Self]:
        """Some experts switched off for all calls inside, in this thread; blocks may be nested."""
        known = self._hooks.roster.known(names)
        with self._scoped(without=scope_of(self._hooks).without | known):
            yield self

    @contextmanager
    def only(self, *names: str) -> Iterator[Self]:
        """All other experts switched off for all calls inside, in this thread."""
        others = set(self.experts) - self._hooks.roster.known(names)
        with self.without(*others):
            yield self

    @contextmanager
    def bare(self) -> Iterator[Self]:
        """The base alone for all calls inside, in this thread."""
        with self._scoped(bare=True):
            yield self

    @contextmanager
    def trace(self) -> Iterator[Trace]:
        """Record every expert's weight for every token and layer of the calls inside.

        Gives the :class:`~mttl_routing.Trace`, which is there after the block too. Outside of such
        a block nothing is recorded, and nothing is spent.
        """
        from mttl_routing.trace import Trace

        made = Trace()
        with self._scoped(trace=made):
            yield made

    # The experts, which may change.

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the experts in the order of the gates' columns: sorted, then as added."""
        return self._hooks.roster.names

    def expert(self, name: str) -> Expert:
        """One of the experts, with the weights that it has now, as after training."""
        roster = self._hooks.roster
        roster.known([name])
        return roster.experts[roster.names.index(name)]

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the experts that are not switched off by :meth:`disable`."""
        roster = self._hooks.roster
        return tuple(name for name in roster.names if name not in roster.disabled)

    def disable(self, *names: str) -> None:
        """Switch experts off: no token is sent to them until :meth:`enable`."""
        with self._changing:
            roster = self._hooks.roster
            self._hooks.roster = roster.switched(roster.disabled | roster.known(names))

    def enable(self, *names: str) -> None:
        """Switch experts on again; without a name, all of them."""
        with self._changing:
            roster = self._hooks.roster
            on = roster.known(names) if names else roster.disabled
            self._hooks.roster = roster.switched(roster.disabled - on)

    def add_expert(self, expert: Expert) -> None:
        """Take in one more expert, in the last column. The others are not touched.

        Raises:
            IncompatibleExpertError: it is for another base, or does not fit this one.
            ValueError: there is one of its name, or the router cannot take in another.
        """
        if expert.name in self.experts:
            raise ValueError(
                f"this routed model has an expert {expert.name!r} already; use replace_expert"
            )
        self._change(expert, Roster.added)

    def replace_expert(self, expert: Expert) -> None:
        """Put an expert in the place of that of its name; as :meth:`add_expert`."""
        self._hooks.roster.known([expert.name])
        self._change(expert, Roster.replaced)

    def remove_expert(self, name: str) -> None:
        """Let an expert go. The others are not touched; later columns move up by one."""
        with self._changing:
            roster = self._hooks.roster
            roster.known([name])
            if len(roster.names) == 1:
                raise ValueError(
                    f"{name!r} is the only expert of this routed model; call remove() to be left "
                    "with the base"
                )
            self._hooks.roster = roster.removed(name)
            self._source.changed()
            if isinstance(self.router, FollowsExperts):
                self.router.follow((), (name,))

    def remove(self) -> None:
        """Take the hooks off the base, which is then what it was before; once is enough."""
        if self._hooks.attached:
            _ROUTED.discard(self.model)
        self._hooks.detach()

    def __enter__(self) -> Self:
        """Itself; the end of the block removes it from the base."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the hooks off the base."""
        self.remove()

    @property
    def router(self) -> Any:
        """What chooses."""
        return self._hooks.router

    @property
    def combine(self) -> str:
        """``after`` or ``before``."""
        return self._hooks.combine

    @property
    def granularity(self) -> str:
        """Which layers share a decision: ``layer``, ``block`` or ``model``."""
        return self._hooks.granularity

    @contextmanager
    def _scoped(self, **changes: Any) -> Iterator[Scope]:
        with scoped(self._hooks, replace(scope_of(self._hooks), **changes)) as scope:
            yield scope

    def _change(
        self, expert: Expert, change: Callable[[Roster, Expert, Mapping[str, Bank]], Roster]
    ) -> None:
        with self._changing:
            old = self._hooks.roster
            check_one_base([*old.experts, expert], strict=self._strict)
            own = self._source.banks([expert])
            new = attachment_points(self._base, [expert], own, strict=self._strict)
            points = {**self._points, **new}
            check_one_path(points)
            roster = change(old, expert.unread(), own)
            self._check_combined(roster)
            if isinstance(self.router, FollowsExperts):
                removed = (expert.name,) if expert.name in old.names else ()
                self.router.follow((expert,), removed)
            self._hooks.roster = roster
            self._source.changed()
            if self._hooks.attached:
                self._hooks.attach_layers(new)
            self._points = points

    def _check_combined(self, roster: Roster) -> None:
        """Refuse ranks that cannot be averaged now, not at the first token."""
        if self.combine == "before":
            for bank in roster.banks.values():
                if len({rank for rank in bank.ranks if rank}) > 1:
                    bank.apply_before(torch.zeros(0, bank.in_features), torch.zeros(0, len(bank)))


def named_tasks(names: TaskNames | None) -> dict[str, Tasks]:
    """The task names as a change of :class:`Scope`: none where none were given."""
    if names is None:
        return {}
    return {"tasks": names if isinstance(names, str) else tuple(names)}
