"""A transformers model whose adapted layers send each token to the experts that suit it.

This is what users hold. The hooks on the base are in ``hooks.py``, the experts in ``roster.py``,
what a row takes with it through a generation in ``decided.py``. What to choose is the router's.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from mttl_adapters.base_models import fingerprint
from mttl_experts import Expert
from mttl_routing.attachment import attachment_points, base_of
from mttl_routing.call import Generation, Scope, call_of, resumed, scope_of, scoped, set_call
from mttl_routing.cohort import Experts, check_one_base, experts_of, factors_by_module
from mttl_routing.hooks import Hooks
from mttl_routing.roster import Roster
from mttl_routing.routers import (
    ROUTERS,
    AnyRouter,
    Batches,
    FollowsExperts,
    RouterOptions,
    Tasks,
)
from mttl_routing.routers.embedding import Example
from mttl_routing.saving import Made, check_base, imported, load, save

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters.base_models import BaseModel
    from mttl_experts import ExpertLibrary
    from mttl_routing.trace import Trace

TaskNames = str | Sequence[str | None]

# What the base would do for itself alone, leaving the experts out without a word.
_NOT_DELEGATED = ("push_to_hub", "state_dict")

_ROUTED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class RoutedModel:
    """A base model and the experts that its layers consult, used like the base model itself.

    ``routed(**inputs)``, ``routed.generate(**inputs)`` and the attributes of the transformers
    model (``config``, ``device``, ``get_input_embeddings``, ...) work. The hooks sit on the base
    model, so ``routed.model``, the base itself, is routed as well, until :meth:`remove` or the end
    of a ``with`` block. A base carries one routed model at a time.

    Attributes:
        model: the transformers model, with the hooks in place.
        router: what chooses.
        combine: ``after`` or ``before``.
        granularity: which layers share a decision: ``layer``, ``block`` or ``model``.
    """

    model: Any

    def __init__(
        self,
        base_model: BaseModel | PreTrainedModel | None,
        experts: Sequence[Expert],
        router: AnyRouter,
        *,
        combine: str = "after",
        granularity: str = "layer",
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        strict: bool = False,
    ) -> None:
        """Check that the experts fit the base, and attach them; :meth:`from_experts` says more.

        The order of ``experts`` is that of the gates' columns.
        """
        check_one_base(experts, strict=strict)
        self._base = base_of(_load(*_known_base(experts)) if base_model is None else base_model)
        self.model = self._base.model
        if self.model in _ROUTED:
            raise ValueError(
                "this base model carries a routed model already; call that one's remove() first, "
                "or use it in a `with` block"
            )
        names = [expert.name for expert in experts]
        if len(set(names)) < len(names):
            raise ValueError(f"experts of one name cannot be told apart: {names!r}")
        table = factors_by_module(experts)
        points = attachment_points(self._base, experts, table, strict=strict)
        self._dtype, self._strict = dtype, strict
        self._made = Made(None, {})
        self._changing = threading.Lock()
        self._hooks = Hooks(
            self.model,
            router,
            Roster.of(experts, table, dtype),
            combine=combine,
            granularity=granularity,
            tokenizer=tokenizer or self._base.tokenizer,
        )
        self._check_combined(self._hooks.roster)
        self._hooks.attach(points)
        _ROUTED.add(self.model)

    @classmethod
    def from_library(
        cls,
        library: ExpertLibrary,
        router: str | AnyRouter = "arrow",
        top_k: int = 4,
        combine: str = "after",
        temperature: float = 1.0,
        *,
        base_model: BaseModel | PreTrainedModel | None = None,
        granularity: str = "layer",
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        strict: bool = False,
        batches: Batches | None = None,
        examples: Mapping[str, Iterable[Example]] | None = None,
        **options: Any,
    ) -> Self:
        """All experts of a library around a base model; :meth:`from_experts` says more.

        What a router computes from the experts alone, such as Arrow's prototypes, is kept in the
        library beside them and not computed again.
        """
        options |= {"top_k": top_k, "temperature": temperature}
        return cls._of(
            experts_of(library), router, options, library, base_model=base_model, combine=combine,
            granularity=granularity, dtype=dtype, tokenizer=tokenizer, strict=strict,
            batches=batches, examples=examples,
        )  # fmt: skip

    @classmethod
    def from_experts(
        cls,
        experts: Experts,
        router: str | AnyRouter = "arrow",
        top_k: int = 4,
        combine: str = "after",
        temperature: float = 1.0,
        *,
        base_model: BaseModel | PreTrainedModel | None = None,
        granularity: str = "layer",
        dtype: torch.dtype | None = None,
        tokenizer: Any = None,
        strict: bool = False,
        batches: Batches | None = None,
        examples: Mapping[str, Iterable[Example]] | None = None,
        **options: Any,
    ) -> Self:
        """Experts around a base model; their factors are copied, a base already loaded is not.

        Args:
            experts: of one base; ranks, alphas, rsLoRA and adapted modules may differ.
            router: name in :data:`~mttl_routing.ROUTERS`, or an object of one's own that keeps
                :class:`~mttl_routing.Router` or :class:`~mttl_routing.SequenceRouter`.
            top_k: experts a token gets, for routers that choose (``arrow``).
            combine: ``after`` is the sum of the experts' outputs. ``before`` averages their A and
                their B apart, a different function, for comparison with numbers published for it.
            temperature: the higher, the more equal the weights, for routers with a softmax.
            base_model: from :func:`mttl_adapters.load_base_model`, or a bare transformers model;
                None loads the one that the experts name as theirs.
            granularity: which layers share a decision. ``layer``: each decides on its own input.
                ``block``: those of a transformer block take its first adapted layer's. ``model``:
                all take that of the first adapted layer of the model.
            dtype: what to keep the experts' factors in; None is their own.
            tokenizer: for routers that read the prompt's text; by default the base model's own,
                where it came from :func:`~mttl_adapters.load_base_model`.
            strict: refuse experts for the same base under other weights (its fingerprint),
                tokenizer or template; else that is a warning which names both digests.
            batches: data of each expert, for routers that learn from it (``centroid``,
                ``phatgoose``, a calibrated ``seqr``): by its name, or by a function of the expert.
            examples: prompts of each expert by its name (of each task, for ``lorauter``), as texts
                or batches of token ids, for routers that are fitted on them.
            options: ``top_p``, ``threshold``, ``null`` as :class:`~mttl_routing.Choice` has them;
                ``weights`` for ``fixed``.

        Raises:
            IncompatibleExpertError: an expert is for another base, or does not fit this one.
        """
        options |= {"top_k": top_k, "temperature": temperature}
        return cls._of(
            experts_of(experts), router, options, None, base_model=base_model, combine=combine,
            granularity=granularity, dtype=dtype, tokenizer=tokenizer, strict=strict,
            batches=batches, examples=examples,
        )  # fmt: skip

    @classmethod
    def _of(
        cls,
        experts: Sequence[Expert],
        router: str | AnyRouter,
        options: dict[str, Any],
        library: ExpertLibrary | None,
        *,
        base_model: BaseModel | PreTrainedModel | None,
        batches: Batches | None,
        examples: Mapping[str, Iterable[Example]] | None,
        **settings: Any,
    ) -> Self:
        experts = sorted(experts, key=lambda expert: expert.name)
        fitted = batches is not None or examples is not None
        if base_model is None and fitted:
            base_model = _load(*_known_base(experts))
        data = {"batches": batches, "examples": examples, "base_model": base_model}
        built = _router(router, experts, library=library, **data, **options)
        routed = cls(base_model, experts, built, **settings)
        if isinstance(router, str) and not fitted:  # the data that it is fitted on is not saved
            routed._made = Made(router, options)
        return routed

    # As a folder.

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Keep everything but the base's own weights in a folder, for :meth:`from_pretrained`.

        A router of your own is kept by the path that its class is imported from, by what its
        method ``options()`` gives, if it has one, and by its parameters, if it is an ``nn.Module``.

        Raises:
            FileExistsError: the folder holds something else than a routed model.
        """
        roster, made = self._hooks.roster, self._made

        def keep(library: ExpertLibrary) -> None:
            if made.name is not None:
                _router(made.name, roster.experts, library=library, **made.options)

        settings = {
            "combine": self.combine,
            "granularity": self.granularity,
            "dtype": None if self._dtype is None else str(self._dtype).removeprefix("torch."),
        }
        base = {
            "model_id": self._base.model_id or _known_base(roster.experts)[0],
            "revision": self._base.revision,
            "fingerprint": self._base.fingerprint or fingerprint(self.model),
        }
        save(
            Path(folder), roster.experts, self.router, made, settings, sorted(roster.disabled),
            base, keep,
        )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        *,
        base_model: BaseModel | PreTrainedModel | None = None,
        router: AnyRouter | None = None,
        trust_router: bool = False,
        tokenizer: Any = None,
    ) -> Self:
        """The routed model that :meth:`save_pretrained` kept: on the same base, the same logits.

        Args:
            folder: that it was kept in.
            base_model: as for :meth:`from_experts`; None loads the one it was saved with.
            router: in place of a router of your own that was saved; its parameters are loaded.
            trust_router: allow such a router to be imported, which runs the code it names.
            tokenizer: as for :meth:`from_experts`.

        Raises:
            FileNotFoundError: no routed model is there.
            IncompatibleExpertError: the base is another.
            ValueError: the router is code that the caller did not allow.
        """
        folder = Path(folder)
        saved = load(folder)
        if router is None and saved.made.name is None:
            router = imported(saved, folder, trust_router)
        elif router is None:
            router = _router(
                str(saved.made.name), saved.experts, library=saved.library, **saved.made.options
            )
        if base_model is None:
            base_model = _load(saved.base["model_id"], saved.base["revision"])
        base = base_of(base_model)
        check_base(saved, base, base.fingerprint or fingerprint(base.model))
        if saved.state:
            router.load_state_dict(saved.state)  # type: ignore[union-attr]
        routed = cls(base_model, saved.experts, router, tokenizer=tokenizer, **saved.settings)
        routed._made = saved.made
        routed.disable(*saved.disabled)
        return routed

    # Used like the base.

    def __call__(self, *args: Any, task_names: TaskNames | None = None, **kwargs: Any) -> Any:
        """What the routed model makes of its inputs, as the base model's ``forward`` returns it.

        Args:
            args: to the base model.
            task_names: task of each row, for routers that go by task; as :meth:`tasks`. With a
                cache that a call before has returned, the rows still have theirs.
            kwargs: to the base model.
        """
        with self._scoped(**_named(task_names)):
            return self.model(*args, **kwargs)

    forward = __call__

    def generate(self, *args: Any, task_names: TaskNames | None = None, **kwargs: Any) -> Any:
        """Text from the routed model, as the base model's ``generate`` returns it.

        A row's task, and what a router decided for it by its prompt, stay with it through beams,
        several returned sequences and assisted generation, with a cache and without.

        Args:
            args: to the base model.
            task_names: task of each row of the prompt; as :meth:`tasks`.
            kwargs: to the base model. ``assistant_model`` may be a routed model too.
        """
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        generation = Generation(ids, kwargs.get("attention_mask"))
        if isinstance(kwargs.get("assistant_model"), RoutedModel):
            kwargs["assistant_model"] = kwargs["assistant_model"].model
        set_call(self._hooks, None)  # one that was interrupted may be left
        with self._scoped(generation=generation, **_named(task_names)):
            return self.model.generate(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the base; the experts follow when they meet its tensors."""
        self.model.to(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the training mode of the base, and of a router that has one."""
        self.model.train(mode)
        if isinstance(self.router, nn.Module):
            self.router.train(mode)
        return self

    def eval(self) -> Self:
        """Set the base's evaluation mode."""
        return self.train(False)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the base model's, but that the layers computed again are routed as they were.

        Args:
            activation_checkpointing_kwargs: to ``torch.utils.checkpoint``; never reentrant.
            kwargs: to the base model.
        """
        if self.granularity == "model":
            raise ValueError(
                "with granularity='model' all blocks hang together by one decision, so none can "
                "be computed again by itself; use 'block' or 'layer' with activation checkpointing"
            )

        def contexts() -> tuple[Any, Any]:
            return nullcontext(), resumed(self._hooks, call_of(self._hooks))

        options = {**(activation_checkpointing_kwargs or {}), "use_reentrant": False}
        self.model.activation_checkpointing_enable(options | {"context_fn": contexts}, **kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # its older name

    # What holds inside a block, in this thread.

    @contextmanager
    def tasks(self, names: TaskNames) -> Iterator[Self]:
        """Name the tasks of the rows for all calls inside, in this thread.

        Args:
            names: one task for every row, or one a row, None for a row without one.
        """
        with self._scoped(**_named(names)):
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
        self._change(expert, lambda roster: roster.added(expert, self._dtype))

    def replace_expert(self, expert: Expert) -> None:
        """Put an expert in the place of that of its name; as :meth:`add_expert`."""
        self._hooks.roster.known([expert.name])
        self._change(expert, lambda roster: roster.replaced(expert, self._dtype))

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

    def __getattr__(self, name: str) -> Any:
        """The base model's attribute."""
        if name in _NOT_DELEGATED:
            raise AttributeError(
                f"a routed model has no {name}: the base's would leave the experts out; use its "
                f"save_pretrained, or `routed.model`, the base alone"
            )
        if name.startswith("_") or "model" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.model, name)

    def __repr__(self) -> str:
        """Says what it is made of."""
        roster = self._hooks.roster
        shared = "" if self.granularity == "layer" else f", granularity={self.granularity!r}"
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {len(roster.names)} experts in "
            f"{len(roster.banks)} layers, router={type(self.router).__name__}, "
            f"combine={self.combine!r}{shared}{'' if self._hooks.attached else ', removed'})"
        )

    @contextmanager
    def _scoped(self, **changes: Any) -> Iterator[Scope]:
        with scoped(self._hooks, replace(scope_of(self._hooks), **changes)) as scope:
            yield scope

    def _change(self, expert: Expert, change: Any) -> None:
        with self._changing:
            old = self._hooks.roster
            check_one_base([*old.experts, expert], strict=self._strict)
            points = attachment_points(
                self._base, [expert], factors_by_module([expert]), strict=self._strict
            )
            roster = change(old)
            self._check_combined(roster)
            if isinstance(self.router, FollowsExperts):
                removed = (expert.name,) if expert.name in old.names else ()
                self.router.follow((expert,), removed)
            self._hooks.roster = roster
            if self._hooks.attached:
                self._hooks.attach_layers(points)

    def _check_combined(self, roster: Roster) -> None:
        """Refuse ranks that cannot be averaged now, not at the first token."""
        if self.combine == "before":
            for bank in roster.banks.values():
                bank.apply_before(torch.zeros(0, bank.in_features), torch.zeros(0, len(bank)))


@contextmanager
def apply_expert(
    base_model: BaseModel | PreTrainedModel, expert: Expert, *, strict: bool = False
) -> Iterator[RoutedModel]:
    """A base model with one expert, trained or merged, for as long as the block lasts."""
    with RoutedModel.from_experts(
        [expert], "uniform", base_model=base_model, strict=strict
    ) as routed:
        yield routed


def _known_base(experts: Sequence[Expert]) -> tuple[str | None, str | None]:
    """Id and revision of the base that the experts were made for, as far as they say."""
    infos = [expert.expert_info for expert in experts if expert.expert_info.expert_model]
    return (infos[0].expert_model, infos[0].model_revision) if infos else (None, None)


def _load(model_id: str | None, revision: str | None) -> BaseModel:
    from mttl_adapters import load_base_model

    if model_id is None:
        raise ValueError(
            "none of these experts says which base model it is for; give base_model=..."
        )
    return load_base_model(model_id, revision=revision)


def _router(router: str | AnyRouter, experts: Sequence[Expert], **options: Any) -> AnyRouter:
    """A router by name, built with these :class:`RouterOptions`; an object as it is."""
    if not isinstance(router, str):
        return router
    if router not in ROUTERS:
        raise ValueError(f"no router {router!r}; there are {', '.join(map(repr, ROUTERS))}")
    return ROUTERS[router].build(experts, RouterOptions(**options))


def _named(names: TaskNames | None) -> dict[str, Tasks]:
    if names is None:
        return {}
    return {"tasks": names if isinstance(names, str) else tuple(names)}
