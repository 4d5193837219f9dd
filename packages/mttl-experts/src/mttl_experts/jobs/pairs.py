"""Options of a command line that are pairs: KEY=VALUE, and a number for each expert."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click

from mttl_experts.jobs.command import literal


def key_values(pairs: Iterable[str]) -> dict[str, Any]:
    """Values by key, from ``KEY=VALUE`` each, read as Python or JSON literals where they are such.

    Raises:
        click.UsageError: naming what is no pair.
    """
    found = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise click.UsageError(f"--option takes KEY=VALUE, got {pair!r}")
        found[key] = literal(value)
    return found


def weights_of(text: str, names: Sequence[str]) -> dict[str, float]:
    """One number for each of the names, from ``NAME=NUMBER,NAME=NUMBER``."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            equals = ""
        if not equals or name not in names:
            raise click.ClickException(
                f"--weights takes NAME=NUMBER,NAME=NUMBER for the experts chosen, got {part!r}"
            )
    missing = sorted(set(names) - set(found))
    if missing:
        raise click.ClickException(
            f"--weights names no weight for {', '.join(missing)}; give it one, or leave it out"
        )
    return found
