"""What routing adds to a transformers model: prefill, decode, by name.

    uv run benchmarks/routing.py [--experts 256] [--top-k 2] [--dtype bfloat16]
        [--decode | --named] [--no-peers] [--library FOLDER] [--shapes 7b] [--device cuda]

A row is one JSON line: median milliseconds, the median of the ratios to the base of the same round,
the peak of memory over the base's, the row's own floors by multiply-adds and by bytes of weights,
and the distinct experts of a layer in a step. Everything runs in turns in one process. There are
two bases: the whole forward with its head, and the linears of a layer alone. On a GPU times are of
the host, from an idle GPU to an idle GPU, and the memory is what torch allocated at its peak.

Nothing is reported where outputs differ. Ours must agree with a plain Arrow that computes every
expert for every token in a loop: in the logits, and in bfloat16, whose rounding in one layer sends
tokens elsewhere in the next, in each layer by its own input. PEFT's Arrow must agree with ours over
the same experts by PEFT's own prototypes, and PEFT's mixed batch with ours. PEFT computes every
expert for every token, so its Arrow has as many as ``--peer-experts``, and its row says how many.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generated import make_library
from kernels import (
    DEVICE,
    RANK,
    ROWS,
    TOKENS,
    device_name,
    extra_mb,
    floors,
    interleaved,
    measured,
)
from shapes import SHAPES, SMOLLM2, Shapes
from torch import Tensor, nn

from mttl_adapters import kernels
from mttl_experts import ExpertLibrary, lora_modules
from mttl_routing import RoutedModel, Task
from mttl_routing.routers import Arrow, Choice, arrow_prototypes

VOCABULARY, PROMPT = SMOLLM2.vocabulary, 64
Run = Callable[[], Any]


def make_base(
    layers: int, dtype: torch.dtype, shapes: Shapes = SMOLLM2, device: str = DEVICE
) -> Any:
    """A Llama of those shapes with random weights, the same each time."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(shapes.config(layers))
    return model.to(dtype).eval().requires_grad_(False)


def open_library(folder: Path, options: argparse.Namespace) -> ExpertLibrary:
    """The first experts of the generated library in a folder, made unless it is there."""
    experts, layers, shapes = options.experts, options.layers, SHAPES[options.shapes]
    if not any(folder.iterdir()):
        # Of a large model in the dtype that is measured: in float32 it would be twice as long.
        dtype = getattr(torch, options.dtype) if options.shapes == "7b" else None
        make_library(str(folder), experts, RANK, layers, dtype, shapes)
    library = ExpertLibrary(f"local://{folder}")
    names = library.keys()
    found = lora_modules(library[names[0]])
    modules = len(found)
    features = max(each.a.shape[1] for each in found.values())
    if len(names) < experts or modules != 7 * layers or features != shapes.intermediate:
        raise SystemExit(
            f"{folder} has {len(names)} experts of {modules} modules of up to {features} features, "
            f"not {experts} of {7 * layers} and {shapes.intermediate}; give another --library"
        )
    return ExpertLibrary(f"local://{folder}", selection=names[:experts])


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


class PlainArrow:
    """Scores of all experts in float32, and those chosen added up in a loop: what is right."""

    def __init__(self, library: ExpertLibrary, top_k: int, dtype: torch.dtype) -> None:
        """Factors as a model that keeps them in ``dtype`` has them."""
        experts = list(library.values())
        self.top_k, self.dtype = top_k, dtype
        self.vectors = [arrow_prototypes(expert) for expert in experts]
        self.factors = [lora_modules(expert) for expert in experts]

    def output(self, path: str, x: Tensor, of_base: Tensor) -> Tensor:
        """A layer's output, of its input (t, i) and the base's output (t, o)."""
        x = x.float()
        scores = (x @ torch.stack([each[path] for each in self.vectors]).to(x.device).T).abs()
        best = scores.topk(self.top_k, dim=1)
        gates = torch.zeros_like(scores).scatter(1, best.indices, best.values.softmax(dim=1))
        added = torch.zeros_like(of_base, dtype=torch.float32)
        for index in best.indices.unique().tolist():
            own = self.factors[index]
            parts = (own[path].a, own[path].b)
            a, b = (part.to(x.device, self.dtype).float() for part in parts)
            added += gates[:, index, None] * own[path].scaling * (x @ a.T @ b.T)
        return (of_base + added).to(of_base.dtype)

    def logits(self, base: Any, ids: Tensor) -> Tensor:
        """Of a base without experts."""

        def hook(path: str, _: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            flat = self.output(path, args[0].flatten(0, -2), output.flatten(0, -2))
            return flat.view(output.shape)

        with self._on_layers(base, hook):
            logits: Tensor = base(input_ids=ids, use_cache=False).logits
        return logits

    def worst_layer(self, routed: Any, ids: Tensor) -> float:
        """Largest error of a layer of a routed model by its norm, each from its own input.

        For bfloat16, whose rounding in one layer sends tokens elsewhere in the next ones.
        """
        errors = []

        def hook(path: str, module: Any, args: tuple[Tensor], output: Tensor) -> None:
            x = args[0].flatten(0, -2)
            of_base = nn.functional.linear(x.float(), module.weight.float())
            right = self.output(path, x, of_base)
            errors.append(float((output.flatten(0, -2) - right).norm() / right.norm()))

        with self._on_layers(routed.model, hook):
            routed(input_ids=ids)
        return max(errors)

    def _on_layers(self, model: Any, hook: Callable[..., Any]) -> ExitStack:
        modules, stack = dict(model.named_modules()), ExitStack()
        for path in self.factors[0]:
            stack.callback(modules[path].register_forward_hook(partial(hook, path)).remove)
        return stack


def difference(found: Tensor, expected: Tensor) -> float:
    """By the norm."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def check(error: float, tolerance: float, what: str) -> float:
    """The error; it ends the run where it is too large."""
    if not error <= tolerance:
        raise SystemExit(
            f"{what}: outputs differ by {error:.2e} of their norm; nothing is reported"
        )
    return error


def on_torch(run: Run) -> Run:
    """The same without the compiled kernel."""

    def plain() -> Any:
        with kernels.using("torch"):
            return run()

    return plain


def distinct_experts(routed: RoutedModel, run: Run) -> float:
    """Experts that some token of one run chose, in the mean over the layers."""
    with routed.trace() as trace:
        run()
    chosen = [sum(share > 0 for share in layer.values()) for layer in trace.shares().values()]
    return statistics.mean(chosen)


class Bench:
    """The systems of one command line, built and checked; ``rows`` times them."""

    def __init__(self, library: ExpertLibrary, options: argparse.Namespace) -> None:
        """Build every system, and end the run where one is wrong."""
        self.options = options
        self.dtype = getattr(torch, options.dtype)
        self.shapes = SHAPES[options.shapes]
        length = PROMPT if options.decode else TOKENS
        self.ids = torch.randint(self.shapes.vocabulary, (options.rows, length))
        self.ids = self.ids.to(options.device)
        self.library = library
        self.names = library.keys()[: options.rows]
        self.systems: dict[str, Run] = {"base": self._run(self._base())}
        self.errors: dict[str, float] = {"base": 0.0}
        self.experts: dict[str, int] = {"base": 0}
        self._ours()
        if not options.no_peers:
            self._peer_named() if options.named else self._peer_arrow()

    def rows(self) -> list[dict[str, Any]]:
        """Time all systems in turns: one row each."""
        options = self.options
        times = interleaved(self.systems, options.seconds)
        tokens = options.rows * (1 if options.decode else TOKENS)
        rows = []
        for name, run in self.systems.items():
            ratios = [own / base for own, base in zip(times[name], times["base"], strict=True)]
            experts = self.experts[name]
            own = floors(
                max(1, experts), 1 if options.named else options.top_k, tokens, self.dtype,
                logits=not options.named,
                head=self.shapes.hidden * self.shapes.vocabulary // options.layers,
                model=self.shapes, rows=options.rows,
                distinct=self.distinct if name.startswith("mttl") else None,
            )  # fmt: skip
            rows.append({
                "base": "forward",
                "system": name,
                "experts": experts,
                "top_k": 1 if options.named else options.top_k,
                "dtype": options.dtype,
                "what": ("decode" if options.decode else "prefill")
                + (", named" if options.named else ""),
                "shapes": options.shapes,
                "layers": options.layers,
                "rows": options.rows,
                "median_ms": round(1e3 * statistics.median(times[name]), 1),
                "ratio": round(statistics.median(ratios), 3),
                "extra_mb": extra_mb(run, self.systems["base"], options.device),
                "error": float(f"{self.errors[name]:.1e}"),
                **(own if experts else {}),
                "rounds": len(ratios),
                "device": device_name(options.device),
                "threads": torch.get_num_threads(),
            })  # fmt: skip
        return rows

    def _base(self) -> Any:
        options = self.options
        return make_base(options.layers, self.dtype, self.shapes, options.device)

    def _run(self, model: Any, **given: Any) -> Run:
        return forward_of(model, self.ids, self.options.decode, **given)

    def _ours(self) -> None:
        options, given = self.options, {}
        router: Any = "arrow"
        if options.named:
            router = Task({name: (name,) for name in self.library})
            given["task_names"] = self.names
        routed = RoutedModel.from_library(
            self.library, router, options.top_k, base_model=self._base(), dtype=self.dtype
        )
        run = self._run(routed, **given)
        self.distinct = distinct_experts(routed, run)
        self.systems |= {"mttl": run, "mttl, plain torch": on_torch(run)}
        self.experts |= dict.fromkeys(("mttl", "mttl, plain torch"), options.experts)
        if not options.named:
            self._check_ours(routed)

    def _check_ours(self, routed: RoutedModel) -> None:
        plain = PlainArrow(self.library, self.options.top_k, self.dtype)
        some, exact = self.ids[:1, :16], self.dtype == torch.float32
        expected = plain.logits(self._base(), some) if exact else None
        for name, kernel in (("mttl", "auto"), ("mttl, plain torch", "torch")):
            with kernels.using(kernel):
                if expected is not None:
                    error = difference(routed(input_ids=some).logits, expected)
                else:
                    error = plain.worst_layer(routed, some)
            self.errors[name] = check(error, 1e-4 if exact else 6e-3, name)

    def _peer_arrow(self) -> None:
        """PEFT's Arrow over some of the experts, and ours over the same, by PEFT's prototypes."""
        from peft.tuners.lora import ArrowConfig, create_arrow_model

        options = self.options
        names = self.library.keys()[: min(options.peer_experts, options.experts)]
        system = f"peft arrow, {len(names)} experts"
        paths = [str(self.library.path(name)) for name in names]
        peer = create_arrow_model(self._base(), paths, ArrowConfig(top_k=options.top_k)).eval()
        some = self.ids[:1, :16]
        expected = peer(input_ids=some).logits  # the first forward computes the prototypes
        vectors: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for path, module in peer.named_modules():
            arrow = getattr(module, "lora_arrow", {})
            if "arrow_router" in arrow:
                rows = arrow["arrow_router"].prototypes.float().cpu()
                for name, row in zip(names, rows, strict=True):
                    vectors[name][path.removeprefix("base_model.model.")] = row
        few = RoutedModel.from_experts(
            [self.library[name] for name in names], Arrow(vectors, Choice(options.top_k)),
            base_model=self._base(), dtype=self.dtype,
        )  # fmt: skip
        error = difference(few(input_ids=some).logits, expected)
        self.errors[system] = check(error, 5e-2, system)
        self.systems[system], self.experts[system] = self._run(peer), len(names)

    def _peer_named(self) -> None:
        """PEFT's mixed batch over as many experts as there are rows."""
        from peft import PeftModel

        system = "peft mixed batch"
        first, *others = self.names
        peer = PeftModel.from_pretrained(
            self._base(), str(self.library.path(first)), adapter_name=first
        )
        for name in others:
            peer.load_adapter(str(self.library.path(name)), adapter_name=name)
        run = self._run(peer.eval(), adapter_names=self.names)
        expected = run()
        tolerance = 1e-4 if self.dtype == torch.float32 else 5e-2
        for name in ("mttl", "mttl, plain torch"):
            self.errors[name] = check(difference(self.systems[name](), expected), tolerance, name)
        self.errors[system] = 0.0
        self.systems[system], self.experts[system] = run, len(self.names)


def linears(options: argparse.Namespace) -> list[Mapping[str, Any]]:
    """The rows of the linears alone."""
    return list(
        measured(
            options.experts,
            k=options.top_k,
            tokens=options.rows * (1 if options.decode else TOKENS),
            dtype=getattr(torch, options.dtype),
            by_name=options.named,
            layers=4 if options.decode else 1,
            seconds=min(8.0, options.seconds),
            model=SHAPES[options.shapes],
            rows=options.rows,
            device=options.device,
        )
    )


def main() -> None:
    """Read the options, build every system, check them, time them, and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--shapes", choices=SHAPES, default="smollm2-135m", help="Of the base.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default=DEVICE)
    parser.add_argument("--layers", type=int, help="Of the base; 30, and 4 of a 7b.")
    parser.add_argument("--rows", type=int, help="Of the batch; 8, and 32 in decode of a 7b.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--decode", action="store_true", help="One token a row, after 64.")
    parser.add_argument("--named", action="store_true", help="An expert for each row, by name.")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peer-experts", type=int, default=4, help="Of PEFT's Arrow.")
    parser.add_argument("--library", type=Path, help="Folder that keeps as many experts or more.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    shapes = SHAPES[options.shapes]
    options.layers = options.layers or shapes.layers
    options.rows = options.rows or (shapes.decode_rows if options.decode else ROWS)
    if options.named and options.no_peers:
        parser.error("--named is compared with PEFT's mixed batch; leave out --no-peers")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    torch.set_num_threads(options.threads)
    if options.library:
        options.library.mkdir(parents=True, exist_ok=True)
    kept = nullcontext(options.library) if options.library else tempfile.TemporaryDirectory()
    with kept as folder, torch.inference_mode():
        library = open_library(Path(folder), options)
        for row in (*linears(options), *Bench(library, options).rows()):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
