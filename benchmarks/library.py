"""List and load a library of experts against pickles and PEFT, on this machine.

    uv run benchmarks/library.py [--experts 1000] [--rounds 3]

Each row is one JSON line: seconds (median over the rounds), and how many times faster the library
is than this contender. All take turns within each round, in one process, on files that are in the
page cache; a load touches every page of every tensor. ``list`` is every expert's facts from a
library just opened. ``load`` is all weights: verified before, or by it (SHA-256 of every byte).
The pickles are what a folder of torch.save files would be, one for facts and one for weights.
PEFT's ``load_adapter`` attaches to a model too, so it is measured on fewer, per expert.
``benchmarks/search.py`` measures search.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mttl_experts import Expert, ExpertInfo, ExpertLibrary
from mttl_storage import reading

LAYERS, HIDDEN, RANK = 9, 576, 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")  # 1.33 MB an expert
PEFT_EXPERTS = 8


def expert(number: int) -> Expert:
    """One LoRA expert, with facts as apps/train writes them."""
    generator = torch.Generator().manual_seed(number)
    shapes = {"A": (RANK, HIDDEN), "B": (HIDDEN, RANK)}
    path = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"
    weights = {
        path.format(layer, module, which): torch.randn(shapes[which], generator=generator)
        for layer in range(LAYERS)
        for module in MODULES
        for which in "AB"
    }
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": list(MODULES), "bias": "none", "lora_dropout": 0.05,
    }  # fmt: skip
    training = {
        "kind": "train", "data": {f"task-{number}": f"{number:064x}"}, "steps": 40,
        "training": {"learning_rate": 2e-3, "scheduler": "linear", "seed": 0},
    }  # fmt: skip
    info = ExpertInfo(
        f"expert-{number:05d}",
        f"task-{number}",
        expert_config=config,
        training_config=training,
        expert_model="org/base",
        model_fingerprint="f" * 64,
        recipe_digest=f"{number:064x}",
        metrics={"validation_loss": 1.5, "seconds": 60.5},
    )
    return Expert(info, weights)


def write(folder: Path, count: int) -> None:
    """The same experts as a library, in commits of ten, and as pickles."""
    library = ExpertLibrary(str(folder / "library"), create=True)
    pickles = folder / "pickles"
    pickles.mkdir()
    for first in range(0, count, 10):
        with library.batch(f"from {first}"):
            for number in range(first, min(first + 10, count)):
                made = expert(number)
                library.add_expert(made)
                torch.save(made.expert_info.to_dict(), pickles / f"{made.name}.meta")
                torch.save(made.expert_weights, pickles / f"{made.name}.ckpt")


def touch(tensors: Iterable[Tensor]) -> float:
    """Read a number of each page, as whoever uses the weights would."""
    return float(sum(tensor.view(-1)[::1024].sum() for tensor in tensors))


def forget_verified() -> None:
    """As in a process just started."""
    reading._proven.clear()


class Library:
    """This package."""

    def __init__(self, folder: Path) -> None:
        self.uri = str(folder / "library")

    def list(self) -> int:
        return len(ExpertLibrary(self.uri).infos())

    def load(self) -> int:
        experts = ExpertLibrary(self.uri).load()
        for each in experts.values():
            touch((each.expert_weights or {}).values())
        return len(experts)


class Pickles:
    """A folder of files of torch.save."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "pickles"

    def list(self) -> int:
        return len([torch.load(p, weights_only=False) for p in sorted(self.folder.glob("*.meta"))])

    def load(self) -> int:
        files = sorted(self.folder.glob("*.ckpt"))
        kept = [torch.load(path, weights_only=True) for path in files]
        for weights in kept:
            touch(weights.values())
        return len(kept)


def peft(library: ExpertLibrary) -> Callable[[], int]:
    """Loads the first few experts into a model, which is made anew each time; not timed."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    names = library.keys()[:PEFT_EXPERTS]
    paths = [str(library.path(name)) for name in names]
    model = PeftModel.from_pretrained(LlamaForCausalLM(config), paths[0], adapter_name="first")

    def load() -> int:
        for number, path in enumerate(paths):
            model.load_adapter(path, adapter_name=f"a{number}")
        return len(paths)

    return load


def timed(action: Callable[[], int], wanted: int) -> float:
    """Seconds that an action takes, which must find all experts."""
    began = time.perf_counter()
    found = action()
    spent = time.perf_counter() - began
    if found != wanted:
        raise SystemExit(f"{found} experts were found, not {wanted}")
    return spent


def measure(folder: Path, count: int, rounds: int) -> None:
    """Time all in every round, and print their rows."""
    ours, pickles = Library(folder), Pickles(folder)
    seconds: dict[tuple[str, str], list[float]] = {}

    def step(what: str, who: str, action: Callable[[], int], wanted: int = count) -> None:
        seconds.setdefault((what, who), []).append(timed(action, wanted) / wanted * count)

    ours.load(), pickles.load()  # both are in the page cache from now on
    for _ in range(rounds):
        step("list", "mttl-experts", ours.list)
        step("list", "torch.load", pickles.list)
        forget_verified()
        step("load, first verification", "mttl-experts", ours.load)
        step("load", "mttl-experts", ours.load)
        step("load", "torch.load", pickles.load)
        step("load", "PEFT load_adapter", peft(ExpertLibrary(ours.uri)), min(PEFT_EXPERTS, count))
    seconds["load, first verification", "torch.load"] = seconds["load", "torch.load"]
    medians = {key: statistics.median(spent) for key, spent in seconds.items()}
    for (what, who), spent in sorted(medians.items()):
        row: dict[str, Any] = {
            "what": what, "who": who, "experts": count, "rounds": rounds,
            "seconds": round(spent, 4),
            "library_is_faster": round(spent / medians[what, "mttl-experts"], 2),
        }  # fmt: skip
        print(json.dumps(row), flush=True)


def main() -> None:
    """Read the options, and measure in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder = Path(tempfile.mkdtemp(prefix="mttl-bench-"))
    try:
        write(folder, options.experts)
        measure(folder, options.experts, options.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
