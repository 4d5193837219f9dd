"""What one evaluation is asked to do, checked before anything slow begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mttl_data import METRICS, benchmark_names
from mttl_experts.jobs import key_values, say
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
    "phatgoose": (None, "phatgoose"),
    "avg_act": (None, "avg_act"),
    "oracle": (None, "oracle"),
}
IN_DISTRIBUTION = "in_distribution"
OTHER_NAMES = ("avg_act", "rkhs")
# Settings of routers that choose by scores, and what they are by default.
CHOOSING = {"top_k": 4, "temperature": 1.0, "top_p": None, "threshold": None, "granularity": None}
READY = ("arrow", "spectr", "seqr", "phatgoose", "centroid", "avg_act")
# Those that are trained, for all experts at once, on the experts' own data; and those of them that
# go by a row's task.
TRAINED = tuple(name for name, kind in ROUTERS.items() if kind.learned)
BY_TASK = ("poly", "mhr")
CHOOSERS = (*READY, *(name for name in TRAINED if name not in ("mlp", *BY_TASK)))
# The settings that each router takes; logo and retrieval decide for whole rows.
TAKES = {
    **dict.fromkeys(CHOOSERS, tuple(CHOOSING)),
    **dict.fromkeys(("logo", "retrieval"), ("top_k",)),
    **dict.fromkeys(BY_TASK, ("granularity",)),
    "mlp": ("temperature", "granularity"),
}
# Routers that learn from rows of the experts' own data, those that are fitted on prompts of it, and
# how many rows of each expert's by default.
LEARNERS = ("phatgoose", "centroid", "avg_act", "seqr", *TRAINED)
FITTED = ("predictor", "lorauter", "retrieval")
ROUTER_ROWS = 64
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
    top_p: float | None
    threshold: float | None
    granularity: str | None
    router_rows: int
    gate_steps: int | None
    then: str | None
    bank_files: str | None
    resident_gb: float | None
    rank: int | None
    density: float | None
    inside: str | None
    scale: float | None
    weights: str | None
    merge_options: dict[str, Any]
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
    routing_accuracy: bool
    recompute: bool
    strict: bool

    @property
    def method(self) -> dict[str, Any]:
        """How the experts become one model, as plain data; it is part of a score's key."""
        if self.merge:
            way = {"merge": self.merge, "rank": self.rank, "density": self.density}
            later = {"inside": self.inside, "scale": self.scale, "weights": self.weights}
            given = {name: value for name, value in later.items() if value is not None}
            return way | given | self.merge_options
        if not self.route:
            return {}
        return {"route": self.route, **self.choice, **self.learning}

    @property
    def choice(self) -> dict[str, Any]:
        """Settings of a router that chooses; those that are off are left out."""
        names = TAKES.get(str(self.route), ())
        names = (*names, "then") if self.route == "retrieval" else names
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def learning(self) -> dict[str, Any]:
        """How many rows a router that learns is shown, for how long, and as what."""
        learns = self.route in (*LEARNERS, *FITTED)
        rows = {"router_rows": self.router_rows} if learns else {}
        if self.trains_gates and self.gate_steps is not None:
            rows["gate_steps"] = self.gate_steps
        return rows | ({"prompts": "whole"} if self.decides_by_prompt else {})

    @property
    def decides_by_prompt(self) -> bool:
        """Whether the router needs all of a prompt to decide for a row."""
        return self.route in (*FITTED, "logo")

    @property
    def combine(self) -> str:
        """What is summed: outputs, so that ranks may differ, but factors where a router must.

        Polytropon averages factors too, of experts that were trained so; a library's were not.
        """
        return "before" if self.route == "mhr" else "after"

    @property
    def trains_gates(self) -> bool:
        """Whether something is trained for the router, which takes minutes where none is kept."""
        return "phatgoose" in (self.route, self.then) or self.route in TRAINED

    @property
    def learns_from_batches(self) -> bool:
        """Whether a router wants the experts' rows with their answers."""
        return bool({self.route, self.then} & set(LEARNERS))

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
    _known(options["then"], "--then", READY)
    if options["then"] and options["route"] != "retrieval":
        raise click.UsageError("--then is for --route retrieval")
    if options["bank_files"] and not options["route"]:
        raise click.UsageError("--bank-files is for --route")
    if options["resident_gb"] and not options["bank_files"]:
        raise click.UsageError("--resident-gb is a bound of --bank-files; give both")
    if options["route"] == "fixed":
        raise click.UsageError("--route fixed is one expert: --merge uniform --selection NAME")
    for name, default in CHOOSING.items():
        routers = tuple(router for router, takes in TAKES.items() if name in takes)
        _default(options, name, default, routers)
    _default(options, "router_rows", ROUTER_ROWS, (*LEARNERS, *FITTED))
    if options["then"] != "phatgoose":
        _default(options, "gate_steps", None, ("phatgoose", *TRAINED))
    if options["top_k"] == 1 and options["route"] in TRAINED and options["route"] in CHOOSERS:
        raise click.UsageError(
            f"--route {options['route']} learns from how a token's experts share it, so --top-k 1 "
            "would teach it nothing; give 2 or more"
        )
    options["merge_options"] = key_values(options["merge_options"])
    if options["merge"] == "weighted" and not options["weights"]:
        raise click.UsageError("--merge weighted takes --weights NAME=NUMBER,NAME=NUMBER")
    if options["routing_accuracy"] and not options["route"]:
        raise click.UsageError("--routing-accuracy is for --route, on the experts' own tasks")
    if options["merge_options"] and not options["merge"]:
        raise click.UsageError("--option is for --merge")
    for name in ("rank", "weights", *MERGING):
        if options[name] is not None and not options["merge"]:
            raise click.UsageError(f"--{name} is for --merge")
    if options["merge"]:
        given = {name: options[name] for name in MERGING if name != "scale"}
        given |= options["merge_options"]
        try:
            bind(MERGES[options["merge"]], options["merge"], given, 0, options["rank"])
        except ValueError as error:
            raise click.UsageError(f"--merge: {error}") from error
    for name in ("benchmarks", "task_source", "template_type"):
        options[name] = tuple(p.strip() for p in (options[name] or "").split(",") if p.strip())
    own = [name for name in options["benchmarks"] if name == IN_DISTRIBUTION]
    foreign = [name for name in options["benchmarks"] if name != IN_DISTRIBUTION]
    options["benchmarks"] = (*own, *benchmark_names(foreign))
    if options["metric"] is not None and options["metric"] not in METRICS:
        raise click.UsageError(
            f"--metric {options['metric']!r} is not known; there are {', '.join(METRICS)}"
        )
    if options["route"] in BY_TASK and foreign:
        say(
            f"a benchmark is no task of the experts: {options['route']} gives it the mean of theirs"
        )
    if options["route"] in ("oracle", "task") and foreign:
        raise click.UsageError(
            f"--route {options['route']} goes by the experts' own tasks, and a benchmark is none "
            "of them; choose another router"
        )
    options["output"] = Path(options["output"])
    return EvalOptions(**options)


def _default(options: dict[str, Any], name: str, default: Any, routers: tuple[str, ...]) -> None:
    """Set what was not given; say so where what was given has no use."""
    if options[name] is not None and options["route"] not in routers:
        way = options["merge"] or options["route"] or "the base"
        whose = ", ".join(router for router in routers if router not in OTHER_NAMES)
        say(f"--{name.replace('_', '-')} is for --route {whose}; {way} does without it")
    options[name] = default if options[name] is None else options[name]


def _known(name: str | None, option: str, names: Any) -> None:
    if name is not None and name not in names:
        raise click.UsageError(f"{option} {name!r} is not known; there are {', '.join(names)}")
