"""Where experts attach to a base model, and the refusals when they do not fit it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from mttl_adapters.bank import Bank
from mttl_experts import Expert, IncompatibleExpertError, check_compatible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters.base_models import BaseModel


@dataclass(frozen=True)
class Base:
    """A transformers model and what is known of where it came from."""

    model: Any
    model_id: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    tokenizer: Any = None
    tokenizer_digest: str | None = None
    template_digest: str | None = None


def base_of(base_model: BaseModel | PreTrainedModel) -> Base:
    """A loaded base; a bare transformers model knows its id only if it came from a hub."""
    if not isinstance(base_model, nn.Module):
        return Base(
            model=base_model.model,
            model_id=base_model.model_id,
            revision=getattr(base_model, "revision", None),
            fingerprint=base_model.fingerprint,
            tokenizer=base_model.tokenizer,
            tokenizer_digest=base_model.tokenizer_digest,
            template_digest=base_model.template_digest,
        )
    name = getattr(getattr(base_model, "config", None), "name_or_path", None) or ""
    # A folder says nothing: the same base lies in another folder on another machine.
    is_folder = Path(name).is_absolute() or Path(name).exists()
    return Base(base_model, model_id=None if is_folder or not name else name)


def attachment_points(
    base: Base,
    experts: Sequence[Expert],
    banks: Mapping[str, Bank],
    *,
    strict: bool = False,
) -> dict[str, nn.Module]:
    """The base's module for each path of ``banks``, in its order.

    Args:
        base: what to attach to.
        experts: to be attached.
        banks: their factors by module path, in the experts' order.
        strict: refuse also a base that differs from an expert's by its digests alone.

    Raises:
        IncompatibleExpertError: an expert is for another base, adapts a module that this base does
            not have or that is not linear, or has another shape than it.
    """
    for expert in experts:
        check_compatible(
            expert.expert_info,
            base_id=base.model_id,
            architecture=getattr(getattr(base.model, "config", None), "model_type", None),
            fingerprint=base.fingerprint,
            tokenizer_digest=base.tokenizer_digest,
            template_digest=base.template_digest,
            strict=strict,
        )
    modules = dict(base.model.named_modules(remove_duplicate=False))
    for index, expert in enumerate(experts):
        own = [path for path, bank in banks.items() if bank.ranks[index]]
        absent = [path for path in own if path not in modules]
        if absent:
            what = f"lacks {len(absent)} of the {len(own)} modules that"
            if len(absent) == len(own):
                what = f"has none of the {len(own)} modules that"
            raise IncompatibleExpertError(
                f"the base model, a {type(base.model).__name__}, {what} expert {expert.name!r} "
                f"adapts, such as {absent[0]!r}, so it would attach to nothing there; "
                f"{_instead(absent[0], expert)}"
            )
    for path, bank in banks.items():
        index = next(n for n, rank in enumerate(bank.ranks) if rank)
        found = _features(modules[path])
        wanted = (bank.out_features, bank.in_features)
        if found is None:
            raise IncompatibleExpertError(
                f"module {path!r} of the base model is a {type(modules[path]).__name__}; expert "
                f"{experts[index].name!r} can be attached to linear modules alone"
            )
        if found != wanted:
            raise IncompatibleExpertError(
                f"module {path!r} is {found} (out, in) in the base model and {wanted} in expert "
                f"{experts[index].name!r}; load the base that it was made for, "
                f"{experts[index].expert_info.expert_model!r}"
            )
    return {path: modules[path] for path in banks}


def check_one_path(points: Mapping[str, nn.Module]) -> None:
    """Refuse a module that is adapted under two of its paths: it would be a layer twice.

    Raises:
        IncompatibleExpertError: naming both.
    """
    seen: dict[nn.Module, str] = {}
    for path, module in points.items():
        other = seen.setdefault(module, path)
        if other != path:
            raise IncompatibleExpertError(
                f"{other!r} and {path!r} are one module of the base model, and experts adapt it "
                "under both names; rename the tensors of those that have the second"
            )


def _instead(path: str, expert: Expert) -> str:
    """What to do about a module that the base lacks."""
    if re.search(r"\.experts\.\d+\.", path):
        return (
            "transformers 5 keeps the experts of a sparse layer in one parameter, which is not "
            "routed; take adapters of its other modules"
        )
    return f"load the base that it was made for, {expert.expert_info.expert_model!r}"


def _features(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module, by what it says of itself, as a quantised weight would not."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    if hasattr(module, "nx") and hasattr(module, "nf"):  # transformers' Conv1D, as in GPT-2
        return int(module.nf), int(module.nx)  # type: ignore[arg-type]
    return None
