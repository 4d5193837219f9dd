"""PEFT adapters in a folder or hub repository, shown as a library, as they lie.

Nothing is copied or written there. It has one generation, and no history, artifacts or scores.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

from mttl_experts.changing import LibraryWriter
from mttl_experts.errors import UnsupportedAdapterError
from mttl_experts.expert import CONFIG_FILE, WEIGHTS_FILE
from mttl_experts.library import ExpertLibrary
from mttl_experts.selection import EXPERTS, Selection, check_expert_name
from mttl_storage import (
    Corrupt,
    FileEntry,
    NotFound,
    PlainItem,
    PlainRepository,
    ReadOnly,
    in_parallel,
    parse_uri,
)
from mttl_storage.store import Entry, Store

_SHA256 = re.compile("[0-9a-f]{64}")


class PlainExpertLibrary(ExpertLibrary):
    """PEFT adapters as they lie: an expert for each folder with an ``adapter_config.json``.

    Each is called by its folder, one at the root by the last part of the address. To change
    anything, copy it to a library with ``copy_to``.
    """

    def __init__(
        self,
        repo_id: str,
        token: str | None = None,
        model_name: str | None = None,
        selection: str | Iterable[str] | None = None,
        exclude_selection: str | Iterable[str] | None = None,
        *,
        default_scheme: str = "local",
    ) -> None:
        """Look at an address; every byte is read once, for its digest, where the hub has none.

        Args:
            repo_id: an address of any backend.
            token: credentials of the storage, where it needs any.
            model_name: show only experts made for this base model.
            selection: show only these, a list or a comma string of exact names.
            exclude_selection: leave these out.
            default_scheme: what an id without a scheme belongs to.

        Raises:
            NotFound: when there are no adapters there.
            UnsupportedAdapterError: when one has no safetensors; it can be imported.
        """
        chosen = Selection.of(model_name, selection, exclude_selection)
        address = parse_uri(repo_id, default_scheme)
        repository = PlainRepository(address, look, token, what="PEFT adapters")
        LibraryWriter.__init__(self, repository, chosen, True)
        self._token = token

    def copy_to(self, destination_id: str, token: str | None = None) -> ExpertLibrary:
        """Import what it shows into a library, which is made if there is none."""
        from mttl_experts.interop.importing import choose, find_experts, plan_import, run_import

        target = ExpertLibrary(destination_id, token, create=True)
        found = find_experts(self.uri, self._token)
        run_import(target, plan_import(target, choose([found], self.keys())))
        return target.refresh()

    def log(self, name: str, facts: bool = False) -> NoReturn:
        """There is none: NotFound, saying how to keep one."""
        self._item(name)
        raise NotFound(
            f"expert {name!r} of {self.uri} has no history: it is a plain PEFT adapter, shown as "
            "it lies; copy it to a library with copy_to, which keeps one from then on"
        )

    def _expert_writer(self) -> NoReturn:
        raise ReadOnly(
            f"{self.uri} holds plain PEFT adapters, which are only read, as they lie; copy them to "
            "a library with copy_to, or import them, to change anything"
        )


def look(store: Store) -> list[PlainItem]:
    """The adapters in a store; their weights are read for their digest where the hub has none."""
    entries = {entry.key: entry for entry in store.scan("")}
    places = sorted(
        key.removesuffix(CONFIG_FILE)
        for key in entries
        if key == CONFIG_FILE or key.endswith(f"/{CONFIG_FILE}")
        if not any(part.startswith(".") for part in key.split("/"))
    )
    if not places:
        raise NotFound(
            f"there is no repository and no PEFT adapter at {store.address!r}; check the address, "
            f"or pass create=True to make a library{store.missing_hint}"
        )
    named: dict[str, str] = {}
    for place in places:
        other = named.setdefault(name := _name(store, place), place)
        if other != place:
            raise UnsupportedAdapterError(
                f"{store.address_of(other)!r} and {store.address_of(place)!r} would both be the "
                f"expert {name!r}; import them into a library under names of their own"
            )

    found: list[PlainItem] = []
    in_parallel(lambda name: found.append(_adapter(store, name, named[name], entries)), named)
    return found


def _name(store: Store, place: str) -> str:
    whole = place.rstrip("/").replace("/", "-") or store.root.rstrip("/").rpartition("/")[2]
    return check_expert_name(whole)


def _adapter(store: Store, name: str, place: str, entries: dict[str, Entry]) -> PlainItem:
    if place + WEIGHTS_FILE not in entries:
        raise UnsupportedAdapterError(
            f"the adapter {store.address_of(place)!r} has no {WEIGHTS_FILE!r}, so it cannot be "
            "read as it lies; import it into a library"
        )
    content = store.cat_file(place + CONFIG_FILE)
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        where = store.address_of(place + CONFIG_FILE)
        raise Corrupt(f"{where!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise Corrupt(f"{store.address_of(place + CONFIG_FILE)!r} is no adapter config")
    weights = entries[place + WEIGHTS_FILE]
    # The hub lists a large file by the SHA-256 of its content.
    listed = weights.version.partition("@")[0] if store.scheme == "hf" else ""
    sha256 = listed if _SHA256.fullmatch(listed) else store.sha256(weights.key)
    files = {
        CONFIG_FILE: FileEntry(len(content), hashlib.sha256(content).hexdigest()),
        WEIGHTS_FILE: FileEntry(weights.size, sha256),
    }
    facts: dict[str, Any] = {"expert_config": config}
    for key, field in (("base_model_name_or_path", "expert_model"), ("revision", "model_revision")):
        if isinstance(config.get(key), str) and config[key]:
            facts[field] = config[key]
    return PlainItem(EXPERTS + name, place, files, facts, weights.time)
