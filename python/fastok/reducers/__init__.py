"""Published token-reduction methods, one small file each: functions from a `TokenContext` to a map, no models."""

from .context import Reducer, TokenContext
from .evit import EViT
from .tome import ToMe

__all__ = ["EViT", "Reducer", "ToMe", "TokenContext"]
