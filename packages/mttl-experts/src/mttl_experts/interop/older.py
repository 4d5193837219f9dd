"""Libraries of the older format: ``{expert}.meta``, ``{expert}.ckpt`` and ``{expert}.{type}.bin``.

Their LoRA factors are the transposes of PEFT's: ``lora_a`` is (i, r), ``lora_b`` is (r, o).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mttl_experts.errors import UnsupportedAdapterError
from mttl_experts.expert import Expert, ExpertInfo
from mttl_experts.interop.folder import Folder
from mttl_experts.interop.found import Found, FoundExpert, Kept, provenance
from mttl_experts.legacy import read_archive
from mttl_experts.plain import plain
from mttl_storage import Corrupt

_META_LIMIT = 32 << 20
_WEIGHTS_LIMIT = 64 << 30
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[ab])")
# Keys of a .meta that become fields; the others are kept under ``extra``.
_MAPPED = {
    *("expert_name", "expert_task_name", "parent_node", "expert_model", "training_config"),
    *("expert_deleted", "class_name"),
}


def is_older(folder: Folder) -> bool:
    """Whether a folder holds an older library."""
    return any(_is_meta(path) for path in folder.sizes)


def older_experts(folder: Folder, excluded: Collection[str] = ()) -> Found:
    """The experts of an older library, those that were deleted there among them.

    Raises:
        Corrupt: naming the file whose facts cannot be read.
        RefusedFileError: naming the file that holds more than data.
    """
    found = Found(folder)
    names = [path.removesuffix(".meta") for path in folder.sizes if _is_meta(path)]
    kept: dict[str, dict[str, str]] = {name: {} for name in names}
    for path in folder.sizes:
        stem, _, ending = path.rpartition(".")
        owner = _owner(stem, names)
        if "/" in path or ending not in ("ckpt", "bin"):
            if not _is_meta(path) and path != "README.md":
                found.left_out.append(f"{path}: no part of an older library")
        elif ending == "ckpt" and stem not in kept:
            found.left_out.append(f"{path}: it has no {stem}.meta, so its scaling is not known")
        elif ending == "bin" and owner is None:
            found.left_out.append(f"{path}: it belongs to no expert that is there")
        elif ending == "bin" and f"{owner}.ckpt" not in folder.sizes:
            found.left_out.append(f"{path}: the expert {owner!r} has no weights that it came from")
        elif ending == "bin" and owner is not None:
            kept[owner][stem.removeprefix(f"{owner}.")] = path
    for name in sorted(names):
        if name in excluded:
            found.excluded.append(name)
            continue
        found.experts.append(_expert(folder, name, kept[name]))
    return found


def _is_meta(path: str) -> bool:
    return path.endswith(".meta") and "/" not in path


def _owner(stem: str, names: list[str]) -> str | None:
    """The expert whose file ``{expert}.{type}.bin`` is: the longest name that it begins with."""
    return max((name for name in names if stem.startswith(f"{name}.")), key=len, default=None)


def _expert(folder: Folder, name: str, kept: Mapping[str, str]) -> FoundExpert:
    meta, ckpt = f"{name}.meta", f"{name}.ckpt"
    where = f"{meta!r} in {folder.address}"
    facts = read_archive(folder.read(meta, _META_LIMIT), f"{meta} in {folder.address}")
    if not isinstance(facts, dict) or facts.get("expert_name") != name:
        called = facts.get("expert_name") if isinstance(facts, dict) else facts
        raise Corrupt(f"{where} cannot be read: it says it is of the expert {called!r}")
    deleted = facts.get("expert_deleted") or False
    if not isinstance(deleted, bool):
        raise Corrupt(f"{where} cannot be read: expert_deleted is {deleted!r}")
    if ckpt not in folder.sizes and not deleted:
        raise Corrupt(f"{where} has no {ckpt!r} beside it; the library is damaged")

    def read() -> Expert:
        if ckpt not in folder.sizes:
            return Expert(_info(folder, where, facts, None))
        weights = read_archive(folder.read(ckpt, _WEIGHTS_LIMIT), f"{ckpt} in {folder.address}")
        config, tensors = _lora(f"{ckpt!r} in {folder.address}", facts, weights)
        return Expert(_info(folder, where, facts, config), tensors)

    def read_kept() -> list[Kept]:
        return [part for each, path in sorted(kept.items()) for part in _kept(folder, each, path)]

    _info(folder, where, facts, None)  # so that what is wrong with the facts shows now
    kind = _class(facts.get("expert_config"))
    paths = [path for path in (meta, ckpt, *kept.values()) if path in folder.sizes]
    size = sum(folder.sizes[path] for path in paths)
    return FoundExpert(name, f"older {kind}", folder.address, size, read, read_kept, deleted)


def _class(config: Any) -> str:
    named = config.get("class_name") if isinstance(config, dict) else None
    return str(named).rpartition(".")[2] if named else "LoRAConfig"


def _info(
    folder: Folder, where: str, facts: Mapping[str, Any], config: dict[str, Any] | None
) -> ExpertInfo:
    """The facts as an ExpertInfo; what has no field there is kept word for word."""
    tasks: Any = facts.get("expert_task_name")
    if isinstance(tasks, str) and "," in tasks:
        tasks = [task.strip() for task in tasks.split(",") if task.strip()]
    training = facts.get("training_config")
    model = facts.get("expert_model")
    if model is None and isinstance(training, dict):
        model = training.get("model")
    others = {key: value for key, value in facts.items() if key not in _MAPPED}
    try:
        return ExpertInfo(
            expert_name=facts["expert_name"],
            expert_task_name=tasks or None,
            parent_node=facts.get("parent_node"),
            expert_model=model,
            expert_config=config,
            training_config=training,
            extra=dict(provenance(folder, "older", facts=plain(others))),
        )
    except (TypeError, ValueError) as error:
        raise Corrupt(f"{where} cannot be read: {error}") from None


def _lora(
    where: str, facts: Mapping[str, Any], weights: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors of an older LoRA; the same values bit for bit."""
    older = facts.get("expert_config")
    kind = _class(older)
    if kind != "LoRAConfig" or not isinstance(older, dict):
        raise UnsupportedAdapterError(
            f"{where} is of kind {kind!r}, which has no counterpart in PEFT; leave the expert out"
        )
    rank, alpha = older.get("lora_rank"), older.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise Corrupt(f"{where} is a LoRA of rank {rank!r} and alpha {alpha!r} by its .meta")
    if not isinstance(weights, dict) or not weights:
        raise Corrupt(f"{where} holds no tensors by name")
    tensors: dict[str, Tensor] = {}
    factors: dict[str, set[str]] = {}
    for key, tensor in weights.items():
        match = _FACTOR.fullmatch(str(key))
        if match is None or not isinstance(tensor, Tensor) or tensor.ndim != 2:
            raise UnsupportedAdapterError(
                f"{where} has {key!r}, which is no factor of a LoRA on a linear module; leave the "
                "expert out"
            )
        module, which = match["module"], match["which"]
        if tensor.shape[1 if which == "a" else 0] != rank:
            raise Corrupt(
                f"{where} has {key!r} of shape {tuple(tensor.shape)}, but its .meta says rank "
                f"{rank}"
            )
        factors.setdefault(module, set()).add(which)
        name = f"base_model.model.{module}.lora_{which.upper()}.weight"
        tensors[name] = tensor.T.contiguous()
    for module, which_ones in factors.items():
        if which_ones != {"a", "b"}:
            raise Corrupt(f"{where} has lora_{which_ones.pop()} alone for {module!r}")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": older.get("lora_dropout") or 0.0,
        "target_modules": sorted(factors),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }, tensors


def _kept(folder: Folder, kind: str, path: str) -> Iterator[Kept]:
    """What a ``.bin`` holds: its tensors, and what else is in it, each under its recipe."""
    where = f"{path} in {folder.address}"
    value = read_archive(folder.read(path, _WEIGHTS_LIMIT), where)
    wrapped = isinstance(value, dict) and {*value} == {"data", "config"}
    data, config = (value["data"], value["config"]) if wrapped else (value, None)
    tensors: dict[str, Tensor] = {}
    rest = _without_tensors(data, "data", tensors)
    try:
        recipe = {"kind": f"older:{kind}", "version": 1, "config": plain(config, "config")}
        if tensors:
            yield Kept(recipe, tensors)
        if rest is not None:
            yield Kept(recipe | {"part": "plain"} if tensors else recipe, plain(rest, "data"))
    except (TypeError, ValueError) as error:
        raise Corrupt(f"{where} cannot be kept: {error}") from None


def _without_tensors(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """Move tensors and arrays out of a value, by their path; None if nothing else is left."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        tensors[where] = value
        return None
    if isinstance(value, dict):
        parts = {
            str(key): _without_tensors(p, f"{where}/{key}", tensors) for key, p in value.items()
        }
    elif isinstance(value, (list, tuple)):
        listed = [_without_tensors(p, f"{where}/{n}", tensors) for n, p in enumerate(value)]
        return listed if any(part is not None for part in listed) or not listed else None
    else:
        return value
    return parts if any(part is not None for part in parts.values()) or not parts else None
