"""Merge methods against PEFT's on generated experts of SmolLM2-135M's shapes, on this machine.

    uv run benchmarks/merging.py [--experts 8] [--rank 16] [--layers 2] [--methods uniform,ties]

Each row is one JSON line. Ours reads the experts from a library on disk, and so does PEFT from the
same folders; loading counts on both sides. ``extra_mb`` is the peak of memory over what the process
had before, less what the experts' own mapped files take; each contender has a process of its own.
``sha256`` is that of two runs, the second on the experts in reverse.
"""

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HIDDEN, KEY_VALUE, INTERMEDIATE = 576, 192, 1536
OURS = (
    "uniform,ties,dare_linear,dare_ties,della,breadcrumbs,sparse_uniform,linear_factors,multislerp,"
    "tsv,iso,core,knots,compress_then_merge,pico"
)
PEFT = "svd,ties_svd,dare_linear_svd,dare_ties_svd,cat,linear,ties"


def tiny_base(layers: int) -> Any:
    """A Llama of those shapes, with few words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
        )
    )


def make_library(folder: str, count: int, rank: int, layers: int) -> int:
    """Generated experts on all linear modules; how many bytes they take."""
    import torch

    from mttl_experts import Expert, ExpertInfo, ExpertLibrary

    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEY_VALUE, HIDDEN),
        "self_attn.v_proj": (KEY_VALUE, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(name.split(".")[1] for name in shapes),
        "bias": "none",
    }
    library, size = ExpertLibrary(f"local://{folder}", create=True), 0
    with library.batch():
        for number in range(count):
            generator = torch.Generator().manual_seed(number)
            weights = {}
            for layer in range(layers):
                for name, (out_features, in_features) in shapes.items():
                    key = f"base_model.model.model.layers.{layer}.{name}"
                    for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
                        tensor = torch.randn(shape, generator=generator) * 0.02
                        weights[f"{key}.lora_{part}.weight"] = tensor
                        size += tensor.nbytes
            info = ExpertInfo(f"e{number:03d}", expert_config=config, expert_model="bench/base")
            library.add_expert(Expert(info, weights))
    return size


def peak() -> int:
    """Most memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """One method, twice; the first is timed."""
    from mttl_experts import ExpertLibrary
    from mttl_routing import merge

    before = peak()
    began = time.perf_counter()
    library = ExpertLibrary(f"local://{options.library}")
    merged = merge(library, options.method)
    seconds = time.perf_counter() - began
    extra = peak() - before - options.bytes
    digests = [hashlib.sha256(merged.files()["adapter_model.safetensors"]).hexdigest()]
    again = merge(list(library.values())[::-1], options.method)
    digests.append(hashlib.sha256(again.files()["adapter_model.safetensors"]).hexdigest())
    return {
        "seconds": seconds,
        "extra_mb": extra / 1e6,
        "result_mb": sum(w.nbytes for w in (merged.expert_weights or {}).values()) / 1e6,
        "same_bytes": digests[0] == digests[1],
        "sha256": digests[0][:16],
    }


def run_peft(options: argparse.Namespace) -> dict[str, Any]:
    """One of PEFT's combination types, loading included."""
    from peft import PeftModel

    from mttl_experts import ExpertLibrary

    library = ExpertLibrary(f"local://{options.library}")
    folders = {name: library.path(name) for name in library}
    base = tiny_base(options.layers)
    before = peak()
    began = time.perf_counter()
    names = list(folders)
    model = PeftModel.from_pretrained(base, folders[names[0]], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(folders[name], adapter_name=name)
    extra = {"svd_rank": options.rank} if "svd" in options.method else {}
    if "ties" in options.method or "dare" in options.method:
        extra["density"] = 0.2 if "dare" not in options.method else 0.5
    weights = [1.0 / len(names)] * len(names)
    model.add_weighted_adapter(names, weights, "m", combination_type=options.method, **extra)
    return {"seconds": time.perf_counter() - began, "extra_mb": (peak() - before) / 1e6}


def main() -> None:
    """Make the experts, then give each contender a process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--methods", default=OURS, help="Ours, with commas between.")
    parser.add_argument("--peft", default=PEFT, help="PEFT's combination types; '' for none.")
    parser.add_argument("--who", help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.who:
        import transformers

        transformers.logging.set_verbosity_error()
        row = run_ours(options) if options.who == "ours" else run_peft(options)
        print(json.dumps(row))
        return
    with tempfile.TemporaryDirectory() as folder:
        where = str(Path(folder) / "library")
        size = make_library(where, options.experts, options.rank, options.layers)
        plan = [("ours", method) for method in options.methods.split(",") if method]
        plan += [("peft", method) for method in options.peft.split(",") if method]
        for who, method in plan:
            done = subprocess.run(
                [
                    *(sys.executable, __file__, "--who", who, "--method", method),
                    *("--library", where, "--layers", str(options.layers)),
                    *("--rank", str(options.rank), "--bytes", str(size)),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            row = {"who": who, "method": method, "experts": options.experts, "mb": size / 1e6}
            if done.returncode:
                print(json.dumps(row | {"failed": done.stderr.strip().splitlines()[-1]}))
                continue
            row |= json.loads(done.stdout.splitlines()[-1])
            row["seconds_per_gb"] = row["seconds"] / size * 1e9
            figures = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
