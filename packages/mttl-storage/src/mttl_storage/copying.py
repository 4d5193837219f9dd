"""Copying items between any two repositories."""

import os
from collections.abc import Callable, Iterable

from mttl_storage.items import Item
from mttl_storage.reading import key_of
from mttl_storage.repository import Repository
from mttl_storage.store.transfer import Stored, Upload

Progress = Callable[[int, int, str], None]

_BATCH_ITEMS = 100
_BATCH_BYTES = 64 << 20


def copy(
    src: Repository | str | os.PathLike[str],
    dst: Repository | str | os.PathLike[str],
    names: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> int:
    """Copy items, and return how many were new or different.

    Items that are in ``dst`` with the same content and info are skipped, so a copy that was cut
    short goes on where it stopped. What else is in ``dst`` stays. Digests are equal at both ends.

    Args:
        src: a repository, at the generation it reads, or an address.
        dst: a repository, or an address, which is made if it is missing.
        names: the items to copy; all by default.
        progress: called with items done, items in all, and the name just done.
    """
    source = src if isinstance(src, Repository) else Repository.open(src, read_only=True)
    target = dst if isinstance(dst, Repository) else Repository.open(dst, create=True)
    chosen = source.items() if names is None else {name: source.item(name) for name in names}
    target.refresh()
    wanted = [item for item in chosen.values() if not _is_there(target, item)]
    done = len(chosen) - len(wanted)
    for group in _groups(wanted):
        with target.batch(f"copy from {source.uri}") as batch:
            for item in group:
                put = batch.replace if item.name in target else batch.add
                put(item.name, _files(source, item), item.info)
        for item in group:
            done += 1
            if progress:
                progress(done, len(chosen), item.name)
    return len(wanted)


def _is_there(target: Repository, item: Item) -> bool:
    if item.name not in target:
        return False
    there = target.item(item.name)
    return there.digest == item.digest and there.info == item.info


def _files(source: Repository, item: Item) -> dict[str, Upload]:
    """The files as streams, checked on the way, so that memory does not depend on their size."""
    return {
        file: Upload(Stored(source.store, key_of(source.folder_of(item), item, file)), *entry)
        for file, entry in item.files.items()
    }


def _groups(items: list[Item]) -> Iterable[list[Item]]:
    """Groups for one commit each: not too many items, and not too many bytes."""
    group: list[Item] = []
    for item in items:
        size = sum(each.size for each in group) + item.size
        if group and (len(group) == _BATCH_ITEMS or size > _BATCH_BYTES):
            yield group
            group = []
        group.append(item)
    if group:
        yield group
