"""Arrow prototypes of many experts of SmolLM2-135M's shapes, against PEFT's, on this machine.

    uv run benchmarks/prototypes.py [--experts 256] [--rank 16] [--layers 30] [--no-peer]

Each row is one JSON line. Ours reads the experts' factors from files mapped into memory; so many
distinct ones are on disk, and they are read in turn. ``error`` is the most by which ‖ΔW v‖ falls
short of ‖ΔW‖, over modules of one expert, ``misaligned`` the largest 1-|cos| to the singular vector
in float64. PEFT's is timed on the modules of one expert and scaled up, with the power iterations
that it makes by default.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from generated import make_library


def errors(expert: Any, prototypes: Any, modules: int = 14) -> tuple[float, float]:
    """How much less than ‖ΔW‖ a prototype is amplified, and 1-|cos| to the singular vector."""
    import torch

    from mttl_experts import lora_modules

    short, misaligned = 0.0, 0.0
    for path, f in list(lora_modules(expert).items())[:modules]:
        delta = f.scaling * f.b.double() @ f.a.double()
        _, sigma, vh = torch.linalg.svd(delta, full_matrices=False)
        v = prototypes[path].double()
        short = max(short, 1 - float((delta @ v).norm() / v.norm() / sigma[0]))
        misaligned = max(misaligned, 1 - abs(float(v @ vh[0]) / float(v.norm())))
    return short, misaligned


def run_ours(folder: str, experts: int, distinct: int) -> dict[str, Any]:
    """Prototypes of all experts, as the router's build makes them; then of a library, kept."""
    from mttl_experts import ExpertLibrary
    from mttl_routing.routers import arrow_prototypes
    from mttl_routing.routers.arrow import prototypes_of

    library = ExpertLibrary(f"local://{folder}")
    found = list(library.values())
    made = {}
    began = time.perf_counter()
    for number in range(experts):
        expert = found[number % distinct]
        made[expert.name] = arrow_prototypes(expert)
    seconds = time.perf_counter() - began
    short, misaligned = errors(found[0], made[found[0].name])
    began = time.perf_counter()
    prototypes_of(found, library)
    with_keeping = time.perf_counter() - began
    began = time.perf_counter()
    prototypes_of(found, ExpertLibrary(f"local://{folder}"))
    again = time.perf_counter() - began
    size = sum(entry.size for entry in library.artifacts.entries())
    return {
        "system": "mttl",
        "experts": experts,
        "distinct": distinct,
        "seconds": round(seconds, 2),
        "error": short,
        "misaligned": misaligned,
        "distinct_made_and_kept_s": round(with_keeping, 2),
        "distinct_found_again_s": round(again, 2),
        "kept_mb_each": round(size / distinct / 1e6, 3),
    }


def run_peft(folder: str, experts: int) -> dict[str, Any]:
    """PEFT's power iterations on the modules of one expert, as its Arrow layer calls them."""
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    from mttl_experts import ExpertLibrary, lora_modules

    expert = next(iter(ExpertLibrary(f"local://{folder}").values()))
    layer = SimpleNamespace(rng_seed=0)
    prototypes = {}
    began = time.perf_counter()
    for path, f in lora_modules(expert).items():
        prototypes[path] = ArrowLoraLinearLayer.top_right_singular_vec_from_BA(layer, f.a, f.b)
    seconds = time.perf_counter() - began
    short, misaligned = errors(expert, prototypes)
    return {
        "system": "peft",
        "experts": experts,
        "seconds": round(seconds * experts, 2),
        "error": short,
        "misaligned": misaligned,
    }


def main() -> None:
    """Make the experts, time both, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--distinct", type=int, default=16, help="Experts on disk.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--no-peer", action="store_true", help="Leave PEFT out.")
    options = parser.parse_args()
    distinct = min(options.distinct, options.experts)
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place, "library"))
        make_library(folder, distinct, options.rank, options.layers)
        shape = {"rank": options.rank, "layers": options.layers}
        rows = [run_ours(folder, options.experts, distinct)]
        if not options.no_peer:
            rows.append(run_peft(folder, options.experts))
        for row in rows:
            print(json.dumps(row | shape))


if __name__ == "__main__":
    main()
