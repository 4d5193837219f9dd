"""Experts of other kinds as LoRA experts, by the change that they make to the base's weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mttl_experts import Expert, UnsupportedAdapterError, lora_modules
from mttl_routing.attachment import base_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mttl_adapters.base_models import BaseModel

# Singular values below this share of the largest are rounding, in float32 arithmetic.
_ROUNDING = 1e-6


def as_lora(
    expert: Expert,
    base_model: BaseModel | PreTrainedModel,
    *,
    rank: int | None = None,
    tolerance: float = 0.0,
) -> Expert:
    """A LoRA expert that changes the base's weights as an expert of another kind does.

    Each adapted module is merged by PEFT, one at a time on a float32 copy of it, and the change of
    its weight is factored by a singular value decomposition.

    Args:
        expert: of a kind that PEFT can merge into linear layers: LoHa, LoKr, IA3, DoRA, OFT, ...
        base_model: the base that it was made for; it is left as it was.
        rank: most ranks to keep in a module; None is as many as the tolerance asks for.
        tolerance: share of ‖ΔW‖ that a module may lose; at 0 nothing but rounding is lost.

    Returns:
        An expert of the same name, task and base. Its ``training_config["conversion"]`` says the
        kind it was of and, by module, the share of ‖ΔW‖ that was lost.

    Raises:
        UnsupportedAdapterError: the kind changes something else than weights of linear layers.
    """
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind = str((expert.expert_info.expert_config or {}).get("peft_type"))
    weights: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    lost: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="mttl-") as place:
        for file, content in expert.files().items():
            Path(place, file).write_bytes(content)
        # On another skeleton with the same tensors, so that the base keeps its own modules.
        base = base_of(base_model).model
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
        adapted = peft.PeftModel.from_pretrained(copy.deepcopy(base, shared), place)
    if adapted.active_peft_config.is_prompt_learning:
        raise UnsupportedAdapterError(_refusal(expert.name, kind, "it changes no weights"))
    for path, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            delta = _delta(expert.name, kind, path, module)
            a, b, lost[path] = _factored(delta, rank, tolerance)
            weights[f"base_model.model.{path}.lora_A.weight"] = a
            weights[f"base_model.model.{path}.lora_B.weight"] = b
            ranks[path] = a.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": (expert.expert_info.expert_config or {}).get("task_type"),
        "r": 1,
        "lora_alpha": 1,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks),
        "target_modules": sorted(ranks),
        "bias": "none",
    }
    training = dict(expert.expert_info.training_config or {})
    training["conversion"] = {"kind": kind, "digest": expert.digest, "lost": lost}
    info = replace(expert.expert_info, expert_config=config, training_config=training)
    return Expert(info, weights)


def as_loras(
    experts: Sequence[Expert], base_model: BaseModel | PreTrainedModel, tolerance: float = 0.0
) -> list[Expert]:
    """The same experts, those that are no plain LoRA converted by :func:`as_lora`."""
    converted = []
    for expert in experts:
        try:
            lora_modules(expert)
        except UnsupportedAdapterError:
            expert = as_lora(expert, base_model, tolerance=tolerance)
        converted.append(expert)
    return converted


@torch.no_grad()
def _delta(name: str, kind: str, path: str, module: Any) -> Tensor:
    """(o, i) float32, by what merging changes in a copy of a module."""
    layer = copy.deepcopy(module).float().cpu()
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
        what = f"{path!r} is a {type(base).__name__}, and only plain linear layers are converted"
        raise UnsupportedAdapterError(_refusal(name, kind, what))
    weight, bias = base.weight.clone(), None if base.bias is None else base.bias.clone()
    try:
        layer.merge(safe_merge=True)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError) as error:
        raise UnsupportedAdapterError(
            _refusal(name, kind, f"PEFT cannot merge it into {path!r} ({error})")
        ) from error
    merged = layer.get_base_layer()
    if bias is not None and not torch.equal(merged.bias, bias):
        raise UnsupportedAdapterError(_refusal(name, kind, f"it changes the bias of {path!r}"))
    delta: Tensor = merged.weight - weight
    return delta


def _factored(delta: Tensor, rank: int | None, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """A (r, i), B (o, r), and the share of the norm that is not in them."""
    u, sigma, v = torch.linalg.svd(delta.double(), full_matrices=False)
    total = float(sigma.norm())
    left = sigma.square().flip(0).cumsum(0).flip(0).sqrt()  # what each rank and later ones hold
    kept = max(
        1, int((sigma > _ROUNDING * sigma[0]).sum().minimum((left > tolerance * total).sum()))
    )
    kept = kept if rank is None else min(kept, rank)
    lost = float(sigma[kept:].norm()) / total if total else 0.0
    root = sigma[:kept].sqrt()
    a, b = root[:, None] * v[:kept], u[:, :kept] * root
    return a.float().contiguous(), b.float().contiguous(), lost


def _refusal(name: str, kind: str, why: str) -> str:
    return f"expert {name!r} of kind {kind!r} cannot become a LoRA: {why}"
