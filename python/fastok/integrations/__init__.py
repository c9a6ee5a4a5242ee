"""Putting reducers into models of timm and transformers: this is the only place that knows model classes."""

from .apply import apply
from .handle import Handle
from .recording import LayerScores, record_scores
from .session import Stats
from .transformers_attention import register_transformers

__all__ = ["Handle", "LayerScores", "Stats", "apply", "record_scores", "register_transformers"]
