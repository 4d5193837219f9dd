"""An expert's ΔW added to the weights of a base checkpoint, shard by shard.

For merges that are no small LoRA, and for tools that read whole models only. Works on safetensors
folders as transformers saves them; the base is never built.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mttl_experts import Expert, IncompatibleExpertError, LoraFactors, lora_modules

Progress = Callable[[str, int, int | None], object]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def merge_into_checkpoint(
    expert: Expert,
    checkpoint: str | Path,
    destination: str | Path,
    *,
    progress: Progress | None = None,
) -> Path:
    """A copy of a checkpoint's folder in which an expert's ΔW is part of the weights.

    Sums are made in float32 and rounded once, to each weight's own dtype. One shard is in work at a
    time, and the folder appears when it is whole. Other files, such as the tokenizer's, are copied;
    weights in other formats, which would be the base's still, are not.

    Args:
        expert: any LoRA expert, such as ``merge`` gives.
        checkpoint: folder with ``model.safetensors``, or with shards and their index.
        destination: folder to make; it must not be there yet.
        progress: told of each shard: "", how many are written, and how many there are.

    Returns:
        The folder that was made.

    Raises:
        IncompatibleExpertError: the checkpoint has no such weight, or it is of another shape, or
            quantised. Nothing is written then.
    """
    source, target = Path(checkpoint), Path(destination)
    if target.exists():
        raise FileExistsError(f"{str(target)!r} is there already; name a new folder")
    modules = lora_modules(expert)
    shards = _shards(source)
    _check(expert.name, modules, source, shards)
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS:
                shutil.copyfile(path, part / path.name)
        for number, shard in enumerate(shards, 1):
            _write(source / shard, part / shard, modules)
            if progress is not None:
                progress("", number, len(shards))
        part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return target


def _shards(folder: Path) -> list[str]:
    if (folder / _INDEX).is_file():
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        return sorted(set(index["weight_map"].values()))
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    raise FileNotFoundError(
        f"{str(folder)!r} has no {_SINGLE} and no {_INDEX}; save the base there with "
        "save_pretrained"
    )


def _check(name: str, modules: Mapping[str, LoraFactors], folder: Path, shards: list[str]) -> None:
    """Refuse before anything is written."""
    missing = set(modules)
    for shard in shards:
        with safe_open(folder / shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                module = key.removesuffix(".weight")
                if module == key or module not in modules:
                    continue
                missing.discard(module)
                header = file.get_slice(key)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                wanted = _shape(modules[module])
                if shape != wanted or dtype not in ("F64", "F32", "F16", "BF16"):
                    raise IncompatibleExpertError(
                        f"weight {key!r} of {str(folder)!r} is {shape} {dtype}, expert {name!r} "
                        f"has {wanted} for it; take its own base, not quantised"
                    )
    if missing:
        raise IncompatibleExpertError(
            f"{str(folder)!r} has no weight of module {min(missing)!r}, which expert {name!r} "
            f"adapts ({len(missing)} such of {len(modules)}); take its own base"
        )


def _shape(factors: LoraFactors) -> tuple[int, int]:
    shape = (int(factors.b.shape[0]), int(factors.a.shape[1]))
    return shape[::-1] if factors.fan_in_fan_out else shape


def _write(source: Path, target: Path, modules: Mapping[str, LoraFactors]) -> None:
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for key, weight in tensors.items():
        factors = modules.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if factors is not None:
            delta = (factors.b.float() * factors.scaling) @ factors.a.float()
            delta = delta.T if factors.fan_in_fan_out else delta
            tensors[key] = (weight.float() + delta).to(weight.dtype)
    save_file(tensors, target, metadata)
