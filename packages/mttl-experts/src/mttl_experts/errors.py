"""Errors and warnings of this package that a caller may want to tell apart."""

from __future__ import annotations

import difflib
from collections.abc import Collection

from mttl_storage import Conflict


class ExpertError(Exception):
    """What was asked of experts cannot be done with these. The others derive from it."""


class ExpertNotFoundError(ExpertError, LookupError):
    """The library has no expert of that name."""


class ExpertExistsError(ExpertError, Conflict):
    """The library already has another expert of that name."""


class IncompatibleExpertError(ExpertError, ValueError):
    """An expert cannot work where it was asked to: another base, or nothing to attach to."""


class UnsupportedAdapterError(ExpertError, ValueError):
    """An adapter is of a kind, or uses an option, that the asked-for computation does not cover."""


class IncompatibleExpertWarning(UserWarning):
    """An expert was made for the same base under other weights, tokenizer or template."""


def expert_not_found(uri: str, name: str, names: Collection[str]) -> ExpertNotFoundError:
    """Error for a name that the library does not have, with the nearest that it has."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    elif names:
        first = sorted(names)[:5]
        hint = f"it has {', '.join(map(repr, first))}{' ...' if len(names) > 5 else ''}"
    else:
        hint = "it is empty"
    count = "1 expert" if len(names) == 1 else f"{len(names)} experts"
    return ExpertNotFoundError(f"no expert {name!r} in {uri} ({count}); {hint}")
