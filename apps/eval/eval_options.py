"""What one evaluation is asked to do, checked before anything slow begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mttl_data import METRICS, benchmark_names
from mttl_experts.jobs import say
from mttl_routing import MERGES, ROUTERS
from mttl_routing.merges import bind

# Older names for both ways, and what they are here; (merge, route).
OLDER = {
    "base": (None, None),
    "uniform": ("uniform", None),
    "ties": ("ties", None),
    "wudi": ("wudi", None),
    "wudi_merge_after": ("wudi", None),
    "uniform_lora_after_op": (None, "uniform"),
    "arrow": (None, "arrow"),
    "oracle": (None, "oracle"),
}
IN_DISTRIBUTION = "in_distribution"
# Settings that arrow alone has, and what they are by default.
ROUTED = {"top_k": 4, "temperature": 1.0}
# Settings that some merge methods have; the method's own defaults where not given.
MERGING = ("density", "inside", "scale")


@dataclass(frozen=True)
class EvalOptions:
    """One evaluation; the fields are the options of ``apps/eval``."""

    library: str
    merge: str | None
    route: str | None
    top_k: int
    temperature: float
    rank: int | None
    density: float | None
    inside: str | None
    scale: float | None
    selection: str | None
    model: str | None
    dataset: str | None
    output: Path
    benchmarks: tuple[str, ...]
    data_dir: str | None
    test_rows: int | None
    metric: str | None
    batch_size: int
    max_input_length: int | None
    max_output_length: int | None
    task_source: tuple[str, ...]
    template_type: tuple[str, ...]
    precision: str
    recompute: bool
    strict: bool

    @property
    def method(self) -> dict[str, Any]:
        """How the experts become one model, as plain data; it is part of a score's key."""
        if self.merge:
            way = {"merge": self.merge, "rank": self.rank, "density": self.density}
            later = {"inside": self.inside, "scale": self.scale}
            return way | {name: value for name, value in later.items() if value is not None}
        if self.route == "arrow":
            return {"route": "arrow", "top_k": self.top_k, "temperature": self.temperature}
        return {"route": self.route} if self.route else {}

    @property
    def in_distribution(self) -> bool:
        """Whether to score the experts' own tasks."""
        return not self.benchmarks or IN_DISTRIBUTION in self.benchmarks

    @property
    def harness(self) -> list[str]:
        """Benchmarks of lm-evaluation-harness to run."""
        return [name for name in self.benchmarks if name != IN_DISTRIBUTION]


def check(**options: Any) -> EvalOptions:
    """The options as one object.

    Raises:
        click.UsageError: a name is not known, or two options contradict each other.
        UnknownTaskError: a benchmark is not known.
    """
    both = options.pop("merge_or_route")
    if both is not None:
        if options["merge"] or options["route"]:
            raise click.UsageError("--merge-or-route says it all; leave --merge and --route out")
        if both not in OLDER:
            raise click.UsageError(f"no way {both!r} to merge or route; known: {', '.join(OLDER)}")
        options["merge"], options["route"] = OLDER[both]
    if options["merge"] and options["route"]:
        raise click.UsageError("--merge and --route are two ways to one model; give one")
    _known(options["merge"], "--merge", MERGES)
    _known(options["route"], "--route", ROUTERS)
    for name, default in ROUTED.items():
        if options[name] is not None and options["route"] != "arrow":
            way = options["merge"] or options["route"] or "the base"
            say(f"--{name.replace('_', '-')} is for --route arrow; {way} does without it")
        options[name] = default if options[name] is None else options[name]
    if options["merge"] == "weighted":
        raise click.UsageError("--merge weighted takes weights, which only mttl_routing.merge has")
    for name in ("rank", *MERGING):
        if options[name] is not None and not options["merge"]:
            raise click.UsageError(f"--{name} is for --merge")
    if options["merge"]:
        given = {name: options[name] for name in MERGING if name != "scale"}
        try:
            bind(MERGES[options["merge"]], options["merge"], given, 0, options["rank"])
        except ValueError as error:
            raise click.UsageError(f"--merge: {error}") from error
    for name in ("benchmarks", "task_source", "template_type"):
        options[name] = tuple(p.strip() for p in (options[name] or "").split(",") if p.strip())
    own = [name for name in options["benchmarks"] if name == IN_DISTRIBUTION]
    others = [name for name in options["benchmarks"] if name != IN_DISTRIBUTION]
    options["benchmarks"] = (*own, *benchmark_names(others))
    if options["metric"] is not None and options["metric"] not in METRICS:
        raise click.UsageError(
            f"--metric {options['metric']!r} is not known; there are {', '.join(METRICS)}"
        )
    if options["route"] in ("oracle", "task") and set(options["benchmarks"]) - {IN_DISTRIBUTION}:
        raise click.UsageError(
            f"--route {options['route']} goes by the experts' own tasks, and a benchmark is none "
            "of them; choose another router"
        )
    options["output"] = Path(options["output"])
    return EvalOptions(**options)


def _known(name: str | None, option: str, names: Any) -> None:
    if name is not None and name not in names:
        raise click.UsageError(f"{option} {name!r} is not known; there are {', '.join(names)}")
