"""How far a piece of work has come, in the one form in which all of this package tells it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int | None], object]
"""Told what is done ("" for the work as asked), how far it is, and how far it goes if known."""
