"""Which Azure account to ask, and with which credential: from an argument or the environment."""

import os
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

from mttl_storage.errors import InvalidName, StorageError
from mttl_storage.secrets import Secret, refuse_plain

SAS_VARIABLES = ("BLOB_SAS_TOKEN", "AZURE_STORAGE_SAS_TOKEN")
KEY_VARIABLE = "AZURE_STORAGE_KEY"
CONNECTION_VARIABLE = "AZURE_STORAGE_CONNECTION_STRING"
ENDPOINT_VARIABLE = "AZURE_STORAGE_SERVICE_ENDPOINT"


@dataclass(frozen=True)
class Account:
    """Where to ask, and as whom.

    Args:
        url: of the blob service, without credentials.
        credential: what the client takes: a str (SAS or key), or an object of azure-core.
        secret: the same where it is a str, kept out of logs.
        kind: of credential, for messages.
    """

    url: str
    credential: Any = field(repr=False)
    kind: str
    secret: Secret | None = field(default=None, repr=False)


def account_of(name: str, token: object = None) -> Account:
    """The account of that name, with the first credential of those that are given.

    In this order: ``token`` (a SAS, an account key, a connection string, or a credential object
    of azure-core), BLOB_SAS_TOKEN, AZURE_STORAGE_SAS_TOKEN, AZURE_STORAGE_KEY,
    AZURE_STORAGE_CONNECTION_STRING, and what DefaultAzureCredential finds.

    Raises:
        Denied: a credential would be sent over plain http to another machine.
    """
    url = os.environ.get(ENDPOINT_VARIABLE) or f"https://{name}.blob.core.windows.net"
    kind = "token="
    if isinstance(token, Secret):
        token = token.reveal()
    if token is None:
        token, kind = _from_environment()
    connection = _connection(token) if isinstance(token, str) else None
    if connection:
        if connection.get("accountname", name) != name:
            raise InvalidName(
                f"the connection string is for the account {connection['accountname']!r}, and the "
                f"address for {name!r}"
            )
        token = connection.get("sharedaccesssignature") or connection.get("accountkey")
        if connection.get("blobendpoint"):
            url = connection["blobendpoint"]
        elif "endpointsuffix" in connection:
            protocol = connection.get("defaultendpointsprotocol", "https")
            url = f"{protocol}://{name}.blob.{connection['endpointsuffix']}"
    url = _with_account(url.rstrip("/"), name)
    if token is None:
        refuse_plain(url, "the default credential")
        return Account(url, _default_credential(), "DefaultAzureCredential")
    refuse_plain(url, kind)
    if not isinstance(token, str):
        return Account(url, token, kind)
    secret = Secret(token)
    return Account(url, _as_credential(name, token), kind, secret)


def _from_environment() -> tuple[str | None, str]:
    for name in (*SAS_VARIABLES, KEY_VARIABLE, CONNECTION_VARIABLE):
        if value := os.environ.get(name):
            return value, name
    return None, ""


def _connection(token: str) -> dict[str, str] | None:
    """The parts of a connection string by lower-case name, None if it is something else."""
    parts = {
        name.strip().lower(): value
        for name, equals, value in (part.partition("=") for part in token.split(";"))
        if equals
    }
    if parts.get("usedevelopmentstorage", "").lower() == "true":
        raise InvalidName(
            "UseDevelopmentStorage=true is not understood; give the AccountName, AccountKey and "
            "BlobEndpoint of the emulator"
        )
    return (
        parts if parts.keys() & {"accountname", "blobendpoint", "sharedaccesssignature"} else None
    )


def _as_credential(name: str, token: str) -> Any:
    from azure.core.credentials import AzureNamedKeyCredential, AzureSasCredential

    if "sig=" in token:
        return AzureSasCredential(token.lstrip("?"))
    return AzureNamedKeyCredential(name, token)


def _default_credential() -> Any:
    try:
        from azure.identity import DefaultAzureCredential
    except ImportError:
        raise StorageError(
            "no credential for Azure was given; pass token=, set BLOB_SAS_TOKEN or "
            "AZURE_STORAGE_KEY, or install azure-identity (mttl-storage[azure]) and log in"
        ) from None
    return DefaultAzureCredential()


def _with_account(url: str, name: str) -> str:
    """Where a host serves several accounts, as emulators do, the path begins with one."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if host.partition(".")[0] == name or parts.path.strip("/"):
        return url
    return f"{url}/{name}"
