"""What routing adds to the seven linears of a layer: `uv run benchmarks/kernels.py`.

Prints one JSON line a row. Everything is timed interleaved in one process, and nothing is reported
unless the outputs agree with a float64 sum over the chosen experts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, SMOLLM2, Shapes
from torch import Tensor

from mttl_adapters import Bank, Chosen, Keys, kernels, top_k

RANK, ROWS, TOKENS = 16, 8, 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Group:
    """Linears of one input, and the experts of each."""

    x: Tensor
    weights: list[Tensor]
    banks: list[Bank]
    keys: Keys


def build(experts: int, tokens: int, dtype: torch.dtype, device: str, model: Shapes) -> list[Group]:
    """Four groups of linears with experts, and inputs of them."""
    groups = []
    for shapes in model.groups:
        i = shapes[0][0]
        banks = [
            Bank.from_factors(
                [
                    (torch.randn(RANK, i) / i**0.5, torch.randn(o, RANK) / 4, 1.0)
                    for _ in range(experts)
                ],
                dtype=dtype,
            )
            for _, o in shapes
        ]
        keys = [torch.nn.functional.normalize(torch.randn(experts, i), dim=1) for _ in shapes]
        groups.append(
            Group(
                torch.randn(tokens, i).to(device, dtype),
                [(torch.randn(o, i) / i**0.5).to(device, dtype) for _, o in shapes],
                [bank.to(device) for bank in banks],
                Keys(keys).to(device),
            )
        )
    return groups


def base(groups: list[Group]) -> list[Tensor]:
    """What the linears alone give."""
    return [group.x @ weight.T for group in groups for weight in group.weights]


def routed(groups: list[Group], k: int) -> list[Tensor]:
    """The linears, and for each token its k best experts."""
    outputs = []
    for group in groups:
        best = top_k(group.x, group.keys, k, absolute=True)
        for weight, bank, (values, indices) in zip(group.weights, group.banks, best, strict=True):
            chosen = Chosen(indices, values.softmax(dim=1))
            outputs.append(bank.add_to(group.x @ weight.T, group.x, chosen))
    return outputs


def named(groups: list[Group], chosen: Chosen) -> list[Tensor]:
    """The linears, and for each row its adapter."""
    return [
        bank.add_to(group.x @ weight.T, group.x, chosen)
        for group in groups
        for weight, bank in zip(group.weights, group.banks, strict=True)
    ]


def reference(groups: list[Group], k: int, chosen: Chosen | None, lines: slice) -> list[Tensor]:
    """Some lines in float64: full scores, then one sum over the chosen."""
    outputs = []
    for group in groups:
        x = group.x[lines].double()
        for weight, bank, keys in zip(group.weights, group.banks, group.keys.sets, strict=True):
            if chosen is None:
                top = (x @ keys.double().T).abs().topk(k, dim=1)
                gates = x.new_zeros(len(x), len(bank))
                gates.scatter_(1, top.indices, top.values.softmax(dim=1))
            else:
                gates = chosen.dense(len(bank))[lines].double()
            hidden = (x @ bank.a.double().T) * gates.repeat_interleave(RANK, dim=1)
            outputs.append(x @ weight.double().T + hidden @ bank.b.double().T)
    return outputs


def check(found: list[Tensor], expected: list[Tensor], lines: slice, tolerance: float) -> float:
    """Largest error relative to the norm of the output; more than ``tolerance`` ends the run."""
    worst = 0.0
    for some, right in zip(found, expected, strict=True):
        worst = max(worst, float((some[lines].double() - right).norm() / right.norm()))
    if worst > tolerance:
        raise SystemExit(f"outputs differ by {worst:.2e} of their norm; nothing is reported")
    return worst


def floors(
    experts: int,
    k: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    logits: bool,
    distinct: float | None = None,
    head: int = 0,
    model: Shapes = SMOLLM2,
    rows: int = ROWS,
) -> dict[str, float]:
    """Multiply-adds and bytes of weights, of the base and of what comes on top of it.

    The exact logits count in full, at half the cost where bfloat16 may screen a float32 layer.

    Args:
        experts: in each layer.
        k: experts a token gets.
        tokens: of the input.
        dtype: of base and experts.
        logits: whether tokens are compared with the experts, or told theirs by name.
        distinct: experts that some token chose, in a layer; by chance, where it was not counted.
        head: weights of the base for each layer beside its linears: the language head's share.
        model: sizes of the base.
        rows: of the batch.
    """
    shapes = [shape for group in model.groups for shape in group]
    base_flops = sum(i * o for i, o in shapes) + head
    added = sum(k * RANK * (i + o) for i, o in shapes)
    scores = sum(experts * i for i, _ in shapes) if logits else 0
    if distinct is None:
        distinct = experts * (1 - (1 - k / experts) ** tokens) if logits else min(experts, rows)
    moved = distinct * RANK * sum(i + o for i, o in shapes) * dtype.itemsize + 2 * scores
    screen = 0.5 if dtype == torch.float32 else 1.0
    return {
        "flop_floor": round(1 + (added + scores * screen) / base_flops, 3),
        "traffic_floor": round(1 + moved / (base_flops * dtype.itemsize), 3),
        "distinct_experts": round(distinct, 1),
    }


def wait() -> None:
    """Until the GPU, if there is one in use, has done all that it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def interleaved(
    systems: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, list[float]]:
    """Seconds of every run of each system, in turns."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for run in systems.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["base"]) < 3:
        for name, run in systems.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            times[name].append(time.perf_counter() - start)
    return times


def peak_mb(run: Callable[[], object], device: str) -> float:
    """How far one run raises the process's memory (Linux), or the GPU's, above what is held."""
    run()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        wait()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator kept of earlier runs
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def extra_mb(run: Callable[[], object], plain: Callable[[], object], device: str) -> float:
    """Peak of one run beyond that of the linears alone."""
    return round(peak_mb(run, device) - peak_mb(plain, device), 1)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def measured(
    experts: int,
    *,
    k: int,
    tokens: int,
    dtype: torch.dtype,
    by_name: bool,
    layers: int,
    seconds: float,
    model: Shapes = SMOLLM2,
    rows: int = ROWS,
    device: str = DEVICE,
) -> Iterator[dict[str, Any]]:
    """A row for the linears alone, and one for each kernel that adds experts to them."""
    groups = [
        group for _ in range(layers) for group in build(experts, tokens, dtype, device, model)
    ]
    chosen = None
    if by_name:
        own = torch.arange(rows, device=device) % experts
        chosen, k = Chosen.for_rows(own, tokens // rows), 1
    lines, tolerance = slice(0, 64), 1e-5 if dtype == torch.float32 else 6e-3
    expected = reference(groups, k, chosen, lines)
    found: dict[str, Callable[[], list[Tensor]]] = {"base": lambda: base(groups)}
    memory, wrong = {"base": 0.0}, {"base": 0.0}
    best = "triton" if device == "cuda" else "cpu"
    reason = kernels.no_triton(torch.device(device)) if device == "cuda" else kernels.missing()
    names = ["torch"] if reason else [best, "torch"]
    for name in names:

        def with_kernel(name: str = name) -> list[Tensor]:
            with kernels.using(name):
                return routed(groups, k) if chosen is None else named(groups, chosen)

        found[name] = with_kernel
        memory[name] = extra_mb(with_kernel, found["base"], device)
        wrong[name] = check(with_kernel(), expected, lines, tolerance)
    times = interleaved(found, seconds)
    for name in found:
        ratios = [a / b for a, b in zip(times[name], times["base"], strict=True)]
        yield {
            "base": "linears of a layer",
            "system": {"base": "base", "torch": "mttl, plain torch"}.get(name, "mttl"),
            "experts": experts,
            "top_k": k,
            "dtype": str(dtype).removeprefix("torch."),
            "what": "named" if by_name else "routed",
            "tokens": tokens,
            "layers": layers,
            "median_ms": round(statistics.median(times[name]) * 1e3, 3),
            "ratio": round(statistics.median(ratios), 3),
            "extra_mb": memory[name],
            "error": float(f"{wrong[name]:.1e}"),
            **floors(experts, k, tokens, dtype, logits=not by_name, model=model, rows=rows),
            "rounds": len(ratios),
            "device": device_name(device),
            "threads": torch.get_num_threads(),
        }


def device_name(device: str) -> str:
    """What the rows were measured on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in info if "model name" in line), "cpu")
    bf16 = any(line.startswith("flags") and "avx512_bf16" in line for line in info)
    return f"{name}, AVX512-bf16" if bf16 else name


def main() -> None:
    """Read the options and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=DEVICE)
    parser.add_argument("--decode", action="store_true", help="One token a row, not 256.")
    parser.add_argument("--named", action="store_true", help="Named adapters, one a row.")
    parser.add_argument(
        "--layers",
        type=int,
        help="Layers in a run; 1, or 4 with --decode, so that no cache holds all weights.",
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="For each number of experts.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = SHAPES[options.shapes]
    rows = model.decode_rows if options.decode else ROWS
    for experts in options.experts:
        with torch.inference_mode():
            for row in measured(
                experts,
                k=options.top_k,
                tokens=rows * (1 if options.decode else TOKENS),
                dtype=getattr(torch, options.dtype),
                by_name=options.named,
                layers=options.layers or (4 if options.decode else 1),
                seconds=options.seconds,
                model=model,
                rows=rows,
                device=options.device,
            ):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
