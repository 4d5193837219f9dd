"""Whether an expert can work on a base model: the same base, and something to attach to."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from mttl_experts.errors import IncompatibleExpertError, IncompatibleExpertWarning
from mttl_experts.expert import ExpertInfo


def check_compatible(
    info: ExpertInfo,
    *,
    base_id: str | None = None,
    fingerprint: str | None = None,
    tokenizer_digest: str | None = None,
    template_digest: str | None = None,
    modules: Collection[str] | None = None,
    strict: bool = False,
) -> None:
    """Refuse an expert that cannot work on a base model; say nothing of what either does not know.

    Args:
        info: the expert's facts.
        base_id: the base's id. An expert that names another is refused, unless the weights are the
            same: then it is one base under two names.
        fingerprint: digest of the base's weights. Another one, as after quantisation, is a warning.
        tokenizer_digest: likewise, of its tokenizer.
        template_digest: likewise, of its chat template.
        modules: paths of the base's modules. An expert whose config matches none is refused.
        strict: refuse where there would be a warning.

    Raises:
        IncompatibleExpertError: naming both sides.
    """
    name = info.expert_name
    if is_other_base(info, base_id, fingerprint):
        raise IncompatibleExpertError(
            f"expert {name!r} was made for base model {info.expert_model!r}, not for {base_id!r}; "
            f"load that base, or choose experts with model_name={base_id!r}"
        )
    for what, theirs, ours in (
        ("weights", info.model_fingerprint, fingerprint),
        ("tokenizer", info.tokenizer_digest, tokenizer_digest),
        ("chat template", info.template_digest, template_digest),
    ):
        if theirs is None or ours is None or theirs == ours:
            continue
        message = (
            f"expert {name!r} was made with other {what} of the base than these: digest "
            f"{theirs!r}, here {ours!r}; its results may differ"
        )
        if strict:
            raise IncompatibleExpertError(message)
        warnings.warn(message, IncompatibleExpertWarning, stacklevel=2)
    check_targets(info, modules)


def is_other_base(info: ExpertInfo, base_id: str | None, fingerprint: str | None) -> bool:
    """Whether an expert was made for another base: of another name, and of other weights.

    Args:
        info: the expert's facts.
        base_id: the base's id, if it is known.
        fingerprint: digest of its weights, if it is known.
    """
    if base_id is None or info.expert_model is None or base_id == info.expert_model:
        return False
    return fingerprint is None or fingerprint != info.model_fingerprint


def check_targets(info: ExpertInfo, modules: Collection[str] | None = None) -> None:
    """Refuse an adapter config that would attach to nothing.

    Args:
        info: the expert's facts; one without a config, or of a kind without targets, passes.
        modules: paths of the base's modules; without them only an empty target list is refused.
    """
    config = info.expert_config
    targets = None if config is None else config.get("target_modules")
    if config is None or targets is None:
        return  # None stands for PEFT's own list for the architecture
    if not targets and not config.get("target_parameters"):
        raise IncompatibleExpertError(
            f"expert {info.expert_name!r} has target_modules={targets!r}, so it would attach to "
            "nothing; name the modules it adapts"
        )
    if modules is not None and targets and not any(_targeted(config, path) for path in modules):
        raise IncompatibleExpertError(
            f"expert {info.expert_name!r} has target_modules={targets!r}, which match none of the "
            f"base's {len(modules)} modules (such as {sorted(modules)[:3]}); it would attach to "
            "nothing"
        )


def _targeted(config: Mapping[str, Any], path: str) -> bool:
    """Whether a module is adapted, by PEFT's rule; ``all-linear`` is taken to match."""
    targets, excluded = config["target_modules"], config.get("exclude_modules")
    if excluded and _matches(excluded, path):
        return False
    return targets == "all-linear" or _matches(targets, path)


def _matches(targets: Any, path: str) -> bool:
    if isinstance(targets, str):
        try:
            return re.fullmatch(targets, path) is not None
        except re.error as error:
            raise IncompatibleExpertError(
                f"target_modules {targets!r} is no regular expression: {error}"
            ) from error
    return any(path == target or path.endswith(f".{target}") for target in targets)
