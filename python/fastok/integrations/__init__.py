"""Putting reducers into models of timm and transformers: this is the only place that knows model classes."""

from .apply import apply
from .handle import Handle, Stats

__all__ = ["Handle", "Stats", "apply"]
