"""How fast a library of 10,000 experts answers once it is indexed, and how well the sketch chooses.

    uv run benchmarks/search.py [text] [candidates] [rerank] [recall]

Each row is one JSON line; seconds are medians over the queries, by the clock, and of the processor.

- text: TF-IDF over 10,000 experts with names, tasks, tags and a card of 40 words.
- candidates: the best 50 of 10,000 experts by their sketches.
- rerank: a whole search by likeness, exact on the best 50, in a library of experts with
  SmolLM2-135M's shapes at rank 16: on all linear modules, and on q_proj and v_proj alone.
- recall: the exact 10 nearest that are among the 50 candidates, and among the sketch's own 10, for
  3,000 experts in noisy clusters of 1 to 200 (cosine to the centre 0.2 to 0.9), by sketch width.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from generated import SHAPES

from mttl_experts import Expert, ExpertInfo, ExpertLibrary, LoraFactors, lora_modules
from mttl_experts.search import sketch
from mttl_experts.search.index import SketchIndex

Shapes = dict[str, tuple[int, int]]
TINY: Shapes = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(4)
    for module, shape in {"q_proj": (48, 48), "v_proj": (16, 48), "down_proj": (48, 96)}.items()
}
SMOL: Shapes = {
    f"model.layers.{layer}.{module}": shape
    for layer in range(30)
    for module, shape in SHAPES.items()
}
QUERY_VALUE = {k: s for k, s in SMOL.items() if k.endswith(("q_proj", "v_proj"))}


def report(**row: Any) -> None:
    """Print one row."""
    print(json.dumps(row), flush=True)


def median_seconds(action: Callable[[Any], Any], queries: list[Any]) -> dict[str, float]:
    """Median time of an action over its queries."""
    wall, processor = [], []
    for query in queries:
        began, busy = time.perf_counter(), time.process_time()
        action(query)
        wall.append(time.perf_counter() - began)
        processor.append(time.process_time() - busy)
    return {
        "seconds": round(statistics.median(wall), 4),
        "cpu_seconds": round(statistics.median(processor), 4),
    }


def lora(shapes: Shapes, rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random factors, the ΔW of all modules being about as large."""
    weights = {}
    for path, (o, i) in shapes.items():
        prefix = f"base_model.model.{path}"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(rank, i, generator=generator) / i**0.5
        b = torch.randn(o, rank, generator=generator) / (o * rank) ** 0.5
        weights[f"{prefix}.lora_B.weight"] = b
    return weights


def expert(name: str, weights: dict[str, torch.Tensor], rank: int) -> Expert:
    """An expert with these factors and a scaling of 1."""
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    return Expert(ExpertInfo(name, f"task {name}", expert_config=config), weights)


def clusters(shapes: Shapes, rank: int, count: int, seed: int = 0) -> Iterator[Expert]:
    """Experts around centres, each a mixture of its centre and of noise, half of the rank each."""
    generator = torch.Generator().manual_seed(seed)
    chance, number = random.Random(seed), 0
    while True:
        centre = lora(shapes, rank // 2, generator)
        for _ in range(min(200, int(2 / chance.uniform(0.005, 1)))):
            if number == count:
                return
            share = chance.uniform(0.2, 0.9)
            noise = lora(shapes, rank // 2, generator)
            mixed = {}
            for key, tensor in centre.items():
                if ".lora_A." in key:
                    mixed[key] = torch.cat([tensor, noise[key]])
                else:
                    parts = [share * tensor, (1 - share**2) ** 0.5 * noise[key]]
                    mixed[key] = torch.cat(parts, 1)
            yield expert(f"e{number:05d}", mixed, rank)
            number += 1


def fill(library: ExpertLibrary, experts: Iterator[Expert]) -> float:
    """Add experts in one commit."""
    with library.batch():
        for each in experts:
            library.add_expert(each)


def text(count: int, queries: int) -> None:
    """Words."""
    chance = random.Random(0)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(chance.choices(syllables, k=chance.randint(1, 4))) for _ in range(20_000)]
    rank = [1 / (1 + number) for number in range(len(words))]  # as words of a language are spread
    library = ExpertLibrary("virtual://bench-text", create=True)

    def described() -> Iterator[Expert]:
        for number in range(count):
            card = " ".join(chance.choices(words, rank, k=40))
            task = "_".join(chance.choices(words, k=3))
            tags = tuple(chance.choices(words[:200], k=2))
            name = f"{task}-{number}"
            yield Expert(ExpertInfo(name, task, tags=tags, extra={"description": card}))

    fill(library, described())
    began = time.perf_counter()
    library.search("warm")
    indexed = time.perf_counter() - began
    asked = [" ".join(chance.choices(words, rank, k=3)) for _ in range(queries)]
    times = median_seconds(library.search, asked)
    report(what="text", experts=count, index_seconds=round(indexed, 2), **times)


def candidates(count: int, queries: int, folder: Path) -> None:
    """Sketches."""
    library = ExpertLibrary(f"local://{folder}/tiny", create=True)
    fill(library, clusters(TINY, 4, count))
    began = time.perf_counter()
    library.search.like("e00000")
    indexed = time.perf_counter() - began
    opened = ExpertLibrary(library.uri)
    began = time.perf_counter()
    opened.search.like("e00000")
    first = time.perf_counter() - began
    chosen = random.Random(0).sample(opened.keys(), queries)
    rows = [sketch(lora_modules(opened[name])) for name in chosen]
    index = SketchIndex(opened)
    index.update({each.digest: each for each in opened.values()})
    report(
        what="candidates",
        experts=count,
        index_seconds=round(indexed, 2),
        first_search_after_opening_seconds=round(first, 2),
        **median_seconds(lambda row: index.nearest(row, 50), rows),
    )
    whole = median_seconds(opened.search.like, chosen)
    report(what="candidates and rerank, tiny experts", experts=count, **whole)


def rerank(what: str, shapes: Shapes, count: int, queries: int, folder: Path) -> None:
    """Exact products."""
    library = ExpertLibrary(f"local://{folder}/{what}", create=True)
    fill(library, clusters(shapes, 16, count))
    began = time.perf_counter()
    library.search.like("e00000")
    indexed = time.perf_counter() - began
    chosen = random.Random(0).sample(library.keys(), queries)
    cold = ExpertLibrary(library.uri)
    report(
        what="rerank",
        modules=what,
        experts=count,
        parameters=sum(tensor.numel() for tensor in library["e00000"].expert_weights.values()),
        index_seconds_an_expert=round(indexed / count, 3),
        **median_seconds(library.search.like, chosen),
    )
    first = median_seconds(cold.search.like, chosen[:1])
    report(what="rerank, first search after opening", modules=what, experts=count, **first)


def recall(count: int, queries: int) -> None:
    """What the sketch chooses, against exact cosines."""
    modules = [lora_modules(each) for each in clusters(TINY, 8, count)]

    def row(factors: dict[str, LoraFactors]) -> torch.Tensor:
        parts = [(f.scaling * f.b @ f.a).flatten() for f in factors.values()]
        return torch.nn.functional.normalize(torch.cat(parts), dim=0)

    deltas = torch.stack([row(each) for each in modules])
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(1))[:queries]
    itself = torch.arange(queries), chosen

    def others(scores: torch.Tensor, k: int) -> torch.Tensor:
        scores[itself] = -2
        return scores.topk(k, dim=1).indices

    exact = deltas[chosen] @ deltas.T
    nearest = others(exact, 10)
    related = exact.gather(1, nearest) > 0.1  # the others are nobody's neighbours
    for width in (256, 512, 1024, 2048, 4096):
        rows = torch.stack([sketch(each, width) for each in modules])
        rows = torch.nn.functional.normalize(rows, dim=1)
        near = rows[chosen] @ rows.T
        error = float((near - deltas[chosen] @ deltas.T).std())

        def share(k: int, near: torch.Tensor = near) -> torch.Tensor:
            found = others(near.abs(), k)
            return (nearest[:, :, None] == found[:, None, :]).any(2)

        report(
            what="recall",
            experts=count,
            width=width,
            error_times_root_width=round(error * width**0.5, 3),
            recall_at_10=round(float(share(10).float().mean()), 4),
            recall_at_10_of_50=round(float(share(50).float().mean()), 4),
            recall_at_10_of_50_with_cosine_above_a_tenth=round(
                float(share(50)[related].float().mean()), 4
            ),
        )


def main() -> None:
    """Print the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help="Any of the four; all by default.")
    parser.add_argument("--experts", type=int, default=10_000)
    parser.add_argument("--large-experts", type=int, default=200)
    parser.add_argument("--queries", type=int, default=30)
    options = parser.parse_args()
    parts = options.parts or ["text", "candidates", "rerank", "recall"]
    with tempfile.TemporaryDirectory(prefix="mttl-bench-") as folder:
        if "text" in parts:
            text(options.experts, options.queries)
        if "candidates" in parts:
            candidates(options.experts, options.queries, Path(folder))
        if "rerank" in parts:
            for what, shapes in {"q_proj, v_proj": QUERY_VALUE, "all linear": SMOL}.items():
                rerank(what, shapes, options.large_experts, options.queries, Path(folder))
        if "recall" in parts:
            recall(3000, 200)


if __name__ == "__main__":
    main()
