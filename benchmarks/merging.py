"""Merge methods against PEFT's, a plain dense version, and the least that the work can take.

    uv run benchmarks/merging.py                                   all rows on two layers
    uv run benchmarks/merging.py --experts 256 --layers 30 --once --dense "" --peft ""
    uv run benchmarks/merging.py --experts 8,64,128,256 --floors "" --methods "" --dense ""

Experts are generated, with SmolLM2-135M's shapes on all linear modules. Each row is one JSON line,
from a process of its own, and everyone reads the same library on disk, which is in the page cache;
loading counts. Rows:

- ``floor``: ``read`` reads the files' bytes, and ``load`` has the library check their SHA-256, map
  them, and then sums each tensor; ``gemm`` makes the stacked product of the uniform
  merge of each module, and ``gemm+svd`` also cuts it by the fastest exact way known here, the
  eigenvectors of its Gram matrix; both from factors that are in memory.
- ``dense``: a plain version that forms all ΔW of a module, with kthvalue, bernoulli and svd.
- ``peft``: ``add_weighted_adapter``, svd_full_matrices=False, loaded with low_cpu_mem_usage.
- ``ours``: ``merge``. ``@16`` after a method cuts the result to that rank, as PEFT's svd does.

``seconds`` is a median over ``--repeats`` rounds through all rows. ``extra_mb`` is the most private
memory (RssAnon, looked at every 5 ms) over what the process had before, less ``result_mb``, which
the result takes; mapped pages of the files are the page cache's. ``error`` is the distance of one
module's ΔW from the mean in float64, or from TIES, relative to it. ``sha256`` is the result's, and
``same_bytes`` whether a second run, on the experts in another order, has the same. ``times_ours``
is how many times as long as ours it takes, and ``times_floor`` how many times as long as a floor.
A row that needs more than ``--gigabytes`` of data or ``--seconds`` is reported as stopped.
"""

import argparse
import contextlib
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from generated import HIDDEN, INTERMEDIATE, make_library

PROBE = "model.layers.0.self_attn.q_proj"
FLOORS = "read,load,gemm,gemm+svd"
OURS = (
    "linear_factors,uniform,uniform@16,ties,ties@16,dare_linear@16,dare_ties@16,core,core@16,knots"
)
DENSE = "uniform@16,ties@16,dare_linear@16,dare_ties@16"
PEFT = "svd,ties_svd,dare_linear_svd,dare_ties_svd,cat,linear,ties,dare_linear,dare_ties"
# Which of ours does what the others' rows do.
COUNTERPARTS = {
    ("peft", "svd"): "uniform@16",
    ("peft", "ties_svd"): "ties@16",
    ("peft", "dare_linear_svd"): "dare_linear@16",
    ("peft", "dare_ties_svd"): "dare_ties@16",
    ("peft", "cat"): "uniform",
    **{("peft", m): "linear_factors" for m in ("linear", "ties", "dare_linear", "dare_ties")},
    **{("dense", m): m for m in DENSE.split(",")},
}
FLOOR_OF = {"linear_factors": "load", "uniform": "gemm", "uniform@16": "gemm+svd"}


def private_memory() -> int:
    """Bytes of memory that are this process's own, and no file's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


class Measured:
    """Seconds of a block, and its peak of private memory over what there was before."""

    def __enter__(self) -> "Measured":
        """Begin to look."""
        self.before = self.peak = private_memory()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        self.began = time.perf_counter()
        return self

    def look(self) -> None:
        """Until the block is over."""
        while not self.over.wait(0.005):
            self.peak = max(self.peak, private_memory())

    def __exit__(self, *_: object) -> None:
        """Take the time."""
        self.seconds = time.perf_counter() - self.began
        self.over.set()
        self.thread.join()

    def row(self, result_bytes: int) -> dict[str, Any]:
        """What was found."""
        extra = max(0, self.peak - self.before - result_bytes)
        return {
            "seconds": self.seconds,
            "extra_mb": extra / 1e6,
            "result_mb": result_bytes / 1e6,
        }


def split(method: str) -> tuple[str, int | None]:
    """A method's name and the rank after it."""
    name, _, rank = method.partition("@")
    return name, int(rank) if rank else None


def error_of(folder: str, method: str, found: Any) -> dict[str, float]:
    """Distance of the probed module's ΔW from what the method's definition gives in float64."""
    import torch

    from mttl_experts import ExpertLibrary, lora_modules

    base = method.split("_")[0]
    if "dare" in method or base not in ("uniform", "svd", "cat", "linear", "ties"):
        return {}
    factors = [lora_modules(e)[PROBE] for e in ExpertLibrary(f"local://{folder}").values()]
    deltas = torch.stack([f.scaling * f.b @ f.a for f in factors])
    mean = deltas.mean(0, dtype=torch.float64)
    expected = plain_ties(deltas, 0.2).double() if base == "ties" else mean
    return {"error": float((found.double() - expected).norm() / expected.norm())}


def run_ours(options: argparse.Namespace) -> dict[str, Any]:
    """One method: timed once, and once more in another order for the bytes."""
    from mttl_experts import ExpertLibrary, lora_modules
    from mttl_routing import merge

    method, rank = split(options.method)
    with Measured() as measured:
        library = ExpertLibrary(f"local://{options.library}")
        merged = merge(library, method, rank=rank)
    row = measured.row(sum(w.nbytes for w in (merged.expert_weights or {}).values()))
    row["sha256"] = merged.digest[:16]
    factors = lora_modules(merged)[PROBE]
    row |= error_of(options.library, method, factors.scaling * factors.b @ factors.a)
    if options.again:
        del merged, factors
        shuffled = list(library.values())
        random.Random(0).shuffle(shuffled)
        row["same_bytes"] = merge(shuffled, method, rank=rank).digest[:16] == row["sha256"]
    return row


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


def run_peft(options: argparse.Namespace) -> dict[str, Any]:
    """One of PEFT's combination types, loading included."""
    import transformers
    from peft import PeftModel

    from mttl_experts import ExpertLibrary

    transformers.logging.set_verbosity_error()
    library = ExpertLibrary(f"local://{options.library}")
    folders = {name: library.path(name) for name in library}
    base = tiny_base(options.layers)
    names = list(folders)
    extra: dict[str, Any] = {}
    if "svd" in options.method:
        extra = {"svd_rank": options.rank, "svd_full_matrices": False}
    if "ties" in options.method or "dare" in options.method:
        extra["density"] = 0.5 if "dare" in options.method else 0.2
    weight = {"ties": 1.0, "dare": 0.4}.get(options.method.split("_")[0], 1.0 / len(names))
    with Measured() as measured:
        model = PeftModel.from_pretrained(base, folders[names[0]], adapter_name=names[0])
        for name in names[1:]:
            model.load_adapter(folders[name], adapter_name=name, low_cpu_mem_usage=True)
        loaded = time.perf_counter() - measured.began
        model.add_weighted_adapter(
            names, [weight] * len(names), "m", combination_type=options.method, **extra
        )
    adapter = [p for key, p in model.named_parameters() if ".m." in key]
    probe = model.base_model.model.get_submodule(PROBE)
    row = measured.row(sum(p.nbytes for p in adapter)) | {"load_seconds": loaded}
    return row | error_of(options.library, options.method, probe.get_delta_weight("m"))


def plain_ties(deltas: Any, density: float) -> Any:
    """TIES of (e, o, i) as its paper has it."""
    import torch

    if density < 1.0:
        keep = round(density * deltas[0].numel())
        sizes = deltas.abs().flatten(1)
        least = sizes.kthvalue(sizes.shape[1] - keep + 1, dim=1).values
        deltas = torch.where(deltas.abs() >= least[:, None, None], deltas, 0.0)
    elected = deltas.sum(0).sign()
    agrees = (deltas.sign() == elected) & (deltas != 0.0)
    return torch.where(agrees, deltas, 0.0).sum(0) / agrees.sum(0).clamp(min=1)


def stacks(options: argparse.Namespace) -> Iterator[tuple[list[Any], list[Any]]]:
    """Each module's A and scaled B of all experts."""
    from mttl_experts import ExpertLibrary, lora_modules

    library = ExpertLibrary(f"local://{options.library}")
    tables = [lora_modules(expert) for expert in library.load().values()]
    for module in tables[0]:
        yield [t[module].a for t in tables], [t[module].b * t[module].scaling for t in tables]


def run_dense(options: argparse.Namespace) -> dict[str, Any]:
    """All ΔW of a module at once, in the plainest words of torch; then a singular value cut."""
    import torch

    method, rank = split(options.method)
    result = []
    with Measured() as measured:
        for a, b in stacks(options):
            deltas = torch.bmm(torch.stack(b), torch.stack(a))
            if method.startswith("dare"):
                deltas = deltas * torch.bernoulli(torch.full_like(deltas, 0.5)) / 0.5
            if method == "uniform":
                merged = deltas.mean(0)
            elif method == "dare_linear":
                merged = 0.4 * deltas.sum(0)
            else:
                merged = plain_ties(deltas, 1.0 if method == "dare_ties" else 0.2)
            u, sigma, vh = torch.linalg.svd(merged, full_matrices=False)
            result += [u[:, :rank] * sigma[:rank], vh[:rank].clone()]
    return measured.row(sum(part.nbytes for part in result))


def run_floor(options: argparse.Namespace) -> dict[str, Any]:
    """The least that a merge has to do; the products and cuts from what is in memory."""
    import torch

    if options.method == "load":
        from mttl_experts import ExpertLibrary

        with Measured() as measured:
            for expert in ExpertLibrary(f"local://{options.library}").load().values():
                for tensor in (expert.expert_weights or {}).values():
                    tensor.sum()
        return measured.row(0)
    if options.method == "read":
        files = sorted(Path(options.library).rglob("*.safetensors"))
        buffer = bytearray(max(path.stat().st_size for path in files))
        with Measured() as measured:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    file.readinto(buffer)
        return measured.row(0)
    seconds = 0.0
    for a, b in stacks(options):
        left, right = torch.cat(b, dim=1), torch.cat(a)
        began = time.perf_counter()
        product = left @ right
        if options.method == "gemm+svd":
            lesser = (
                product.double() if product.shape[0] <= product.shape[1] else product.double().T
            )
            u = torch.linalg.eigh(lesser @ lesser.T).eigenvectors[:, -options.rank :]
            _ = u.T @ lesser
        seconds += time.perf_counter() - began
    return {"seconds": seconds}


RUNNERS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "floor": run_floor,
    "dense": run_dense,
    "peft": run_peft,
    "ours": run_ours,
}


def run_here(options: argparse.Namespace) -> None:
    """One row, in this process, within the memory that it may have."""
    import torch

    torch.set_num_threads(options.threads)
    limit = int(options.gigabytes * 1e9)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    print(json.dumps(RUNNERS[options.who](options)))


def run_apart(
    options: argparse.Namespace, who: str, method: str, library: str, again: bool
) -> dict[str, Any]:
    """One row from a process of its own."""
    command = [sys.executable, __file__, "--who", who, "--method", method, "--library", library]
    for name in ("layers", "rank", "gigabytes", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    try:
        done = subprocess.run(
            [*command, *(["--again"] if again else [])],
            capture_output=True,
            text=True,
            check=False,
            timeout=options.seconds,
        )
    except subprocess.TimeoutExpired:
        return {"stopped": f"after {options.seconds} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"signal {-done.returncode}"]
        memory = "memory" in done.stderr or done.returncode < 0
        return {"stopped": f"at {options.gigabytes} GB" if memory else lines[-1][:200]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def run_all(options: argparse.Namespace, experts: int, library: str, size: int) -> None:
    """Every contender, in rounds, and a row for each."""
    plan = [
        (who, method)
        for who, methods in (
            ("floor", options.floors),
            ("ours", options.methods),
            ("dense", options.dense),
            ("peft", options.peft),
        )
        for method in methods.split(",")
        if method
    ]
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {entry: [] for entry in plan}
    for number in range(options.repeats):
        for who, method in plan:
            past = rounds[who, method]
            if not any("stopped" in row for row in past):
                again = who == "ours" and number == 0 and not options.once
                past.append(run_apart(options, who, method, library, again))
    rows = {}
    for entry, past in rounds.items():
        row = dict(past[0])
        if not any("stopped" in r for r in past):
            for figure in ("seconds", "extra_mb", "load_seconds"):
                if figure in row:
                    row[figure] = statistics.median(r[figure] for r in past)
            row["seconds_per_gb"] = row["seconds"] / size * 1e9
            row["repeats"] = len(past)
        rows[entry] = row
    for (who, method), row in rows.items():
        ours = rows.get(("ours", COUNTERPARTS.get((who, method), "")), {})
        floor = rows.get(("floor", FLOOR_OF.get(method, "")), {}) if who == "ours" else {}
        if "seconds" in ours and "seconds" in row:
            row["times_ours"] = row["seconds"] / ours["seconds"]
        if "seconds" in floor and "seconds" in row:
            row["times_floor"] = row["seconds"] / floor["seconds"]
        head = {"who": who, "method": method, "experts": experts, "layers": options.layers}
        print(json.dumps(rounded(head | {"mb": size / 1e6} | row)), flush=True)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Four digits of every number."""

    def short(value: Any) -> Any:
        if not isinstance(value, float) or value == 0.0:
            return value
        return round(value, 3 - math.floor(math.log10(abs(value))))

    return {key: short(value) for key, value in row.items()}


def main() -> None:
    """Make the experts, then give each contender a process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", default="64", help="How many; several with commas between.")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="Rounds; the median counts.")
    parser.add_argument("--threads", type=int, default=2, help="That torch uses.")
    parser.add_argument(
        "--seconds", type=float, default=300.0, help="The most that a row may take."
    )
    parser.add_argument("--gigabytes", type=float, default=12.0, help="Of data, likewise.")
    parser.add_argument("--floors", default=FLOORS, help="'' for none, and so on.")
    parser.add_argument("--methods", default=OURS, help="Ours; @ before a rank to cut to.")
    parser.add_argument("--dense", default=DENSE, help="Plain versions.")
    parser.add_argument("--peft", default=PEFT, help="PEFT's combination types.")
    parser.add_argument("--once", action="store_true", help="No second run for the bytes.")
    parser.add_argument("--where", help="Folder to keep the experts in for another run.")
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    for hidden in ("--who", "--method", "--library"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.who:
        run_here(options)
        return
    for experts in map(int, options.experts.split(",")):
        with contextlib.ExitStack() as stack:
            folder = options.where or stack.enter_context(tempfile.TemporaryDirectory())
            library = Path(folder) / f"{experts}x{options.rank}x{options.layers}"
            if not library.exists():
                make_library(str(library), experts, options.rank, options.layers)
            size = sum(f.stat().st_size for f in library.rglob("*.safetensors"))
            run_all(options, experts, str(library), size)


if __name__ == "__main__":
    main()
