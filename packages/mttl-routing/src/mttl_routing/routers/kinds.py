"""Every router by name: how it is made from the experts, and its paper."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from mttl_experts import Expert
from mttl_routing.routers import centroid, norms, phatgoose
from mttl_routing.routers.arrow import Arrow, prototypes_of
from mttl_routing.routers.centroid import Centroid, centroids
from mttl_routing.routers.data import Batch, data_digest, fingerprint_of
from mttl_routing.routers.fixed import Fixed
from mttl_routing.routers.kept import Tensors, kept_each
from mttl_routing.routers.learned import widths_of
from mttl_routing.routers.logo import Logo
from mttl_routing.routers.lorauter import Lorauter
from mttl_routing.routers.mlp import Mlp
from mttl_routing.routers.norms import NormRouter, calibration, norm_factors
from mttl_routing.routers.options import RouterKind, RouterOptions
from mttl_routing.routers.phatgoose import Phatgoose, train_gates
from mttl_routing.routers.poly import Mhr, Poly
from mttl_routing.routers.predictor import Predictor
from mttl_routing.routers.product_key import ProductKey
from mttl_routing.routers.protocol import AnyRouter, Router
from mttl_routing.routers.retrieval import Retrieval
from mttl_routing.routers.softmax import Softmax
from mttl_routing.routers.task import Task
from mttl_routing.routers.uniform import Uniform


def _arrow(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Arrow(prototypes_of(experts, options.library), options.choice)


def _spectr(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return NormRouter(_norm_factors(experts, options), options.choice)


def _seqr(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    calibrations = None
    if options.batches is not None:
        calibrations = _from_data("seqr", experts, options, norms.CALIBRATION, calibration)
    return NormRouter(_norm_factors(experts, options), options.choice, calibrations)


def _centroid(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    vectors = _from_data("centroid", experts, options, centroid.RECIPE, centroids)
    return Centroid(vectors, options.choice)


def _phatgoose(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    steps = phatgoose.STEPS if options.gate_steps is None else options.gate_steps
    recipe = phatgoose.RECIPE | {"steps": steps, "lr": phatgoose.LEARNING_RATE}
    make = partial(train_gates, steps=steps, progress=options.progress)
    vectors = _from_data("phatgoose", experts, options, recipe, make, together=False)
    return Phatgoose(vectors, options.choice)


def _fixed(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    if options.weights is None:
        raise ValueError("router 'fixed' needs to know which expert; give weights='its name'")
    return Fixed(options.weights)


def _task(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Task({expert.name: expert.expert_info.tasks for expert in experts})


def _uniform(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Uniform()


def _predictor(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Predictor.fit(experts, **_fitting("predictor", options))


def _lorauter(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Lorauter.fit(experts, **_fitting("lorauter", options))


def _logo(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    return Logo(experts, top_k=options.top_k)


def _retrieval(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    fitting, tokens = _fitting("retrieval", options), options.then
    if isinstance(tokens, str):
        if tokens not in ROUTERS:
            raise ValueError(f"no router {tokens!r}; there are {', '.join(map(repr, ROUTERS))}")
        if ROUTERS[tokens].learned:
            raise ValueError(f"router {tokens!r} learns; give then= one that is trained, itself")
        made = ROUTERS[tokens].build(experts, options)
        if not isinstance(made, Router):
            raise ValueError(
                f"router {tokens!r} decides for whole rows; then= takes one for tokens"
            )
        tokens = made
    return Retrieval.fit(experts, **fitting, top_k=options.top_k, tokens=tokens)


def _scoring(
    kind: type[Softmax] | type[ProductKey], experts: Sequence[Expert], options: RouterOptions
) -> AnyRouter:
    names, widths = _learning(experts)
    return kind(names, widths, options.choice, hidden=options.hidden, seed=options.seed)


def _mlp(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    names, widths = _learning(experts)
    return Mlp(names, widths, options.temperature, hidden=options.hidden, seed=options.seed)


def _poly(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    names, widths = _learning(experts)
    return Poly(names, widths, _tasks(experts, options), seed=options.seed)


def _mhr(experts: Sequence[Expert], options: RouterOptions) -> AnyRouter:
    names, widths = _learning(experts)
    tasks = _tasks(experts, options)
    return Mhr(names, widths, tasks, heads=options.heads, seed=options.seed)


def _tasks(experts: Sequence[Expert], options: RouterOptions) -> Sequence[str]:
    if options.tasks is not None:
        return options.tasks
    return sorted({task for expert in experts for task in expert.expert_info.tasks})


def _learning(experts: Sequence[Expert]) -> tuple[list[str], dict[str, int]]:
    """Whom a router learns to choose among, and the layers that it does so in."""
    return [expert.name for expert in experts], widths_of(experts)


def _fitting(name: str, options: RouterOptions) -> dict[str, Any]:
    """What routers are fitted on; their other options keep the papers' defaults."""
    if options.examples is None:
        raise ValueError(
            f"router {name!r} is fitted on examples of prompts, and there are none: give "
            f"examples={{name: texts}}, or a {name.capitalize()} made by its `fit`"
        )
    return {
        "examples": options.examples,
        "base_model": options.base_model,
        "library": options.library,
    }


def _norm_factors(experts: Sequence[Expert], options: RouterOptions) -> dict[str, Tensors]:
    if options.library is None:
        return {expert.name: norm_factors(expert.unread()) for expert in experts}
    made = options.library.artifacts.get_or_make_each(experts, norms.RECIPE, norm_factors)
    return {expert.name: value for expert, value in zip(experts, made, strict=True)}


def _from_data(
    router: str,
    experts: Sequence[Expert],
    options: RouterOptions,
    recipe: Mapping[str, Any],
    make: Callable[[Any, Expert, Iterable[Batch]], Tensors],
    together: bool = True,
) -> dict[str, Tensors]:
    """What a router learns of each expert from its own data and the base, one expert at a time."""
    batches, base = options.batches, options.base_model
    if batches is None or base is None:
        raise ValueError(
            f"router {router!r} learns from data of each expert; give batches={{name: batches}} "
            "and a base_model that is loaded"
        )
    own = batches if callable(batches) else lambda expert: batches[expert.name]
    where = {"base": fingerprint_of(base)}
    keys = [([expert], {**recipe, **where, "data": data_digest(own(expert))}) for expert in experts]

    def one(index: int) -> Tensors:
        return make(base, experts[index].unread(), own(experts[index]))

    values = kept_each(options.library, keys, one, together=together)
    return {expert.name: value for expert, value in zip(experts, values, strict=True)}


_softmax, _product_key = partial(_scoring, Softmax), partial(_scoring, ProductKey)
_ARROW = "https://arxiv.org/abs/2405.11157"
_SOFTMAX = "https://arxiv.org/abs/1701.06538"
# The baselines are described where Arrow is.
ROUTERS: Mapping[str, RouterKind] = MappingProxyType(
    {
        "arrow": RouterKind(_arrow, _ARROW),
        "spectr": RouterKind(_spectr, "https://arxiv.org/abs/2504.03454"),
        "seqr": RouterKind(_seqr, "https://arxiv.org/abs/2509.18093"),
        "phatgoose": RouterKind(_phatgoose, "https://arxiv.org/abs/2402.05859"),
        "centroid": RouterKind(_centroid, _ARROW),
        "avg_act": RouterKind(_centroid, _ARROW),
        "logo": RouterKind(_logo, "https://arxiv.org/abs/2511.07129"),
        "lorauter": RouterKind(_lorauter, "https://arxiv.org/abs/2601.21795"),
        # No paper's own: a yardstick in LoraRetriever's, by TF-IDF here.
        "predictor": RouterKind(_predictor, "https://arxiv.org/abs/2402.09997"),
        "retrieval": RouterKind(_retrieval, "https://arxiv.org/abs/2402.09997"),
        "softmax": RouterKind(_softmax, _SOFTMAX, learned=True),
        "rkhs": RouterKind(_softmax, _SOFTMAX, learned=True),
        "product_key": RouterKind(_product_key, "https://arxiv.org/abs/2407.04153", learned=True),
        "poly": RouterKind(_poly, "https://arxiv.org/abs/2202.13914", learned=True),
        "mhr": RouterKind(_mhr, "https://arxiv.org/abs/2211.03831", learned=True),
        # In the manner of X-LoRA, of whose two passes it spares one.
        "mlp": RouterKind(_mlp, "https://arxiv.org/abs/2402.07148", learned=True),
        "oracle": RouterKind(_task, _ARROW),
        "task": RouterKind(_task, _ARROW),
        "uniform": RouterKind(_uniform, _ARROW),
        "fixed": RouterKind(_fixed, _ARROW),
    }
)
