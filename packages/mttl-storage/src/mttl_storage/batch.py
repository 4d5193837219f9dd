"""Several changes in one commit."""

from collections.abc import Mapping
from typing import Any

from mttl_storage import intents
from mttl_storage.intents import Intent
from mttl_storage.items import Files, Item
from mttl_storage.store.base import Store


class Batch:
    """Collects changes. Names are checked at once, files read and stored together at the end.

    Bytes are held until then; give large files as paths, and leave those as they are.
    """

    def __init__(self, store: Store, message: str = "") -> None:
        """Begin with nothing in it."""
        self._store = store
        self.message = message
        self.intents: list[Intent] = []

    def add(self, name: str, files: Files, info: Mapping[str, Any] | None = None) -> None:
        """As ``Repository.add``."""
        self.intents.append(intents.add(self._store, name, files, info))

    def replace(
        self,
        name: str,
        files: Files,
        info: Mapping[str, Any] | None = None,
        expected: str | None = None,
    ) -> None:
        """As ``Repository.replace``."""
        self.intents.append(intents.replace(self._store, name, files, info, expected))

    def update_info(self, name: str, info: Mapping[str, Any], expected: str | None = None) -> None:
        """As ``Repository.update_info``."""
        self.intents.append(intents.update_info(name, info, expected))

    def remove(self, name: str) -> None:
        """As ``Repository.remove``."""
        self.intents.append(intents.remove(name))

    def forget(self, item: Item) -> None:
        """Let a removed item, or one that this batch removes, never be restored; gc deletes it."""
        self.intents.append(intents.forget(item))

    def restore(self, name: str) -> None:
        """As ``Repository.restore``."""
        self.intents.append(intents.restore(name))

    def rename(self, old: str, new: str) -> None:
        """As ``Repository.rename``."""
        self.intents.append(intents.rename(old, new))
