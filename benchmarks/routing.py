"""What routing adds to a whole forward of a transformers model of SmolLM2-135M's shapes.

    uv run benchmarks/routing.py [--experts 256] [--top-k 2] [--decode | --named] [--no-peers]

Base is the forward of the whole model with its head; ``benchmarks/kernels.py`` has the linears of
a layer alone. All systems are timed in turns in one process, each with a base of its own, and a
row is one JSON line: median milliseconds, the median of the ratios to the base of the same round,
and the peak of memory over that of the base's forward. Nothing is reported unless the logits agree
with a plain version of Arrow that computes every expert for every token. ``--named`` is a batch in
which every row has an expert of its own, told by name. PEFT computes every expert for every token,
so its rows are for as many experts as ``--peer-experts``.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from generated import HIDDEN, INTERMEDIATE, make_library
from kernels import extra_mb, floors, interleaved
from torch import Tensor, nn

from mttl_adapters import kernels
from mttl_experts import ExpertLibrary, lora_modules
from mttl_routing import RoutedModel, Task
from mttl_routing.routers import arrow_prototypes

VOCABULARY, ROWS, TOKENS, RANK = 49152, 8, 256, 16
Run = Callable[[], Any]


def make_base(layers: int, dtype: torch.dtype) -> Any:
    """A Llama of those shapes with random weights, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)


def forward_of(model: Any, ids: Tensor, decode: bool, **given: Any) -> Run:
    """One forward: of all tokens, or of one new token a row after those, which a cache holds."""
    if not decode:
        return lambda: model(input_ids=ids, use_cache=False, **given).logits
    cache = model(input_ids=ids, use_cache=True, **given).past_key_values

    def step() -> Tensor:
        logits: Tensor = model(input_ids=ids[:, -1:], past_key_values=cache, **given).logits
        cache.crop(-1)
        return logits

    return step


def plain_arrow(base: Any, library: ExpertLibrary, top_k: int, ids: Tensor) -> Tensor:
    """Logits by hooks that score all experts in float32 and add up those chosen, in a loop."""
    experts = list(library.values())
    vectors = [arrow_prototypes(expert) for expert in experts]
    factors = [lora_modules(expert) for expert in experts]
    modules = dict(base.named_modules())

    def hook(path: str, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        x = args[0].flatten(0, -2).float()
        scores = (x @ torch.stack([each[path] for each in vectors]).T).abs()
        best = scores.topk(top_k, dim=1)
        gates = torch.zeros_like(scores).scatter(1, best.indices, best.values.softmax(dim=1))
        added = torch.zeros(len(x), output.shape[-1])
        for index, own in enumerate(factors):
            f = own[path]
            added += gates[:, index, None] * f.scaling * (x @ f.a.float().T @ f.b.float().T)
        return (output + added.view(output.shape)).to(output.dtype)

    with ExitStack() as stack:
        for path in factors[0]:
            handle = modules[path].register_forward_hook(partial(hook, path))
            stack.callback(handle.remove)
        logits: Tensor = base(input_ids=ids, use_cache=False).logits
    return logits


def check(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """End the run where logits differ."""
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not error <= tolerance:
        raise SystemExit(f"logits differ by {error:.2e} of their norm; nothing is reported")


def on_torch(run: Run) -> Run:
    """The same without the compiled kernel."""

    def plain() -> Any:
        with kernels.using("torch"):
            return run()

    return plain


def peft_arrow(library: ExpertLibrary, count: int, top_k: int, base: Any) -> Any:
    """PEFT's Arrow over some of the experts."""
    from peft.tuners.lora import ArrowConfig, create_arrow_model

    paths = [str(library.path(name)) for name in library.keys()[:count]]
    return create_arrow_model(base, paths, ArrowConfig(top_k=top_k)).eval()


def peft_named(library: ExpertLibrary, base: Any) -> Any:
    """PEFT's mixed batch over as many experts as there are rows."""
    from peft import PeftModel

    names = library.keys()[:ROWS]
    model = PeftModel.from_pretrained(base, str(library.path(names[0])), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(library.path(name)), adapter_name=name)
    return model.eval()


def main() -> None:
    """Read the options, build every system, check them, time them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--decode", action="store_true", help="One token a row, after 64.")
    parser.add_argument("--named", action="store_true", help="An expert for each row, by name.")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peer-experts", type=int, default=4, help="Of PEFT's Arrow.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        make_library(folder, options.experts, RANK, options.layers)
        measure(ExpertLibrary(f"local://{folder}"), options)


def measure(library: ExpertLibrary, options: argparse.Namespace) -> None:
    """Build every system, check them, time them in turns, and print their rows."""
    dtype = getattr(torch, options.dtype)
    ids = torch.randint(VOCABULARY, (ROWS, 64 if options.decode else TOKENS))
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    make = partial(make_base, options.layers, dtype)
    router = Task({name: (name,) for name in library}) if options.named else "arrow"
    routed = RoutedModel.from_library(
        library, router, options.top_k, base_model=make(), dtype=dtype
    )
    given: dict[str, Any] = {}
    if options.named:
        given["task_names"] = library.keys()[:ROWS]
    else:
        some = ids[:1, :16]
        expected = plain_arrow(make(), library, options.top_k, some)
        check(routed(input_ids=some).logits, expected, tolerance)
    ours = forward_of(routed, ids, options.decode, **given)
    systems = {
        "base": forward_of(make(), ids, options.decode),
        "mttl": ours,
        "mttl, plain torch": on_torch(ours),
    }
    if not options.no_peers and options.named:
        peer = peft_named(library, make())
        names = library.keys()[:ROWS]
        systems["peft mixed batch"] = forward_of(peer, ids, options.decode, adapter_names=names)
        check(ours(), systems["peft mixed batch"](), tolerance)
    elif not options.no_peers:
        count = min(options.peer_experts, options.experts)
        peer = peft_arrow(library, count, options.top_k, make())
        systems[f"peft arrow, {count} experts"] = forward_of(peer, ids, options.decode)
    times = interleaved(systems, options.seconds)
    layer = floors(
        options.experts, options.top_k, ROWS * (1 if options.decode else TOKENS), dtype,
        not options.named,
    )  # fmt: skip
    linears = options.layers * HIDDEN * (2 * HIDDEN + 2 * 192 + 3 * INTERMEDIATE)
    share = linears / (linears + HIDDEN * VOCABULARY)
    for name, run in systems.items():
        ratios = [own / base for own, base in zip(times[name], times["base"], strict=True)]
        row = {
            "system": name,
            "experts": options.experts,
            "top_k": options.top_k,
            "dtype": options.dtype,
            "layers": options.layers,
            "what": "decode" if options.decode else "prefill",
            "median_ms": round(1e3 * statistics.median(times[name]), 1),
            "ratio": round(statistics.median(ratios), 3),
            "extra_mb": extra_mb(run, systems["base"]),
            "flop_floor": round(1 + (layer["flop_floor"] - 1) * share, 3),
            "traffic_floor": round(1 + (layer["traffic_floor"] - 1) * share, 3),
            "distinct_experts": layer["distinct_experts"],
            "rounds": len(ratios),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
