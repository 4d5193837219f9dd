"""What a LoRA expert is as mathematics: its factors, its spectral form, its inner products.

ΔW = s·B·A is never formed here, and nothing here depends on how it was split into A and B. Routing,
merging, clustering and search all start from these. Adapters that are more than ΔW are refused by
name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mttl_experts.errors import UnsupportedAdapterError
from mttl_experts.expert import Expert

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])\.weight")

# Config options under which the expert is not the linear map s·B·A on the base's own weights.
_REFUSED_OPTIONS = {
    "use_dora": "DoRA rescales the merged weight, so it is no ΔW of its own",
    "lora_bias": "B has a bias",
    "modules_to_save": "whole modules are trained beside the LoRA factors",
    "trainable_token_indices": "token embeddings are trained beside the LoRA factors",
    "target_parameters": "stacked parameters are adapted, not linear modules",
    "layer_replication": "the base's layers are replicated",
    "alora_invocation_tokens": "activated LoRA acts on a part of the tokens only",
    "use_qalora": "QALoRA pools its inputs",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it is a router over other adapters",
    "kasa_config": "KaSA changes the base and has a diagonal between A and B",
}
# Initialisations that change the base's weights, so that ΔW is against those changed ones.
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """One module's LoRA: the output changes by ``scaling * b @ a @ x``.

    Attributes:
        a: (r, i), as stored.
        b: (o, r), as stored.
        scaling: alpha/r, or alpha/√r for rsLoRA, with the module's own alpha and r.
        fan_in_fan_out: whether the base keeps this module's weight as (i, o), as GPT-2's Conv1D
            does. ΔW is (o, i) all the same; transpose it before adding it to such a weight.
    """

    a: Tensor
    b: Tensor
    scaling: float
    fan_in_fan_out: bool = False

    @property
    def rank(self) -> int:
        """Rows of ``a``, which ΔW's rank does not exceed."""
        return int(self.a.shape[0])


class SpectralForm(NamedTuple):
    """ΔW as ``u @ diag(sigma) @ v.T``, k being the least of r, i and o.

    Attributes:
        u: (o, k) float32, orthonormal columns.
        sigma: (k,) float32, not negative, falling.
        v: (i, k) float32, orthonormal columns.
    """

    u: Tensor
    sigma: Tensor
    v: Tensor


def lora_modules(expert: Expert) -> dict[str, LoraFactors]:
    """LoRA factors of each module that an expert adapts, by module path, sorted.

    Paths are those of the base model, such as ``model.layers.0.self_attn.q_proj``. The tensors are
    the expert's own, not copies.

    Raises:
        UnsupportedAdapterError: naming what makes the expert more, or other, than a plain LoRA, or
            in what its weights and its config do not fit each other.
    """
    name, config = expert.name, expert.expert_info.expert_config
    if expert.expert_weights is None or config is None:
        raise UnsupportedAdapterError(
            f"expert {name!r} has no weights yet, so there is nothing to compute from"
        )
    _refuse_options(name, config)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in expert.expert_weights.items():
        match = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            raise UnsupportedAdapterError(_unknown_tensor(name, key))
        if tensor.ndim != 2:
            raise UnsupportedAdapterError(
                f"expert {name!r}: {key!r} has shape {tuple(tensor.shape)}; only LoRA on linear "
                "modules, with two axes, is supported here"
            )
        found.setdefault(match["module"], {})[match["which"]] = tensor
    if not found:
        raise UnsupportedAdapterError(
            f"expert {name!r} has no LoRA factors, so it would attach to nothing"
        )
    return {module: _factors(name, config, module, found[module]) for module in sorted(found)}


def _refuse_options(name: str, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedAdapterError(
            f"expert {name!r} is of kind {kind!r}; its ΔW is known for 'LORA' alone"
        )
    for option, reason in _REFUSED_OPTIONS.items():
        if config.get(option):
            raise UnsupportedAdapterError(
                f"expert {name!r} has {option}={config[option]!r}: {reason}; not supported here"
            )
    bias = config.get("bias") or "none"
    if bias != "none":
        raise UnsupportedAdapterError(
            f"expert {name!r} has bias={bias!r}: the base's biases change too; not supported here"
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REFUSED_INITS):
        raise UnsupportedAdapterError(
            f"expert {name!r} has init_lora_weights={init!r}, which changes the base's weights; "
            "save it with PEFT's path_initial_model_for_weight_conversion first"
        )


def _unknown_tensor(name: str, key: str) -> str:
    if "lora_magnitude_vector" in key:
        what = "a DoRA magnitude"
    elif key.endswith(".bias"):
        what = "a bias"
    elif "lora_embedding_" in key:
        what = "LoRA on an embedding"
    else:
        what = "no LoRA factor (modules_to_save, or another kind of adapter)"
    return f"expert {name!r}: {key!r} is {what}; not supported here"


def _factors(
    name: str, config: Mapping[str, Any], module: str, tensors: dict[str, Tensor]
) -> LoraFactors:
    if tensors.keys() != {"A", "B"}:
        missing = "B" if "A" in tensors else "A"
        raise UnsupportedAdapterError(f"expert {name!r}: module {module!r} lacks lora_{missing}")
    a, b = tensors["A"], tensors["B"]
    rank = _setting(name, config, "rank_pattern", "r", module)
    alpha = _setting(name, config, "alpha_pattern", "lora_alpha", module)
    if rank < 1 or a.shape[0] != rank or b.shape[1] != rank:
        raise UnsupportedAdapterError(
            f"expert {name!r}: module {module!r} has A {tuple(a.shape)} and B {tuple(b.shape)}, "
            f"but its config says rank {rank!r}"
        )
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraFactors(a, b, float(scaling), bool(config.get("fan_in_fan_out")))


def _setting(
    name: str, config: Mapping[str, Any], pattern: str, default: str, module: str
) -> int | float:
    """The module's own value by PEFT's rule: a pattern matches the end of a path, from a dot on."""
    try:
        values = {
            value
            for key, value in (config.get(pattern) or {}).items()
            if re.match(rf"(.*\.)?({key})$", module)
        }
    except re.error as error:
        raise UnsupportedAdapterError(
            f"expert {name!r}: a key of {pattern} is no regular expression: {error}"
        ) from error
    if len(values) > 1:
        # PEFT takes the first key, but it sorts the keys when it saves, so "first" is not kept.
        raise UnsupportedAdapterError(
            f"expert {name!r}: several keys of {pattern} match module {module!r} with different "
            f"values {sorted(values)}; give each module one"
        )
    value = values.pop() if values else config.get(default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise UnsupportedAdapterError(
            f"expert {name!r}: {default} is {value!r} for module {module!r}; it takes a number"
        )
    return value


def spectral_form(a: Tensor, b: Tensor, scaling: float = 1.0) -> SpectralForm:
    """Singular value decomposition of ``scaling * b @ a``, from two thin QRs and one (r, r) SVD.

    Signs are chosen so that the largest entry of each column of ``v`` is positive, which makes the
    result the same from run to run; they mean nothing else.

    Args:
        a: (r, i), any float dtype.
        b: (o, r).
        scaling: of either sign.
    """
    q_a, r_a = torch.linalg.qr(a.float().T)  # (i, ka), (ka, r)
    q_b, r_b = torch.linalg.qr(b.float())  # (o, kb), (kb, r)
    core = scaling * (r_b @ r_a.T)  # (kb, ka)
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    v = q_a @ vh.T  # (i, k)
    peak = v.gather(0, v.abs().argmax(dim=0, keepdim=True))  # (1, k)
    sign = torch.where(peak < 0, -1.0, 1.0)
    return SpectralForm(q_b @ u * sign, sigma, v * sign)


def spectral_forms(expert: Expert) -> dict[str, SpectralForm]:
    """Spectral form of each module that a LoRA expert adapts, by module path, sorted."""
    forms = {}
    for module, factors in lora_modules(expert).items():
        if not (factors.a.isfinite().all() and factors.b.isfinite().all()):
            raise ValueError(
                f"expert {expert.name!r}: module {module!r} has a weight that is NaN or infinite"
            )
        forms[module] = spectral_form(factors.a, factors.b, factors.scaling)
    return forms


def inner_product(
    one: Expert | Mapping[str, LoraFactors], other: Expert | Mapping[str, LoraFactors]
) -> float:
    """⟨ΔW_1, ΔW_2⟩: the sum, over the modules both adapt, of the entrywise product of their ΔW.

    The same for every way to factor them. A module that one of them does not adapt has ΔW 0 there.

    Args:
        one: an expert, or its ``lora_modules`` where many products are wanted.
        other: likewise.
    """
    first = lora_modules(one) if isinstance(one, Expert) else one
    second = lora_modules(other) if isinstance(other, Expert) else other
    total = 0.0
    for module in sorted(first.keys() & second.keys()):
        f, g = first[module], second[module]
        if f.a.shape[1] != g.a.shape[1] or f.b.shape[0] != g.b.shape[0]:
            raise ValueError(
                f"module {module!r} is ({f.b.shape[0]}, {f.a.shape[1]}) in one expert and "
                f"({g.b.shape[0]}, {g.a.shape[1]}) in the other; they have different bases"
            )
        # tr((A_2 A_1ᵀ)(B_1ᵀ B_2)) as the entrywise product of two small matrices
        inputs = f.a.double() @ g.a.double().T  # (r1, r2)
        outputs = f.b.double().T @ g.b.double()  # (r1, r2)
        total += f.scaling * g.scaling * float((inputs * outputs).sum())
    return total


def distance(one: LoraFactors | None, other: LoraFactors | None) -> float:
    """‖ΔW_1 - ΔW_2‖, Frobenius, of one module; None stands for ΔW 0. Neither is formed.

    From thin QRs of the stacked factors, so that two near ones lose no digits to cancellation.
    """
    parts = [(f, sign) for f, sign in ((one, 1.0), (other, -1.0)) if f is not None]
    if not parts:
        return 0.0
    a = torch.cat([f.a.double() for f, _ in parts])  # (r1 + r2, i)
    b = torch.cat([sign * f.scaling * f.b.double() for f, sign in parts], dim=1)  # (o, r1 + r2)
    core = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
    return float(torch.linalg.matrix_norm(core))


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """Angles in radians, rising, between the spans of two sets of orthonormal columns.

    Small ones are taken from their sines, which keeps them exact
    (https://doi.org/10.1090/S0025-5718-1973-0348991-3).

    Args:
        one: (n, k1).
        other: (n, k2).

    Returns:
        (min(k1, k2),) float64.
    """
    wide, narrow = (one, other) if one.shape[1] >= other.shape[1] else (other, one)
    wide, narrow = wide.double(), narrow.double()
    inside = wide.T @ narrow  # (k_wide, k)
    cosines = torch.linalg.svdvals(inside).clamp(max=1.0)
    sines = torch.linalg.svdvals(narrow - wide @ inside).flip(0)[: len(cosines)].clamp(max=1.0)
    return torch.where(cosines**2 < 0.5, cosines.acos(), sines.asin())
