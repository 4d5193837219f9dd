"""Mixtures of experts: merging and routing."""

from mttl_routing.checkpoint import merge_into_checkpoint
from mttl_routing.cohort import check_one_base
from mttl_routing.conversion import as_lora
from mttl_routing.losses import load_balance, mutual_information
from mttl_routing.merge import merge
from mttl_routing.merges import MERGES, LowRank, Merge, MergeRule, Update
from mttl_routing.routed_model import RoutedModel, apply_expert
from mttl_routing.routers import (
    ROUTERS,
    Arrow,
    Centroid,
    Choice,
    Fixed,
    FollowsExperts,
    Layer,
    Logo,
    Lorauter,
    Mlp,
    NormRouter,
    Phatgoose,
    Poly,
    Predictor,
    ProductKey,
    Prompt,
    Retrieval,
    Router,
    Rows,
    SequenceRouter,
    Softmax,
    Task,
    Uniform,
    calibration,
    centroids,
    train_gates,
)
from mttl_routing.trace import Trace
from mttl_routing.training import train

__all__ = [
    "MERGES",
    "ROUTERS",
    "Arrow",
    "Centroid",
    "Choice",
    "Fixed",
    "FollowsExperts",
    "Layer",
    "Logo",
    "Lorauter",
    "LowRank",
    "Merge",
    "MergeRule",
    "Mlp",
    "NormRouter",
    "Phatgoose",
    "Poly",
    "Predictor",
    "ProductKey",
    "Prompt",
    "Retrieval",
    "RoutedModel",
    "Router",
    "Rows",
    "SequenceRouter",
    "Softmax",
    "Task",
    "Trace",
    "Uniform",
    "Update",
    "apply_expert",
    "as_lora",
    "calibration",
    "centroids",
    "check_one_base",
    "load_balance",
    "merge",
    "merge_into_checkpoint",
    "mutual_information",
    "train",
    "train_gates",
]
