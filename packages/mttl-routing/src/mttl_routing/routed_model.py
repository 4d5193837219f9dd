"""A transformers model whose adapted layers send each token to the experts that suit it.

Hooks add to a layer's output what the chosen experts make of its input, and touch nothing else: so
the base may be quantised, and is what it was once they are gone. What to choose is the router's.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from mttl_adapters.bank import Bank
from mttl_experts import Expert
from mttl_routing.attachment import attachment_points, base_of
from mttl_routing.cohort import Experts, check_one_base, experts_of, factors_by_module
from mttl_routing.routers import ROUTERS, AnyRouter, Layer, RouterOptions, Rows
from mttl_routing.routers.arrow import prototypes_in_library, prototypes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters.base_models import BaseModel
    from mttl_experts import ExpertLibrary

Tasks = str | Sequence[str | None]

# What the base would do for itself alone, leaving the experts out without a word.
_NOT_DELEGATED = ("save_pretrained", "push_to_hub", "state_dict")


@dataclass(frozen=True)
class _Tasks:
    """Tasks of the rows of a call; in ``generate`` a row may have become several, side by side."""

    names: str | tuple[str | None, ...] | None = None
    expanded: bool = False


# By id of the routed model. A context variable, so that threads do not see each other's tasks.
_TASKS: ContextVar[Mapping[int, _Tasks]] = ContextVar("tasks", default=MappingProxyType({}))
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
        experts: names of the experts, sorted: the order of the gates' columns.
        combine: ``after`` or ``before``.
    """

    model: Any

    def __init__(
        self,
        base_model: BaseModel | PreTrainedModel,
        experts: Sequence[Expert],
        router: AnyRouter,
        *,
        combine: str = "after",
        dtype: torch.dtype | None = None,
        strict: bool = False,
    ) -> None:
        """Check that the experts fit the base, and attach them; :meth:`from_experts` says more."""
        base = base_of(base_model)
        self.model = base.model
        if combine not in ("after", "before"):
            raise ValueError(f"combine is {combine!r}; it takes 'after' or 'before'")
        if not callable(getattr(router, "gates", None)):
            raise TypeError(f"{router!r} is no router: it has no method gates(x, layer, rows)")
        if base.model in _ROUTED:
            raise ValueError(
                "this base model carries a routed model already; call that one's remove() first, "
                "or use it in a `with` block"
            )
        experts = sorted(experts, key=lambda expert: expert.name)
        self.router: Any = router
        self.experts = tuple(expert.name for expert in experts)
        self.combine = combine
        if len(set(self.experts)) < len(experts):
            raise ValueError(f"experts of one name cannot be told apart: {list(self.experts)!r}")
        check_one_base(experts, strict=strict)
        table = factors_by_module(experts)
        points = attachment_points(base, experts, table, strict=strict)
        self._layers: dict[str, Layer] = {}
        for path, column in table.items():
            some = next(factors for factors in column if factors is not None)
            nothing = (some.a[:0], some.b[:, :0], 1.0)  # rank 0: ΔW is zero
            bank = Bank.from_factors(
                [nothing if f is None else (f.a, f.b, f.scaling) for f in column],
                dtype=dtype,
            )
            if combine == "before":  # refused now, not at the first token
                bank.apply_before(torch.zeros(0, bank.in_features), torch.zeros(0, len(bank)))
            self._layers[path] = Layer(path, self.experts, bank)
        self._handles = [
            module.register_forward_hook(partial(self._hook, path), with_kwargs=True)
            for path, module in points.items()
        ]
        _ROUTED.add(base.model)

    @classmethod
    def from_library(
        cls,
        library: ExpertLibrary,
        router: str | AnyRouter = "arrow",
        top_k: int = 4,
        combine: str = "after",
        temperature: float = 1.0,
        *,
        base_model: BaseModel | PreTrainedModel,
        dtype: torch.dtype | None = None,
        strict: bool = False,
    ) -> Self:
        """All experts of a library around a base model; :meth:`from_experts` says more.

        What a router computes from the experts alone, such as Arrow's prototypes, is kept in the
        library beside them and not computed again.
        """
        experts = experts_of(library)
        options = RouterOptions(top_k, temperature, partial(prototypes_in_library, library))
        built = _build(router, experts, options)
        return cls(base_model, experts, built, combine=combine, dtype=dtype, strict=strict)

    @classmethod
    def from_experts(
        cls,
        experts: Experts,
        router: str | AnyRouter = "arrow",
        top_k: int = 4,
        combine: str = "after",
        temperature: float = 1.0,
        *,
        base_model: BaseModel | PreTrainedModel,
        dtype: torch.dtype | None = None,
        strict: bool = False,
    ) -> Self:
        """Experts around a base model that is already loaded; they are copied, the base is not.

        Args:
            experts: of one base; ranks, alphas, rsLoRA and adapted modules may differ.
            router: name in :data:`~mttl_routing.ROUTERS`, or an object of one's own that keeps
                :class:`~mttl_routing.Router`.
            top_k: experts a token gets, for routers that choose (``arrow``).
            combine: ``after`` is the sum of the experts' outputs. ``before`` averages their A and
                their B apart, a different function, for comparison with numbers published for it.
            temperature: the higher, the more equal the weights, for routers with a softmax.
            base_model: from :func:`mttl_adapters.load_base_model`, or a bare transformers model.
            dtype: what to keep the experts' factors in; None is their own.
            strict: refuse experts for the same base under other weights (its fingerprint),
                tokenizer or template; else that is a warning which names both digests.

        Raises:
            IncompatibleExpertError: an expert is for another base, or does not fit this one.
        """
        chosen = experts_of(experts)
        built = _build(router, chosen, RouterOptions(top_k, temperature, prototypes_of))
        return cls(base_model, chosen, built, combine=combine, dtype=dtype, strict=strict)

    def __call__(self, *args: Any, task_names: Tasks | None = None, **kwargs: Any) -> Any:
        """What the routed model makes of its inputs, as the base model's ``forward`` returns it.

        Args:
            args: to the base model.
            task_names: task of each row, for routers that go by task; as :meth:`tasks`.
            kwargs: to the base model.
        """
        with self._using(replace(self._tasks, **_named(task_names))):
            return self.model(*args, **kwargs)

    forward = __call__

    def generate(self, *args: Any, task_names: Tasks | None = None, **kwargs: Any) -> Any:
        """Text from the routed model, as the base model's ``generate`` returns it.

        A row's task stays with it through beams and several returned sequences.

        Args:
            args: to the base model.
            task_names: task of each row of the prompt; as :meth:`tasks`.
            kwargs: to the base model.
        """
        with self._using(replace(self._tasks, expanded=True, **_named(task_names))):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def tasks(self, names: Tasks) -> Iterator[Self]:
        """Name the tasks of the rows for all calls inside, in this thread.

        Args:
            names: one task for every row, or one a row, None for a row without one.
        """
        with self._using(_Tasks(**_named(names))):
            yield self

    def remove(self) -> None:
        """Take the hooks off the base, which is then what it was before; once is enough."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            _ROUTED.discard(self.model)
        self._handles = []

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

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the base; the experts follow when they meet its tensors."""
        self.model.to(*args, **kwargs)
        return self

    def train(self, mode: bool = True) -> Self:
        """Set the base's training mode."""
        self.model.train(mode)
        return self

    def eval(self) -> Self:
        """Set the base's evaluation mode."""
        return self.train(False)

    def __getattr__(self, name: str) -> Any:
        """The base model's attribute."""
        if name in _NOT_DELEGATED:
            raise AttributeError(
                f"a routed model has no {name}: the base's would leave the experts out; keep the "
                f"library it was made from, or save `routed.model`, the base alone"
            )
        if name.startswith("_") or "model" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.model, name)

    def __repr__(self) -> str:
        """Says what it is made of."""
        return (
            f"{type(self).__name__}({type(self.model).__name__}, {len(self.experts)} experts in "
            f"{len(self._layers)} layers, router={type(self.router).__name__}, "
            f"combine={self.combine!r}{'' if self._handles else ', removed'})"
        )

    @property
    def _tasks(self) -> _Tasks:
        return _TASKS.get().get(id(self), _Tasks())

    @contextmanager
    def _using(self, tasks: _Tasks) -> Iterator[None]:
        token = _TASKS.set({**_TASKS.get(), id(self): tasks})
        try:
            yield
        finally:
            _TASKS.reset(token)

    def _hook(
        self,
        path: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor:
        """A layer's output with what its experts add, rounded once to the output's dtype."""
        x: Tensor = args[0] if args else kwargs["input"]
        layer = self._layers[path]
        if layer.bank.a.device != x.device:
            layer = replace(layer, bank=layer.bank.to(x.device))
            self._layers[path] = layer
        flat = x.reshape(-1, x.shape[-1])  # (t, i)
        gates = self.router.gates(flat, layer, self._rows(x))
        bank = layer.bank
        update = (bank.apply if self.combine == "after" else bank.apply_before)(flat, gates)
        return (output + update.view(output.shape)).to(output.dtype)

    def _rows(self, x: Tensor) -> Rows:
        """Rows of a layer's input (b, ..., i), or (t, i) without a batch axis."""
        tasks = self._tasks
        names = tasks.names
        count = x.shape[0] if x.dim() > 2 else None
        n_tokens = x.shape[:-1].numel()
        if isinstance(names, tuple) and count is not None and len(names) != count:
            if not (tasks.expanded and names and count % len(names) == 0):
                raise ValueError(f"tasks are named for {len(names)} rows, the batch has {count}")
            # As transformers expands a batch for beams and for several returned sequences.
            times = count // len(names)
            names = tuple(name for name in names for _ in range(times))
        return Rows(count, n_tokens // max(1, 1 if count is None else count), names)


@contextmanager
def apply_expert(
    base_model: BaseModel | PreTrainedModel, expert: Expert, *, strict: bool = False
) -> Iterator[RoutedModel]:
    """A base model with one expert, trained or merged, for as long as the block lasts."""
    with RoutedModel.from_experts(
        [expert], "uniform", base_model=base_model, strict=strict
    ) as routed:
        yield routed


def _build(router: str | AnyRouter, experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    if not isinstance(router, str):
        return router
    if router not in ROUTERS:
        raise ValueError(f"no router {router!r}; there are {', '.join(map(repr, ROUTERS))}")
    return ROUTERS[router].build(experts, options)


def _named(names: Tasks | None) -> dict[str, Any]:
    if names is None:
        return {}
    return {"names": names if isinstance(names, str) else tuple(names)}
