"""Generated experts of SmolLM2-135M's shapes or others, for the benchmarks beside it."""

from typing import Any

from shapes import SMOLLM2, Shapes

HIDDEN, INTERMEDIATE = SMOLLM2.hidden, SMOLLM2.intermediate
SHAPES = SMOLLM2.linears
# Experts that one commit takes; their bytes are in memory until it is made.
TOGETHER = 64


def make_library(
    folder: str, count: int, rank: int, layers: int, dtype: Any = None, shapes: Shapes = SMOLLM2
) -> int:
    """Generated experts on all linear modules, in float32 or a dtype; how many bytes they take."""
    import torch

    from mttl_experts import Expert, ExpertInfo, ExpertLibrary

    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.split(".")[1] for name in shapes.linears),
        "bias": "none",
    }
    library, size = ExpertLibrary(f"local://{folder}", create=True), 0
    for start in range(0, count, TOGETHER):
        with library.batch():
            for number in range(start, min(start + TOGETHER, count)):
                weights = _weights(number, rank, layers, dtype or torch.float32, shapes)
                size += sum(tensor.nbytes for tensor in weights.values())
                info = ExpertInfo(f"e{number:03d}", expert_config=config, expert_model="bench/base")
                library.add_expert(Expert(info, weights))
    return size


def _weights(seed: int, rank: int, layers: int, dtype: Any, shapes: Shapes) -> dict[str, Any]:
    import torch

    generator, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(layers):
        for name, (out_features, in_features) in shapes.linears.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                tensor = torch.randn(shape, generator=generator) * 0.02
                weights[f"{key}.lora_{part}.weight"] = tensor.to(dtype)
    return weights
