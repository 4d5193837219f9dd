"""What a routed model is built from: the base that its experts name, and a router by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mttl_experts import Expert
from mttl_routing.routers import ROUTERS, AnyRouter, RouterOptions

if TYPE_CHECKING:
    from mttl_adapters.base_models import BaseModel


def known_base(experts: Sequence[Expert]) -> tuple[str | None, str | None]:
    """Id and revision of the base that the experts were made for, as far as they say."""
    infos = [expert.expert_info for expert in experts if expert.expert_info.expert_model]
    return (infos[0].expert_model, infos[0].model_revision) if infos else (None, None)


def load_base(model_id: str | None, revision: str | None) -> BaseModel:
    """The base of that id; an error where the experts say none."""
    from mttl_adapters import load_base_model

    if model_id is None:
        raise ValueError(
            "none of these experts says which base model it is for; give base_model=..."
        )
    return load_base_model(model_id, revision=revision)


def router_of(router: str | AnyRouter, experts: Sequence[Expert], **options: Any) -> AnyRouter:
    """A router by name, built with these :class:`RouterOptions`; an object as it is."""
    if not isinstance(router, str):
        return router
    if router not in ROUTERS:
        raise ValueError(f"no router {router!r}; there are {', '.join(map(repr, ROUTERS))}")
    return ROUTERS[router].build(experts, RouterOptions(**options))
