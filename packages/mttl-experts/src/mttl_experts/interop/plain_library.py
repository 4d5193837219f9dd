"""PEFT adapters in a folder or hub repository, shown as a library, as they lie.

Nothing is copied or written there. It has one generation, and no history, artifacts or scores.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from mttl_experts.changing import LibraryWriter
from mttl_experts.errors import UnsupportedAdapterError
from mttl_experts.expert import CONFIG_FILE, WEIGHTS_FILE
from mttl_experts.library import ExpertLibrary
from mttl_experts.selection import EXPERTS, Selection, check_expert_name
from mttl_storage import (
    Address,
    Commit,
    Corrupt,
    FileEntry,
    NotFound,
    Problem,
    ReadOnly,
    Repository,
    content_digest,
    filesystem,
    in_parallel,
    parse_uri,
)
from mttl_storage.cache import cached_folder, fetch
from mttl_storage.items import encode_line
from mttl_storage.log import Log
from mttl_storage.state import State
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
        repository = PlainRepository(parse_uri(repo_id, default_scheme), token)
        LibraryWriter.__init__(self, repository, chosen, True)
        self._token = token

    def copy_to(self, destination_id: str, token: str | None = None) -> ExpertLibrary:
        """Import what it shows into a library, which is made if there is none."""
        from mttl_experts.interop.importing import choose, find_experts, plan_import, run_import

        target = ExpertLibrary(destination_id, token, create=True)
        found = find_experts(self.uri, self._token)
        run_import(target, plan_import(target, choose([found], self.keys())))
        return target.refresh()

    def _expert_writer(self) -> NoReturn:
        raise ReadOnly(_only_read(self.uri))


class PlainRepository(Repository):
    """Adapters as the items of a repository that has no log."""

    def __init__(self, address: Address, token: object = None) -> None:
        """Look at an address."""
        store = filesystem(address, token)
        state, self._places = _look(store)
        super().__init__(Log(store), state, read_only=True)

    def refresh(self) -> Repository:
        """Look again."""
        self._state, self._places = _look(self.store)
        return self

    def read(self, item_name: str, file: str) -> bytes:
        """The bytes of a file; Corrupt if it was changed since it was looked at."""
        key, entry = self._find(item_name, file)
        content: bytes = self.store.cat_file(key)
        if FileEntry(len(content), hashlib.sha256(content).hexdigest()) != entry:
            raise Corrupt(self._changed(key))
        return content

    def open_file(self, item_name: str, file: str) -> BinaryIO:
        """A file open for reading, verified before."""
        return self.path(item_name, file).open("rb")

    def path(self, item_name: str, file: str | None = None) -> Path:
        """A verified file, or the folder, on the local disk: the very one, if it lies there."""
        item = self.item(item_name)
        paths = []
        for each in item.files if file is None else [file]:
            key, entry = self._find(item_name, each)
            if self.store.on_disk:
                try:
                    self.store.check(key, *entry)
                except Corrupt:
                    raise Corrupt(self._changed(key)) from None
                paths.append(self.store.local_path(key))
            else:
                paths.append(cached_folder(self.store, item) / each)
                fetch(self.store, key, entry, paths[-1])
        return paths[0] if file is not None else paths[0].parent

    def materialize(self, dest: str | PathLike[str], names: Iterable[str] | None = None) -> Path:
        """Write adapters to folders by their names."""
        for name in self if names is None else names:
            folder = Path(dest, name.removeprefix(EXPERTS))
            folder.mkdir(parents=True, exist_ok=True)
            for file in self.item(name).files:
                (folder / file).write_bytes(self.read(name, file))
        return Path(dest)

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> list[Problem]:
        """What was changed since it was looked at."""
        problems = []
        for done, (name, item) in enumerate(self.items().items(), 1):
            for file in item.files:
                try:
                    self.read(name, file)
                except (Corrupt, NotFound) as error:
                    problems.append(Problem(name, str(error)))
            if progress is not None:
                progress(done, len(self), name)
        return problems

    def history(self) -> list[Commit]:
        """There is none."""
        return []

    def at(self, generation: int) -> Repository:
        """There is but what lies there now."""
        raise NotFound(
            f"{self.uri} holds plain adapters, which have no generations; were they changed? open "
            "it again"
        )

    def _find(self, item_name: str, file: str) -> tuple[str, FileEntry]:
        item = self.item(item_name)
        if file not in item.files:
            raise NotFound(f"the item {item_name!r} has no file {file!r}")
        return self._places[item_name] + file, item.files[file]

    def _changed(self, key: str) -> str:
        return f"{self.store.address_of(key)!r} was changed since it was looked at; open it again"

    def _check_writable(self) -> NoReturn:
        raise ReadOnly(_only_read(self.uri))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as an address, never with a credential."""
        return PlainRepository, (parse_uri(self.uri),)


def _only_read(uri: str) -> str:
    return (
        f"{uri} holds plain PEFT adapters, which are only read, as they lie; copy them to a "
        "library with copy_to, or import them, to change anything"
    )


def _look(store: Store) -> tuple[State, dict[str, str]]:
    """The adapters in a store as the items of a generation 0, and where each of them lies."""
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
    lines: dict[str, bytes] = {}
    named: dict[str, str] = {}
    for place in places:
        other = named.setdefault(EXPERTS + (name := _name(store, place)), place)
        if other != place:
            raise UnsupportedAdapterError(
                f"{store.address_of(other)!r} and {store.address_of(place)!r} would both be the "
                f"expert {name!r}; import them into a library under names of their own"
            )

    def look(name: str) -> None:
        lines[name] = encode_line(name, _record(store, named[name], entries))

    in_parallel(look, named)
    return State(0, "", live=lines), named


def _name(store: Store, place: str) -> str:
    whole = place.rstrip("/").replace("/", "-") or store.root.rstrip("/").rpartition("/")[2]
    return check_expert_name(whole)


def _record(store: Store, place: str, entries: dict[str, Entry]) -> dict[str, Any]:
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
    return {
        "digest": content_digest(files),
        "files": {file: list(entry) for file, entry in files.items()},
        "info": facts,
        "generation": 0,
        "time": datetime.datetime.fromtimestamp(weights.time, datetime.UTC).isoformat(),
    }
