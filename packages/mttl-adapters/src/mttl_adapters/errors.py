"""Errors that a base model, a setting or the data can cause."""

from __future__ import annotations


class AdapterError(Exception):
    """An adapter cannot be trained or used as asked. The others derive from it."""


class BaseModelError(AdapterError, ValueError):
    """A base model that cannot be loaded under the name given."""


class EmbeddedModelError(AdapterError, RuntimeError):
    """The embedded model is not installed, or its file cannot be read."""
