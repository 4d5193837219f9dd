"""Items as plain folders, the way a hub shows them."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from mttl_storage.errors import translated
from mttl_storage.items import FileEntry, Item
from mttl_storage.names import check_name
from mttl_storage.reading import key_of
from mttl_storage.store.base import Store, in_parallel
from mttl_storage.store.disk import make_folders, temporary_beside

_PLAIN = "experts/"


def plain_name(name: str) -> str:
    """What an item is called in a plain folder: experts by their own name, others in full."""
    return name.removeprefix(_PLAIN)


def materialize(store: Store, items: Iterable[Item], dest: Path) -> Path:
    """Write the files of items below a folder, verified; those that are right are kept."""
    dest = dest.absolute()
    wanted: dict[Path, tuple[str, FileEntry]] = {}
    for item in items:
        for file, entry in item.files.items():
            # A log from elsewhere could name anything, so names are checked before they are paths.
            target = dest / check_name(plain_name(item.name)) / check_name(file, "file name")
            if target in wanted:
                raise ValueError(f"two items would share the file {str(target)!r}; choose names")
            wanted[target] = (key_of(store, item, file), entry)
    with translated("create", str(dest)):
        make_folders(str(dest))

    def write(target: Path) -> None:
        key, entry = wanted[target]
        with translated("write", str(target)):
            if _is_right(target, entry):
                return
            store.check(key, *entry)
            make_folders(str(target.parent))
            Path(temporary_beside(str(target), store.read_chunks(key))).replace(target)

    in_parallel(write, wanted)
    return dest


def _is_right(target: Path, entry: FileEntry) -> bool:
    if not target.is_file() or target.stat().st_size != entry.size:
        return False
    with target.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
