"""Many LoRA experts into one, module by module, always on ΔW = s·B·A and never on A and B apart.

The methods are in ``merges``; here the experts are checked, ordered and weighted, and what comes
out is made an expert that PEFT reads.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from torch import Tensor

from mttl_adapters.finite import is_finite
from mttl_experts import (
    Expert,
    ExpertInfo,
    ExpertLibrary,
    LoraFactors,
    UnsupportedAdapterError,
    recipe_digest,
)
from mttl_routing.cohort import Experts, check_one_base, experts_of, factors_by_module
from mttl_routing.merges import LowRank, MergeRule, Update
from mttl_routing.merges.factoring import Factored, factored
from mttl_routing.plan import Weights, plan_merge

Progress = Callable[[str, int, int | None], object]


def merge(
    experts: Experts,
    method: str | MergeRule = "uniform",
    *,
    weights: Weights | None = None,
    rank: int | None = None,
    scale: float | None = None,
    seed: int = 0,
    name: str | None = None,
    strict: bool = False,
    kept_in: ExpertLibrary | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Expert:
    """One expert that does what ``experts`` do together, by a method of :data:`MERGES`.

    Ranks, alphas, rsLoRA and per-module patterns may differ. A module that an expert leaves alone
    counts as ΔW zero there, and the report says so. The bytes of the result do not depend on the
    order of the experts. It records its parents, its recipe and a report under
    ``expert_info.training_config``. Where a library keeps the result of the very same recipe, that
    one is given, and nothing is computed.

    Args:
        experts: a library, or any iterable of experts of one base model.
        method: name in :data:`MERGES`, or a function of one's own that keeps
            :class:`~mttl_routing.merges.MergeRule`.
        weights: one number an expert, in the order of ``experts`` or by expert name; used as they
            are, they need not sum to 1. ``uniform`` takes none, ``weighted`` needs them, the others
            weigh all experts 1 where none are given.
        rank: cut every module to this rank at most and report the energy lost; None loses nothing
            and gives a rank of at most min(Σr, i, o), or min(i, o) where the method is not linear.
        scale: what the result is multiplied by, λ in most papers; the method's own if not given,
            which is 1 unless :data:`MERGES` says otherwise.
        seed: of methods that draw at random. What they draw depends on it, the expert's digest, the
            module and the element, and on nothing else; without effect on the other methods.
        name: of the result; the method and the first digits of the recipe digest if not given.
        strict: refuse experts for the same base under other weights (its fingerprint), tokenizer or
            template; else that is a warning which names both digests.
        kept_in: library that may keep the result already; that of ``experts``, if they are one.
        progress: told of each module: "", how many are merged, and how many there are.
        **options: what the method takes besides, such as ``density``; :data:`MERGES` has the names
            and defaults, the method's function says what they mean.

    Returns:
        A LoRA expert in float32 whose scaling is 1 everywhere.

    Raises:
        IncompatibleExpertError: experts of different bases, or of different shapes.
        UnsupportedAdapterError: an expert is more than ΔW (DoRA, bias, modules_to_save, ...).
    """
    plan = plan_merge(experts_of(experts), method, weights, rank, scale, seed, options)
    check_one_base(plan.experts, strict=strict)
    if kept_in is None and isinstance(experts, ExpertLibrary):
        kept_in = experts
    kept = None if kept_in is None else kept_in.made_by(recipe_digest(plan.recipe))
    if kept is not None:
        return kept if name is None else _renamed(kept, name)

    results: dict[str, Factored] = {}
    missing: dict[str, list[str]] = {}
    table = factors_by_module(plan.experts)
    for module, column in table.items():
        updates = []
        for part, factors in zip(plan.parts, column, strict=True):
            if factors is None:
                missing.setdefault(part.expert.name, []).append(module)
            else:
                _check_finite(part.expert, module, factors)
                updates.append(Update(factors, part.weight, f"{part.digest}/{module}"))
        results[module] = factored(_scaled(plan.rule(updates), plan.scale), rank)
        if progress is not None:
            progress("", len(results), len(table))

    infos = [expert.expert_info for expert in plan.experts]
    parents = sorted({(part.expert.name, part.digest) for part in plan.parts})
    info = ExpertInfo(
        expert_name=plan.name if name is None else name,
        expert_task_name=tuple(sorted({task for info in infos for task in info.tasks})) or None,
        parents=tuple(parent for parent, _ in parents),
        parent_digests=tuple(digest for _, digest in parents),
        expert_config=_peft_config(results, infos),
        training_config=plan.recipe
        | {
            "report": _report(results, missing),
            "versions": {tool: version(tool) for tool in ("torch", "mttl-routing")},
        },
        recipe_digest=recipe_digest(plan.recipe),
        **{field: _common(infos, field) for field in _INHERITED},
    )
    return Expert(info, _peft_weights(results))


def _renamed(expert: Expert, name: str) -> Expert:
    return replace(expert, expert_info=replace(expert.expert_info, expert_name=name))


# What the result has where all experts that know it agree.
_INHERITED = (
    "expert_model",
    "model_revision",
    "model_architecture",
    "model_fingerprint",
    "tokenizer_digest",
    "template_digest",
    "licence",
)


def _common(infos: Sequence[ExpertInfo], field: str) -> Any:
    values = {getattr(info, field) for info in infos} - {None}
    if field == "expert_model" and values:
        return min(values)  # several are names of one base, as check_one_base found
    return values.pop() if len(values) == 1 else None


def _scaled(update: LowRank | Tensor, scale: float) -> LowRank | Tensor:
    if scale == 1.0:
        return update
    return update._replace(b=update.b * scale) if isinstance(update, LowRank) else update * scale


def _check_finite(expert: Expert, module: str, factors: LoraFactors) -> None:
    if not (is_finite(factors.a) and is_finite(factors.b)):
        raise UnsupportedAdapterError(
            f"expert {expert.name!r} has NaN or infinite numbers in module {module!r}; leave it out"
        )


def _peft_weights(results: Mapping[str, Factored]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for module, result in results.items():
        weights[f"base_model.model.{module}.lora_A.weight"] = result.a.contiguous()
        weights[f"base_model.model.{module}.lora_B.weight"] = result.b.contiguous()
    return weights


def _peft_config(results: Mapping[str, Factored], infos: Sequence[ExpertInfo]) -> dict[str, Any]:
    """A PEFT LoRA config under which every module has its own rank and scaling 1."""
    ranks = {module: result.rank for module, result in results.items()}
    rank = max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0]
    pattern = {_key(module, ranks): own for module, own in ranks.items() if own != rank}
    configs = [info.expert_config or {} for info in infos]
    task_types = {config.get("task_type") for config in configs}
    return {
        "peft_type": "LORA",
        "task_type": task_types.pop() if len(task_types) == 1 else None,
        "base_model_name_or_path": _common(infos, "expert_model"),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
    }


def _key(module: str, modules: Mapping[str, int]) -> str:
    """Pattern for ``module`` alone, by PEFT's rule: a regular expression for a path's end."""
    if [m for m in modules if re.match(rf"(.*\.)?({module})$", m)] == [module]:
        return module
    return f"^{re.escape(module)}"


def _report(results: Mapping[str, Factored], missing: Mapping[str, list[str]]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "missing_means_zero": {name: missing[name] for name in sorted(missing)},
        "energy_kept": 1.0,
    }
    total = sum(result.energy or 0.0 for result in results.values())
    if total > 0.0:
        report["energy_kept"] = 1.0 - sum(r.energy_lost for r in results.values()) / total
        report["modules"] = {
            module: {"rank": r.rank, "energy": r.energy, "energy_lost": r.energy_lost}
            for module, r in results.items()
        }
    return report
