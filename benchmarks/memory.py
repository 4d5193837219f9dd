"""How long a routed model takes to build, and what it holds in memory, run by run.

    uv run benchmarks/memory.py --experts 256 --layers 30 [--dtype bfloat16] --library FOLDER
    uv run benchmarks/memory.py ... --bank-files FOLDER [--resident-gb 2]
    uv run benchmarks/memory.py --experts 256 --layers 1 --library FOLDER --peer

Arrow over generated experts of rank 16 of SmolLM2-135M's shapes, the first of ``--library``, which
is made where there is none. Memory is that of the process beyond the base model (``RssAnon`` and
``RssFile`` of /proc/self/status): the peak of a build, after it, and the peak while a forward of
16, and of 8 x 256 tokens runs, less that of the base's own; ``share`` is the two together over the
size of the factors, and ``transient_mb`` what the peak is above what was there before, less the
same of the base: all layers share it, so none takes more. What the C library holds free is given
back before each row (``malloc_trim``): the base's own forwards leave 30 to 120 MB of that. With
``MALLOC_MMAP_THRESHOLD_=65536`` in the environment it gives back each tensor at once, so that a
peak is what was asked for, not what lay between; forwards are slower then.

Each row is one JSON line: the first build, forwards, one expert more (what it adds to the memory
that was there; the first forward of 16 tokens after it, and the second), and a build with
prototypes (and files) there; seconds are those that passed, and those of the processor, which other
jobs disturb less. With ``--check`` the logits of 16 tokens are compared with a loop over the
experts that their own prototypes choose. Where mapped files take more than ``--resident-gb``, the
run ends with an error.
``--peer`` is PEFT's ``create_arrow_model`` instead.
"""

import argparse
import ctypes
import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from generated import make_library
from routing import VOCABULARY, PlainArrow, make_base

from mttl_adapters import BankFiles
from mttl_experts import Expert, ExpertLibrary
from mttl_routing import RoutedModel

RANK, TOP_K, ROWS, TOKENS, MEGABYTE = 16, 2, 8, 256, 10**6


def resident() -> dict[str, int]:
    """Bytes of this process in memory: its own, and of mapped files."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) * 1024
    return found


def settle() -> None:
    """Let go of all that nobody holds."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Peak:
    """The largest of what :func:`resident` says, each by itself and the two together."""

    def __init__(self) -> None:
        self.anon = self.file = self.both = 0

    def look(self) -> None:
        """Take in what is now."""
        now = resident()
        anon, file = now["RssAnon"], now["RssFile"]
        self.anon, self.file = max(self.anon, anon), max(self.file, file)
        self.both = max(self.both, anon + file)


def now() -> Peak:
    """What is in memory at least."""
    settle()
    peak = Peak()
    peak.look()
    return peak


@contextmanager
def watched() -> Iterator[Peak]:
    """The peak while the block runs, looked at every 10 ms."""
    peak, done = Peak(), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.look()


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor) -> None:
    """One prefill of all tokens."""
    model(input_ids=ids, use_cache=False)


class Run:
    """One system over one library, with the memory of the base to compare with."""

    def __init__(self, library: ExpertLibrary, options: argparse.Namespace) -> None:
        self.library, self.options = library, options
        self.dtype = getattr(torch, options.dtype)
        self.base = make_base(options.layers, torch.float32)
        self.ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
        forward(self.base, self.ids)
        self.before = now()
        with watched() as self.few:
            forward(self.base, self.ids[:1, :16])
        settle()
        with watched() as self.bare:
            forward(self.base, self.ids)
        width = {torch.float32: 4, torch.bfloat16: 2}[self.dtype]
        self.size = options.experts * RANK * options.layers * width * 10176

    def row(self, what: str, peak: Peak, base: Peak, seconds: float, **more: Any) -> None:
        """Print one line."""
        options = self.options
        row = {
            "system": f"mttl, {'mapped' if options.bank_files else 'in memory'}",
            "experts": options.experts,
            "layers": options.layers,
            "dtype": options.dtype,
            "what": what,
            "seconds": round(seconds, 2),
            "factors_mb": round(self.size / MEGABYTE),
            "anon_mb": round((peak.anon - base.anon) / MEGABYTE),
            "file_mb": round((peak.file - base.file) / MEGABYTE),
            "share": round((peak.both - base.both) / self.size, 3),
        }
        print(json.dumps(row | more), flush=True)

    def build(self, what: str) -> RoutedModel:
        """Build the routed model; rows of what is in memory meanwhile, and after."""
        files = None
        if self.options.bank_files:
            bound = self.options.resident_gb
            files = BankFiles(
                self.options.bank_files,
                dtype=self.dtype,
                resident_bytes=None if bound is None else int(bound * 10**9),
            )
        start, cpu = time.perf_counter(), time.process_time()
        with watched() as peak:
            routed = RoutedModel.from_library(
                self.library, "arrow", TOP_K, base_model=self.base, bank_files=files,
                dtype=self.dtype,
            )  # fmt: skip
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        self.row(what, peak, self.before, seconds, cpu_seconds=round(cpu, 2))
        self.row(f"{what}, after", now(), self.before, seconds)
        return routed

    def measure(self) -> None:
        """All rows."""
        routed = self.build("first build")
        some = self.ids[:1, :16]
        with torch.no_grad():
            found = routed(input_ids=some, use_cache=False).logits
        self.forward(routed, some, "16 tokens", self.few)
        for number in range(self.options.forwards):
            self.forward(routed, self.ids, f"forward {number + 1}", self.bare)
        self.add_one(routed, some)
        routed.remove()
        del routed
        self.build("build again").remove()
        if self.options.check:
            self.check(found)

    def add_one(self, routed: RoutedModel, ids: torch.Tensor) -> None:
        """Row of one expert more, and of the first forward of few tokens with it."""
        first = routed.expert(routed.experts[0])
        expert = Expert(replace(first.expert_info, expert_name="one-more"), first.expert_weights)
        before, start = now(), time.perf_counter()
        routed.add_expert(expert)
        seconds = time.perf_counter() - start
        after, start = now(), time.perf_counter()
        forward(routed, ids)
        forwards = [time.perf_counter() - start]
        later, start = now(), time.perf_counter()
        forward(routed, ids)
        forwards.append(time.perf_counter() - start)
        self.row(
            "add_expert", after, before, seconds,
            forward_s=[round(each, 3) for each in forwards],
            then_anon_mb=round((later.anon - after.anon) / MEGABYTE),
        )  # fmt: skip

    def forward(self, routed: RoutedModel, ids: torch.Tensor, what: str, bare: Peak) -> None:
        """Row of one forward."""
        before = now()
        start = time.perf_counter()
        with watched() as peak:
            forward(routed, ids)
        seconds = time.perf_counter() - start
        own, of_base = peak.anon - before.anon, bare.anon - self.before.anon
        self.row(what, peak, bare, seconds, transient_mb=round((own - of_base) / MEGABYTE))
        bound = self.options.resident_gb
        if bound is not None and peak.file - bare.file > bound * 10**9:
            raise SystemExit(f"{what}: mapped files took more than {bound} GB")

    @torch.no_grad()
    def check(self, found: torch.Tensor) -> None:
        """End the run where logits are not those of a loop over the experts."""
        plain = PlainArrow(self.library, TOP_K, self.dtype)
        expected = plain.logits(self.base, self.ids[:1, :16])
        error = float((found - expected).norm() / expected.norm())
        if not error <= (1e-4 if self.dtype == torch.float32 else 5e-2):
            raise SystemExit(f"logits differ by {error:.2e} of their norm")
        print(json.dumps({"what": "check", "error": error}), flush=True)


def peer(library: ExpertLibrary, options: argparse.Namespace) -> None:
    """PEFT's Arrow over the same experts."""
    from peft.tuners.lora import ArrowConfig, create_arrow_model

    base = make_base(options.layers, torch.float32)
    paths = [str(library.path(name)) for name in library]
    before, start, cpu = resident(), time.perf_counter(), time.process_time()
    model = create_arrow_model(base, paths, ArrowConfig(top_k=TOP_K))
    seconds, cpu, after = time.perf_counter() - start, time.process_time() - cpu, resident()
    row = {
        "system": f"peft arrow {type(model).__name__}", "experts": options.experts,
        "layers": options.layers, "dtype": "float32", "what": "first build",
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "anon_mb": round((after["RssAnon"] - before["RssAnon"]) / MEGABYTE),
        "file_mb": round((after["RssFile"] - before["RssFile"]) / MEGABYTE),
    }  # fmt: skip
    print(json.dumps(row), flush=True)


def main() -> None:
    """Open or make the library, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--library", type=Path, required=True, help="Folder of the experts.")
    parser.add_argument("--bank-files", type=Path, help="Map the experts from files here.")
    parser.add_argument("--resident-gb", type=float, help="Bound of what those take.")
    parser.add_argument("--forwards", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="Compare logits with a loop.")
    parser.add_argument("--peer", action="store_true", help="PEFT instead.")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if not options.library.exists() or not any(options.library.iterdir()):
        dtype = getattr(torch, options.dtype)
        make_library(str(options.library), options.experts, RANK, options.layers, dtype)
        os.sync()  # so that nothing that is measured waits for it
    uri = f"local://{options.library}"
    library = ExpertLibrary(uri, selection=ExpertLibrary(uri).keys()[: options.experts])
    if options.peer:
        peer(library, options)
    else:
        Run(library, options).measure()


if __name__ == "__main__":
    main()
