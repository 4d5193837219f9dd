"""The backends, each an fsspec filesystem with the verbs that a repository needs."""

import os

from mttl_storage.store.base import Entry, Store
from mttl_storage.uri import Address, parse_uri

__all__ = ["Entry", "Store", "filesystem"]


def filesystem(uri: str | os.PathLike[str] | Address, token: object = None) -> Store:
    """An fsspec filesystem rooted at an address: its paths are relative to it and cannot leave it.

    Args:
        uri: any address of this package; nothing is created or contacted yet.
        token: a credential for backends that need one; local and virtual do not.
    """
    address = parse_uri(uri)
    if address.scheme == "local":
        from mttl_storage.store.local import LocalStore

        return LocalStore(root=address.path)
    if address.scheme == "virtual":
        from mttl_storage.store.virtual import VirtualStore

        return VirtualStore(root=address.path)
    if address.scheme == "az":
        from mttl_storage.store.azure import AzureStore

        return AzureStore(root=address.path).with_token(token)
    from mttl_storage.store.hub import HubStore

    return HubStore(root=address.path).with_token(token)
