"""Mixtures of experts: merging and routing."""

from mttl_routing.checkpoint import merge_into_checkpoint
from mttl_routing.cohort import check_one_base
from mttl_routing.conversion import as_lora
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
    NormRouter,
    Phatgoose,
    Predictor,
    Prompt,
    Retrieval,
    Router,
    Rows,
    SequenceRouter,
    Task,
    Uniform,
    calibration,
    centroids,
    train_gates,
)
from mttl_routing.trace import Trace

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
    "NormRouter",
    "Phatgoose",
    "Predictor",
    "Prompt",
    "Retrieval",
    "RoutedModel",
    "Router",
    "Rows",
    "SequenceRouter",
    "Task",
    "Trace",
    "Uniform",
    "Update",
    "apply_expert",
    "as_lora",
    "calibration",
    "centroids",
    "check_one_base",
    "merge",
    "merge_into_checkpoint",
    "train_gates",
]
