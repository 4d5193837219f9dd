"""Pages for people that go with a commit of the hub, as a README does, and never hold it up."""

import warnings
from collections.abc import Callable, Mapping

from mttl_storage.retrying import Failure
from mttl_storage.store.remote import upload_of
from mttl_storage.store.transfer import Upload

_PATIENCE = 3
"""How often a commit with pages may fail before it is tried without."""


class Pages:
    """The pages of one commit, given up when they cannot be made or the hub does not take them."""

    def __init__(self, make: Callable[[], Mapping[str, bytes]] | None) -> None:
        """Take what makes them, which is asked for each parent that the commit is tried on."""
        self._make = make
        self._included = False
        self._failures = 0
        self._reason: Exception | None = None

    def files(self) -> dict[str, Upload]:
        """What to commit beside the change; nothing once they were given up."""
        made: Mapping[str, bytes] = {}
        if self._make is not None and self._reason is None:
            try:
                made = self._make()
            except Exception as error:  # of another package, and the change matters more
                self._reason = error
        self._included = bool(made)
        return {path: upload_of(content) for path, content in made.items()}

    def given_up(self, error: Exception, failure: Failure | None) -> bool:
        """Whether to try at once without them, after a commit with them failed.

        Args:
            error: that ended it.
            failure: what it means; None for one that is not the hub's.
        """
        if not self._included or (failure and failure.crowded):
            return False
        self._failures += 1
        if failure and failure.passing and self._failures < _PATIENCE:
            return False
        self._reason = failure.error if failure else error
        return True

    def warn(self, address: str) -> None:
        """Say why the commit was made without them, if it was."""
        if self._reason is not None:
            warnings.warn(
                f"{address}: committed without its pages: {self._reason}; the next commit tries "
                "them again",
                stacklevel=2,
            )
