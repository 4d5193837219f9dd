"""A base and one expert as one dense checkpoint that transformers loads by itself.

A plain LoRA on a safetensors checkpoint is added tensor by tensor as the checkpoint streams by, so
memory holds one shard. Everything else that PEFT can merge goes through PEFT and the whole model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mttl_experts.errors import IncompatibleExpertError, UnsupportedAdapterError
from mttl_experts.expert import Expert
from mttl_experts.spectral import LoraFactors, lora_modules
from mttl_storage import NotFound

Progress = Callable[[str, int, int | None], object]
RECORD = "merged_from.json"
"""File of the result that names the base and the expert's digest."""
SHARD_BYTES = 2 << 30
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# What is beside the weights and goes along: config, tokenizer, templates.
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*")


def export_dense(
    expert: Expert,
    base: Path,
    dest: Path,
    *,
    base_name: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> bool:
    """Write base and expert as one checkpoint; it is there whole or not at all.

    Args:
        expert: with weights, of any kind that can be merged.
        base: folder of the base model, with its tokenizer.
        dest: folder to make.
        base_name: what to call the base in the record; its id in the expert if not given.
        shard_bytes: most bytes in one file, if one tensor fits.
        progress: told of tensors written.

    Returns:
        False if the very same was there already, and nothing was done.

    Raises:
        UnsupportedAdapterError: when the adapter cannot become part of the weights.
        IncompatibleExpertError: when it does not fit the base.
        FileExistsError: when something else is at ``dest``.
    """
    record = {
        "format": 1,
        "base": base_name or expert.expert_info.expert_model,
        "base_fingerprint": expert.expert_info.model_fingerprint,
        "experts": [{"name": expert.name, "digest": expert.digest, "weight": 1.0}],
    }
    if dest.exists():
        kept = dest / RECORD
        if kept.is_file() and json.loads(kept.read_text()) == record:
            return False
        raise FileExistsError(f"{str(dest)!r} is there already; delete it, or choose another place")
    config = _config(base)
    if config.get("quantization_config"):
        raise UnsupportedAdapterError(
            f"the base in {str(base)!r} is quantised, so nothing can be added to its weights; give "
            "its full-precision original"
        )
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}-") as made:
        folder = Path(made, "model")
        folder.mkdir()
        for pattern in _BESIDE:
            for path in base.glob(pattern):
                if path.name not in (_INDEX, RECORD) and path.is_file():
                    shutil.copyfile(path, folder / path.name)
        plan = _streamable(expert, base)
        if plan is None:
            _through_peft(expert, base, folder, shard_bytes)
        else:
            _stream(*plan, folder, shard_bytes, progress)
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        folder.rename(dest)
    return True


def _config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.is_file():
        raise NotFound(f"{str(base)!r} is no folder of a model: it has no config.json")
    config: dict[str, Any] = json.loads(path.read_text())
    return config


# Streaming.


def _streamable(
    expert: Expert, base: Path
) -> tuple[dict[str, Path], dict[str, LoraFactors]] | None:
    """File of each of the base's tensors, and the factors for some; None if it is not so plain."""
    try:
        modules = lora_modules(expert)
    except UnsupportedAdapterError:
        return None
    if any(factors.fan_in_fan_out for factors in modules.values()):
        return None
    files = _files(base)
    factors = {f"{module}.weight": each for module, each in modules.items()}
    return (files, factors) if files and factors.keys() <= files.keys() else None


def _files(base: Path) -> dict[str, Path]:
    if (base / _INDEX).is_file():
        named = json.loads((base / _INDEX).read_text())["weight_map"]
        return {name: base / file for name, file in named.items()}
    if not (base / _SINGLE).is_file():
        return {}
    with safe_open(base / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), base / _SINGLE)


def _stream(
    files: Mapping[str, Path],
    factors: Mapping[str, LoraFactors],
    folder: Path,
    shard_bytes: int,
    progress: Progress | None,
) -> None:
    with ExitStack() as stack:
        opened: dict[Path, Any] = {
            path: stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(set(files.values()))
        }
        sizes = {name: _size(opened[files[name]].get_slice(name)) for name in sorted(files)}
        shards = list(_shards(sizes, shard_bytes))
        weight_map: dict[str, str] = {}
        done = 0
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            tensors: dict[str, Tensor] = {}
            for name in names:
                if progress is not None:
                    progress("", done, len(files))
                tensor = opened[files[name]].get_tensor(name)
                tensors[name] = _added(name, tensor, factors.get(name))
                done += 1
            file = _SINGLE if len(shards) == 1 else file
            weight_map |= dict.fromkeys(names, file)
            save_file(tensors, folder / file, {"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


_BYTES = {"64": 8, "32": 4, "16": 2}


def _size(tensor: Any) -> int:
    dtype, count = tensor.get_dtype(), 1
    for n in tensor.get_shape():
        count *= n
    return count * next((size for bits, size in _BYTES.items() if bits in dtype), 1)


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > most:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _added(name: str, weight: Tensor, factors: LoraFactors | None) -> Tensor:
    """A weight with ΔW added in float32 and rounded once."""
    if factors is None:
        return weight
    shape = (factors.b.shape[0], factors.a.shape[1])
    if weight.shape != shape or not weight.is_floating_point():
        raise IncompatibleExpertError(
            f"the expert changes {name!r} by a ΔW of shape {shape}, and the base has it as "
            f"{weight.dtype} of shape {tuple(weight.shape)}; it was made for another base"
        )
    delta = factors.scaling * (factors.b.float() @ factors.a.float())
    return (weight.to(torch.promote_types(weight.dtype, torch.float32)) + delta).to(weight.dtype)


# Through PEFT.


def _through_peft(expert: Expert, base: Path, folder: Path, shard_bytes: int) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    with tempfile.TemporaryDirectory(prefix="mttl-") as place:
        for file, content in expert.files().items():
            Path(place, file).write_bytes(content)
        try:
            adapted = peft.PeftModel.from_pretrained(model, place).eval()
        except (ValueError, RuntimeError, KeyError) as error:
            raise IncompatibleExpertError(
                f"expert {expert.name!r} does not fit the base in {str(base)!r}: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
    kind = (expert.expert_info.expert_config or {}).get("peft_type")
    merge = getattr(adapted, "merge_and_unload", None)
    if merge is None or adapted.active_peft_config.is_prompt_learning:
        raise UnsupportedAdapterError(_unmergeable(expert.name, kind))
    _part_tied(adapted)
    try:
        merged = merge(safe_merge=True)
    except (AttributeError, RuntimeError, ValueError) as error:
        raise UnsupportedAdapterError(f"{_unmergeable(expert.name, kind)} ({error})") from error
    _tie_again(merged)
    merged.save_pretrained(folder, max_shard_size=shard_bytes)


def _unmergeable(name: str, kind: object) -> str:
    return f"expert {name!r} is of kind {kind!r}, which cannot become part of a base's weights"


def _part_tied(model: nn.Module) -> None:
    """Give each module its own copy of a weight that it shares, so that one can change alone."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), False))
            seen.add(id(parameter))


def _tie_again(model: Any) -> None:
    """Tie what is still equal; where it is not, say so in the config."""
    if not model.config.tie_word_embeddings:
        return
    into, out = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(into.weight, out.weight):
        out.weight = into.weight
    else:
        model.config.tie_word_embeddings = False
