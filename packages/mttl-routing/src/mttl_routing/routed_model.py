"""A transformers model whose adapted layers send each token to the experts that suit it.

This is what users hold: how it is built, saved and used like the base. Its experts, which may
come and go, are in ``attached.py``; what a row takes with it through a generation in
``decided.py``. What to choose is the router's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from mttl_adapters.base_models import fingerprint
from mttl_experts import Expert
from mttl_routing.attached import AttachedExperts, TaskNames, named_tasks
from mttl_routing.attachment import base_of
from mttl_routing.building import known_base, load_base, router_of
from mttl_routing.call import Generation, call_of, resumed, set_call
from mttl_routing.cohort import Experts, check_one_base, experts_of
from mttl_routing.learning import learn, settings_of
from mttl_routing.routers import ROUTERS, AnyRouter, Batches, RouterOptions
from mttl_routing.routers.embedding import Example
from mttl_routing.saving import Made, check_base, imported, load, parameters_of, save
from mttl_routing.sources import source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters import BankFiles
    from mttl_adapters.base_models import BaseModel
    from mttl_experts import ExpertLibrary

# What the base would do for itself alone, leaving the experts out without a word.
_NOT_DELEGATED = ("push_to_hub", "state_dict")


class RoutedModel(AttachedExperts):
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
        bank_files: BankFiles | None = None,
        tokenizer: Any = None,
        strict: bool = False,
    ) -> None:
        """Check that the experts fit the base, and attach them; :meth:`from_experts` says more.

        The order of ``experts`` is that of the gates' columns.
        """
        check_one_base(experts, strict=strict)
        if base_model is None:
            base_model = load_base(*known_base(experts))
        super().__init__(
            base_of(base_model), experts, router, combine=combine, granularity=granularity,
            source=source_of(bank_files, dtype), tokenizer=tokenizer, strict=strict,
        )  # fmt: skip
        self._made = Made(None, {})

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
        bank_files: BankFiles | None = None,
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
            granularity=granularity, dtype=dtype, bank_files=bank_files, tokenizer=tokenizer,
            strict=strict, batches=batches, examples=examples,
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
        bank_files: BankFiles | None = None,
        tokenizer: Any = None,
        strict: bool = False,
        batches: Batches | None = None,
        examples: Mapping[str, Iterable[Example]] | None = None,
        **options: Any,
    ) -> Self:
        """Experts around a base model; their factors are copied, a base already loaded is not.

        Experts of a library are read one after the other, and only their copy stays in memory.

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
            bank_files: map the factors from these files instead of copying them into memory, and
                write those that are not there. So more experts can be routed than memory holds.
            tokenizer: for routers that read the prompt's text; by default the base model's own,
                where it came from :func:`~mttl_adapters.load_base_model`.
            strict: refuse experts for the same base under other weights (its fingerprint),
                tokenizer or template; else that is a warning which names both digests.
            batches: data of each expert, for routers that learn from it (``centroid``,
                ``phatgoose``, a calibrated ``seqr``): by its name, or by a function of the expert.
                ``softmax`` and other routers that :func:`train` trains are trained on them here,
                and begin untrained without.
            examples: prompts of each expert by its name (of each task, for ``lorauter``), as texts
                or batches of token ids, for routers that are fitted on them.
            options: ``top_p``, ``threshold``, ``null`` as :class:`~mttl_routing.Choice` has them;
                ``weights`` for ``fixed``; ``then`` for ``retrieval``; ``gate_steps`` of the
                optimiser for each expert's gates (``phatgoose``, 100) or the whole router (at least
                100), and ``progress``, told of each; ``seed``, ``hidden``, ``tasks`` and ``heads``
                of a router that is trained. ``convert`` takes in experts of other kinds too, by
                :func:`~mttl_routing.as_lora`: 0 exactly, 0.05 so that no module loses more than 5 %
                of its ΔW.

        Raises:
            IncompatibleExpertError: an expert is for another base, or does not fit this one.
        """
        options |= {"top_k": top_k, "temperature": temperature}
        return cls._of(
            experts_of(experts), router, options, None, base_model=base_model, combine=combine,
            granularity=granularity, dtype=dtype, bank_files=bank_files, tokenizer=tokenizer,
            strict=strict, batches=batches, examples=examples,
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
        tolerance = options.pop("convert", None)
        if base_model is None and (fitted or tolerance is not None):
            base_model = load_base(*known_base(experts))
        if tolerance is not None:
            from mttl_routing.conversion import as_loras

            experts = as_loras(experts, base_model, tolerance)
        data: dict[str, Any] = {"batches": batches, "examples": examples, "base_model": base_model}
        data |= {"library": library, "progress": options.pop("progress", None)}
        routed = cls(base_model, experts, router_of(router, experts, **data, **options), **settings)
        learned = isinstance(router, str) and ROUTERS[router].learned
        if learned and batches is not None:
            try:
                learn(routed, RouterOptions(**data, **options))
            except BaseException:
                routed.remove()
                raise
        if learned:
            routed._made = Made(str(router), settings_of(routed.router, options))
        elif isinstance(router, str) and not fitted:  # the data that it is fitted on is not saved
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
                router_of(made.name, roster.experts, library=library, **made.options)

        dtype = self._source.dtype
        settings = {
            "combine": self.combine,
            "granularity": self.granularity,
            "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        }
        base = {
            "model_id": self._base.model_id or known_base(roster.experts)[0],
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
        bank_files: BankFiles | None = None,
        router: AnyRouter | None = None,
        trust_router: bool = False,
        tokenizer: Any = None,
    ) -> Self:
        """The routed model that :meth:`save_pretrained` kept: on the same base, the same logits.

        Args:
            folder: that it was kept in.
            base_model: as for :meth:`from_experts`; None loads the one it was saved with.
            bank_files: as for :meth:`from_experts`; of the dtype that it was saved with, if any.
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
            router = router_of(
                str(saved.made.name), saved.experts, library=saved.library, **saved.made.options
            )
        if base_model is None:
            base_model = load_base(saved.base["model_id"], saved.base["revision"])
        base = base_of(base_model)
        check_base(saved, base, base.fingerprint or fingerprint(base.model))
        if saved.state:
            router.load_state_dict(parameters_of(saved, router))  # type: ignore[union-attr]
        routed = cls(
            base_model, saved.experts, router, bank_files=bank_files, tokenizer=tokenizer,
            **saved.settings,
        )  # fmt: skip
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
        with self._scoped(**named_tasks(task_names)):
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
        with self._scoped(generation=generation, **named_tasks(task_names)):
            return self.model.generate(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the base; the experts follow when they meet its tensors."""
        self.model.to(*args, **kwargs)
        if isinstance(self.router, nn.Module):
            self.router.to(self.model.device)
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
def apply_expert(
    base_model: BaseModel | PreTrainedModel, expert: Expert, *, strict: bool = False
) -> Iterator[RoutedModel]:
    """A base model with one expert, trained or merged, for as long as the block lasts."""
    with RoutedModel.from_experts(
        [expert], "uniform", base_model=base_model, strict=strict
    ) as routed:
        yield routed
