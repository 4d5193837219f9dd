"""Whether an expert can work on a base model: the same base, and something to attach to.

What cannot work is refused; what may work worse than it should is a warning, or refused if strict.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from mttl_experts.errors import IncompatibleExpertError, IncompatibleExpertWarning
from mttl_experts.expert import Expert, ExpertInfo


def check_compatible(
    info: ExpertInfo,
    *,
    base_id: str | None = None,
    architecture: str | None = None,
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
        architecture: the base's kind, such as ``"llama"``. An expert for another is refused.
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
    kind = info.model_architecture
    if architecture is not None and kind is not None and kind != architecture:
        raise IncompatibleExpertError(
            f"expert {name!r} was made for a base of architecture {kind!r}, not {architecture!r}; "
            f"load {info.expert_model or 'the base that it was made for'!r}"
        )
    for what, theirs, ours in (
        ("weights", info.model_fingerprint, fingerprint),
        ("tokenizer", info.tokenizer_digest, tokenizer_digest),
        ("chat template", info.template_digest, template_digest),
    ):
        if theirs is None or ours is None or theirs == ours:
            continue
        warn_or_refuse(
            f"expert {name!r} was made with other {what} of the base than these: digest "
            f"{theirs!r}, here {ours!r}; its results may differ",
            strict,
        )
    check_targets(info, modules)


def warn_or_refuse(message: str, strict: bool) -> None:
    """Warn of what may work worse than it should, or raise IncompatibleExpertError if strict."""
    if strict:
        raise IncompatibleExpertError(message)
    warnings.warn(message, IncompatibleExpertWarning, stacklevel=3)


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


def check_weights(expert: Expert) -> None:
    """Refuse weights that their own config does not fit, which a model would drop or choke on.

    Raises:
        IncompatibleExpertError: the config targets none of the modules that the weights are for, or
            a module's LoRA factors do not fit each other or the config's rank.
    """
    config = expert.expert_info.expert_config or {}
    factors = lora_tensors(expert)
    if config.get("peft_type") != "LORA" or not factors or any(map(config.get, _NOT_BY_MODULE)):
        return
    targets = config.get("target_modules")
    if targets and not any(_targeted(config, path) for path in factors):
        raise IncompatibleExpertError(
            f"expert {expert.name!r} has weights for {len(factors)} modules (such as "
            f"{min(factors)!r}), and target_modules={targets!r} match none of them, so it would "
            "attach to nothing; give the config that it was trained with"
        )
    for path, found in factors.items():
        shapes = {which: tuple(tensor.shape) for which, tensor in sorted(found.items())}
        a, b = shapes.get("A", ()), shapes.get("B", ())
        wanted = a[0] if config.get("rank_pattern") and a else config.get("r", a[:1] and a[0])
        if len(a) == 2 and len(b) == 2 and not a[0] == b[1] == wanted:
            raise IncompatibleExpertError(
                f"expert {expert.name!r}: module {path!r} has lora_A {a} and lora_B {b}, and its "
                f"config says rank {wanted!r}; give the config that it was trained with"
            )


def check_fits(expert: Expert, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a LoRA expert whose modules a base does not have, or has in another shape.

    Args:
        expert: with weights; one without LoRA factors passes.
        shapes: (out, in) of the base's linear modules, by path.

    Raises:
        IncompatibleExpertError: naming the module and both shapes.
    """
    factors = lora_tensors(expert)
    check_targets(expert.expert_info, shapes)
    absent = sorted(path for path in factors if path not in shapes)
    if absent:
        raise IncompatibleExpertError(
            f"expert {expert.name!r} adapts {len(factors)} modules, of which the base lacks "
            f"{len(absent)} (such as {absent[0]!r}); load the base that it was made for, "
            f"{expert.expert_info.expert_model!r}"
        )
    for path, found in factors.items():
        if found.keys() != {"A", "B"} or found["A"].ndim != 2 or found["B"].ndim != 2:
            continue
        wanted = (int(found["B"].shape[0]), int(found["A"].shape[1]))
        if wanted != tuple(shapes[path]):
            raise IncompatibleExpertError(
                f"module {path!r} is {tuple(shapes[path])} (out, in) in the base and {wanted} in "
                f"expert {expert.name!r}; load the base that it was made for, "
                f"{expert.expert_info.expert_model!r}"
            )


def lora_tensors(expert: Expert) -> dict[str, dict[str, Tensor]]:
    """LoRA factors as they are stored, ``{module: {"A": …, "B": …}}``, whatever else there is."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in expert.expert_weights or ():
        if match := _FACTOR.fullmatch(key):
            tensor = (expert.expert_weights or {})[key]
            found.setdefault(match["module"], {})[match["which"]] = tensor
    return found


_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<which>[AB])\.weight")
# Options under which factors are not one (r, i) and one (o, r) for each module.
_NOT_BY_MODULE = ("target_parameters", "use_bdlora", "use_qalora", "layer_replication")


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
