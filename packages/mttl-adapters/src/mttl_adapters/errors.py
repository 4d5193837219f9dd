"""Errors that a base model, a setting or the data can cause."""

from __future__ import annotations


class AdapterError(Exception):
    """An adapter cannot be trained or used as asked. The others derive from it."""


class BaseModelError(AdapterError, ValueError):
    """A base model that cannot be loaded under the name given."""


class DivergedError(AdapterError, ArithmeticError):
    """Training left the range of numbers: a loss or a weight is not finite."""


class EmbeddedModelError(AdapterError, RuntimeError):
    """The embedded model is not installed, or its file cannot be read."""


class CheckpointWarning(UserWarning):
    """A checkpoint could not be written; training goes on without."""
