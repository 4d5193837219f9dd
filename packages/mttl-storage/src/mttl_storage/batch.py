"""Several changes in one commit."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from mttl_storage import intents
from mttl_storage.intents import Intent
from mttl_storage.store.base import Store
from mttl_storage.store.transfer import Upload

Files = Mapping[str, bytes | PathLike[str] | Upload]


class Batch:
    """Collects changes. They are checked at once, stored and published together at the end.

    Bytes are held until then; give large files as paths.
    """

    def __init__(self, store: Store, message: str = "") -> None:
        """Begin with nothing in it."""
        self._store = store
        self.message = message
        self.intents: list[Intent] = []

    def add(self, name: str, files: Files, info: Mapping[str, Any] | None = None) -> str:
        """As ``Repository.add``; returns the digest that the item will have."""
        return self._keep(intents.add(self._store, name, files, info)).digest

    def replace(
        self,
        name: str,
        files: Files,
        info: Mapping[str, Any] | None = None,
        expected: str | None = None,
    ) -> str:
        """As ``Repository.replace``; returns the digest that the item will have."""
        return self._keep(intents.replace(self._store, name, files, info, expected)).digest

    def update_info(self, name: str, info: Mapping[str, Any], expected: str | None = None) -> None:
        """As ``Repository.update_info``."""
        self._keep(intents.update_info(name, info, expected))

    def remove(self, name: str) -> None:
        """As ``Repository.remove``."""
        self._keep(intents.remove(name))

    def restore(self, name: str) -> None:
        """As ``Repository.restore``."""
        self._keep(intents.restore(name))

    def rename(self, old: str, new: str) -> None:
        """As ``Repository.rename``."""
        self._keep(intents.rename(old, new))

    def _keep(self, intent: Intent) -> Intent:
        self.intents.append(intent)
        return intent
