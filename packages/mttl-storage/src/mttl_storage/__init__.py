"""Names to bytes: versioned, verified repositories of small files."""

from mttl_storage.batch import Batch
from mttl_storage.collecting import Collected
from mttl_storage.copying import copy
from mttl_storage.errors import (
    Conflict,
    Corrupt,
    Denied,
    InvalidName,
    NotFound,
    ReadOnly,
    StorageError,
    StorageFull,
    Throttled,
)
from mttl_storage.items import FileEntry, Item, content_digest
from mttl_storage.log import Change, Commit
from mttl_storage.names import check_name
from mttl_storage.plain import PlainItem, PlainRepository
from mttl_storage.repository import Repository
from mttl_storage.store import filesystem
from mttl_storage.store.transfer import in_parallel
from mttl_storage.uri import Address, parse_uri
from mttl_storage.verification import Problem

__all__ = [
    "Address",
    "Batch",
    "Change",
    "Collected",
    "Commit",
    "Conflict",
    "Corrupt",
    "Denied",
    "FileEntry",
    "InvalidName",
    "Item",
    "NotFound",
    "PlainItem",
    "PlainRepository",
    "Problem",
    "ReadOnly",
    "Repository",
    "StorageError",
    "StorageFull",
    "Throttled",
    "check_name",
    "content_digest",
    "copy",
    "filesystem",
    "in_parallel",
    "parse_uri",
]
