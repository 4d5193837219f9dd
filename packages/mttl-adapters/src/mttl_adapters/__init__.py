"""Base models, adapter kinds and their training: tensors in, tensors out."""

from mttl_adapters.bank import Bank
from mttl_adapters.bank_files import BankFiles
from mttl_adapters.base_models import BaseModel, fingerprint, load_base_model
from mttl_adapters.chosen import Chosen
from mttl_adapters.embedded import EMBEDDED_ID
from mttl_adapters.errors import (
    AdapterError,
    BaseModelError,
    CheckpointWarning,
    DivergedError,
    EmbeddedModelError,
)
from mttl_adapters.kinds import linear_layers, lora_config
from mttl_adapters.loop import Objective, mean_loss, train_parameters
from mttl_adapters.losses import labelled_loss, linear_cross_entropy
from mttl_adapters.scores import Keys, TopK, top_k
from mttl_adapters.training import fresh_adapter, train_adapter
from mttl_adapters.training_config import TrainedAdapter, TrainingConfig, TrainingReport

__all__ = [
    "EMBEDDED_ID",
    "AdapterError",
    "Bank",
    "BankFiles",
    "BaseModel",
    "BaseModelError",
    "CheckpointWarning",
    "Chosen",
    "DivergedError",
    "EmbeddedModelError",
    "Keys",
    "Objective",
    "TopK",
    "TrainedAdapter",
    "TrainingConfig",
    "TrainingReport",
    "fingerprint",
    "fresh_adapter",
    "labelled_loss",
    "linear_cross_entropy",
    "linear_layers",
    "load_base_model",
    "lora_config",
    "mean_loss",
    "top_k",
    "train_adapter",
    "train_parameters",
]
