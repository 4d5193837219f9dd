"""What routers learn from an expert's data: the expert in its base, and its inputs looked at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mttl_adapters.base_models import fingerprint
from mttl_adapters.loop import moved
from mttl_experts import Expert
from mttl_experts.plain import plain
from mttl_routing.attachment import base_of
from mttl_routing.routers.protocol import Layer, Router, Rows

if TYPE_CHECKING:
    from mttl_routing.routed_model import RoutedModel

Batch = Mapping[str, Any]
"""``input_ids``, ``attention_mask`` and ``labels``, as a transformers model takes them, and
``task_names``, one a row, where a router wants them."""

See = Callable[[str, Tensor], None]


def data_digest(batches: Iterable[Batch]) -> str:
    """SHA-256 of all that is in the batches, in hex."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            if not isinstance(batch[name], Tensor):
                digest.update(f"{name} {json.dumps(plain(batch[name], name))}\n".encode())
                continue
            tensor = batch[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint_of(base: Any) -> str:
    """Fingerprint of a base model, bare or from ``load_base_model``."""
    return base_of(base).fingerprint or fingerprint(base_of(base).model)


def watch(base: Any, expert: Expert, batches: Iterable[Batch], see: See) -> None:
    """Show what the modules of an expert read on its data, without gradient.

    Args:
        base: the base model; the expert is put in meanwhile.
        expert: whose modules are looked at.
        batches: at least one.
        see: given a module's path and its input (t, i), padding left out, batch by batch.
    """
    with torch.no_grad(), routed_alone(base, expert, lambda device: _Watching(see)) as routed:
        empty = True
        for batch in batches:
            empty = False
            batch = moved(batch, routed.device)
            routed.router.masks = _masks(batch)
            inputs: dict[str, Any] = dict(batch)
            if not getattr(routed.config, "is_encoder_decoder", False):
                inputs.pop("labels", None)  # a decoder's inputs come from them
            routed(**inputs, use_cache=False)
    if empty:
        raise ValueError(f"no batches were given for expert {expert.name!r}; give at least one")


@contextmanager
def routed_alone(
    base: Any, expert: Expert, router: Callable[[torch.device], Router]
) -> Iterator[RoutedModel]:
    """The base with one expert and a router of its own, in evaluation mode, for a while."""
    from mttl_routing.routed_model import RoutedModel

    model = base_of(base).model
    training = model.training
    with RoutedModel.from_experts([expert], router(model.device), base_model=base) as routed:
        model.eval()
        try:
            yield routed
        finally:
            model.train(training)


class _Watching:
    """A router of one expert that shows what it is given, and sends it all to that expert."""

    def __init__(self, see: See) -> None:
        self.see = see
        self.masks: list[Tensor] = []

    def gates(self, x: Tensor, layer: Layer, rows: Rows) -> Tensor:
        mask = next((mask for mask in self.masks if len(mask) == len(x)), None)
        self.see(layer.module, x if mask is None else x[mask])
        return torch.ones(len(x), 1, device=x.device)


def _masks(batch: Batch) -> list[Tensor]:
    """(t,) which tokens count: of the inputs, and of what a decoder is to say."""
    masks = [batch["attention_mask"].flatten().bool()] if "attention_mask" in batch else []
    if "labels" in batch:
        masks.append((batch["labels"] != -100).flatten())
    return masks
