"""A LoRA as one GGUF file, in the layout that llama.cpp loads with ``--lora``.

Each adapted tensor ``blk.N.attn_q.weight`` has factors ``….lora_a`` (r, i) and ``….lora_b`` (o, r)
beside it, and llama.cpp adds ``adapter.lora.alpha / r`` times their product. What a module's own
scaling is beyond that (rsLoRA, patterns) goes into its B. Rows are where llama.cpp has them, which
for the query and key projections of Llama is not where transformers has them.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mttl_experts.errors import IncompatibleExpertError, UnsupportedAdapterError
from mttl_experts.expert import Expert
from mttl_experts.spectral import LoraFactors, lora_modules


@dataclass(frozen=True)
class _Architecture:
    name: str  # in gguf.MODEL_ARCH
    permuted: bool = False  # whether llama.cpp orders the rows of q and k by pairs


# By the class in a base's config.json. Others may need their tensors taken apart; those that are
# not here are refused.
ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture("LLAMA", permuted=True),
    "MistralForCausalLM": _Architecture("LLAMA", permuted=True),
    "Qwen2ForCausalLM": _Architecture("QWEN2"),
    "Qwen3ForCausalLM": _Architecture("QWEN3"),
    "PhiForCausalLM": _Architecture("PHI2"),
    "Phi3ForCausalLM": _Architecture("PHI3"),
    "GemmaForCausalLM": _Architecture("GEMMA"),
    "Gemma2ForCausalLM": _Architecture("GEMMA2"),
    "Gemma3ForCausalLM": _Architecture("GEMMA3"),
}


def export_gguf(expert: Expert, base_config: Mapping[str, Any], path: Path) -> None:
    """Write a LoRA expert as a GGUF file, in float32, in place of one that is there.

    Args:
        expert: a plain LoRA; rsLoRA and patterns are folded into B.
        base_config: ``config.json`` of its base.
        path: of the file; folders are made.

    Raises:
        UnsupportedAdapterError: naming what has no place in such a file: another kind of adapter,
            a base that is not in ``ARCHITECTURES``, or a module without a tensor in llama.cpp.
        IncompatibleExpertError: when its queries or keys do not fit the base.
    """
    import gguf

    modules = lora_modules(expert)
    architecture = _architecture(expert.name, base_config)
    arch = gguf.MODEL_ARCH[architecture.name]
    blocks = int(base_config["num_hidden_layers"])
    names = gguf.get_tensor_name_map(arch, blocks)
    tensors: dict[str, tuple[LoraFactors, Tensor]] = {}
    for module, factors in modules.items():
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None or (name == "output.weight" and base_config.get("tie_word_embeddings")):
            raise UnsupportedAdapterError(
                f"expert {expert.name!r} adapts {module!r}, which has no tensor of its own in "
                f"llama.cpp's {architecture.name} with {blocks} blocks"
            )
        tensors[name] = (factors, _rows(architecture, base_config, module, factors.b.float()))
    alpha = _alpha(list(modules.values()))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[arch])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(expert.name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, (factors, b) in sorted(tensors.items()):
            beyond = factors.scaling * factors.rank / alpha
            writer.add_tensor(f"{name}.lora_a", _float32(factors.a.float()))
            writer.add_tensor(f"{name}.lora_b", _float32(b if beyond == 1.0 else b * beyond))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        Path(beside).chmod(0o644)
        Path(beside).replace(path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _architecture(name: str, config: Mapping[str, Any]) -> _Architecture:
    classes = config.get("architectures") or [None]
    found = ARCHITECTURES.get(classes[0])
    if found is None:
        raise UnsupportedAdapterError(
            f"expert {name!r} is for a base of class {classes[0]!r}; GGUF files are written for "
            f"{', '.join(ARCHITECTURES)}"
        )
    return found


def _alpha(modules: list[LoraFactors]) -> float:
    """The alpha that most modules have exactly; never 0, which llama.cpp takes for "no scaling"."""
    alphas = Counter(factors.scaling * factors.rank for factors in modules)
    alpha = float(np.float32(max(alphas, key=lambda each: (alphas[each], each))))
    return alpha or 1.0


def _rows(architecture: _Architecture, config: Mapping[str, Any], module: str, b: Tensor) -> Tensor:
    """B with its rows in llama.cpp's order: pairs that rotate together, not halves of a head."""
    leaf = module.rpartition(".")[2]
    if not architecture.permuted or leaf not in ("q_proj", "k_proj"):
        return b
    queries = int(config["num_attention_heads"])
    size = int(config.get("head_dim") or int(config["hidden_size"]) // queries)
    heads = queries if leaf == "q_proj" else int(config.get("num_key_value_heads") or queries)
    if b.shape[0] != heads * size:
        raise IncompatibleExpertError(
            f"the expert changes {b.shape[0]} rows of {module!r}, and the base has {heads} heads "
            f"of {size} there; it was made for another base"
        )
    halves = b.reshape(heads, 2, size // 2, b.shape[1])
    return halves.transpose(1, 2).reshape(b.shape)


def _float32(tensor: Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.numpy())
