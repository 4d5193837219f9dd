"""Every router, each with its paper."""

from mttl_routing.routers.arrow import Arrow
from mttl_routing.routers.centroid import Centroid, centroids
from mttl_routing.routers.choice import Choice
from mttl_routing.routers.data import Batch
from mttl_routing.routers.fixed import Fixed
from mttl_routing.routers.kinds import ROUTERS
from mttl_routing.routers.logo import Logo
from mttl_routing.routers.lorauter import Lorauter
from mttl_routing.routers.mlp import Mlp
from mttl_routing.routers.norms import NormRouter, calibration, norm_factors
from mttl_routing.routers.options import Batches, RouterKind, RouterOptions
from mttl_routing.routers.phatgoose import Phatgoose, train_gates
from mttl_routing.routers.poly import Mhr, Poly
from mttl_routing.routers.predictor import Predictor
from mttl_routing.routers.product_key import ProductKey
from mttl_routing.routers.protocol import (
    AnyRouter,
    FollowsExperts,
    Layer,
    Prompt,
    Router,
    Rows,
    SequenceRouter,
    Tasks,
)
from mttl_routing.routers.prototypes import arrow_prototypes
from mttl_routing.routers.retrieval import Retrieval
from mttl_routing.routers.softmax import Softmax
from mttl_routing.routers.task import Task
from mttl_routing.routers.uniform import Uniform

__all__ = [
    "ROUTERS",
    "AnyRouter",
    "Arrow",
    "Batch",
    "Batches",
    "Centroid",
    "Choice",
    "Fixed",
    "FollowsExperts",
    "Layer",
    "Logo",
    "Lorauter",
    "Mhr",
    "Mlp",
    "NormRouter",
    "Phatgoose",
    "Poly",
    "Predictor",
    "ProductKey",
    "Prompt",
    "Retrieval",
    "Router",
    "RouterKind",
    "RouterOptions",
    "Rows",
    "SequenceRouter",
    "Softmax",
    "Task",
    "Tasks",
    "Uniform",
    "arrow_prototypes",
    "calibration",
    "centroids",
    "norm_factors",
    "train_gates",
]
