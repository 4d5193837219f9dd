"""Items as plain folders, the way a hub shows them."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mttl_storage.cache import fetch
from mttl_storage.errors import translated
from mttl_storage.items import FileEntry, Item
from mttl_storage.names import check_name
from mttl_storage.reading import key_of
from mttl_storage.state import State
from mttl_storage.store.base import Store
from mttl_storage.store.disk import make_folders
from mttl_storage.store.transfer import in_parallel

_PLAIN = "experts/"


def shown_files(
    store: Store, before: State, after: State, changes: Iterable[Mapping[str, Any]]
) -> dict[str, str | None]:
    """What a commit changes in the folders that a hub shows: by path, the key of its file.

    Args:
        store: of the repository; nothing is shown where it has no ``shown_folder``.
        before: the state that the commit follows.
        after: the state it makes.
        changes: of the commit.
    """
    if not store.shown_folder:
        return {}
    names = {change[key] for change in changes for key in ("name", "source") if key in change}
    old, new = (dict(_shown(store, state, names)) for state in (before, after))
    return {
        path: new.get(path)
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    }


def _shown(store: Store, state: State, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        if name in state.live:
            yield from shown(store, state.item(name))


def shown(store: Store, item: Item) -> Iterator[tuple[str, str]]:
    """Where a hub shows the files of an item: each path, and the key of the file itself."""
    if store.shown_folder and item.name.startswith(store.shown_folder):
        for file in item.files:
            path = f"{item.name.removeprefix(store.shown_folder)}/{file}"
            yield path, key_of(store.item_folder(item.home, item.digest), item, file)


def materialize(store: Store, items: Iterable[tuple[Item, str]], dest: Path) -> Path:
    """Write the files of items below a folder, verified; those that are right are kept.

    Args:
        store: that holds them.
        items: each with the folder in which it lies there.
        dest: a local folder.
    """
    dest = dest.absolute()
    wanted: dict[Path, tuple[str, FileEntry]] = {}
    for item, folder in items:
        for file, entry in item.files.items():
            # A log from elsewhere could name anything, so names are checked before they are paths.
            target = (
                dest / check_name(item.name.removeprefix(_PLAIN)) / check_name(file, "file name")
            )
            if target in wanted:
                raise ValueError(f"two items would share the file {str(target)!r}; choose names")
            wanted[target] = (key_of(folder, item, file), entry)
    with translated("create", str(dest)):
        make_folders(str(dest))

    def write(target: Path) -> None:
        fetch(store, *wanted[target], target)

    in_parallel(write, wanted)
    return dest
