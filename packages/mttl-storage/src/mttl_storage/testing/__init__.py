"""Servers and faults for tests of anything that stores with mttl-storage.

Azurite needs Node.js and the hub a web server; ``pip install 'mttl-storage[azure,testing]'`` brings
both. Nothing is imported before it is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mttl_storage.testing.azurite import Azurite
    from mttl_storage.testing.faulty import (
        Crash,
        PlannedFault,
        crash_at,
        fail_at,
        fail_every,
        faulty_store,
        repository_on,
    )
    from mttl_storage.testing.hub import LoopbackHub
    from mttl_storage.testing.proxy import FaultyProxy

__all__ = [
    "Azurite",
    "Crash",
    "FaultyProxy",
    "LoopbackHub",
    "PlannedFault",
    "crash_at",
    "fail_at",
    "fail_every",
    "faulty_store",
    "repository_on",
]

_MODULES = {"Azurite": "azurite", "FaultyProxy": "proxy", "LoopbackHub": "hub"}
"""Where a name is defined, if not in ``faulty``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "faulty")
    return getattr(import_module(f"{__name__}.{module}"), name)
