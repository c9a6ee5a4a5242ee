"""Sparse decode: attention to the few cached tokens that matter (Double Sparsity and its relatives)."""

from .caches.labels import LabelCache
from .integrations.calibrate import Calibration, calibrate
from .ops.double_sparse import double_sparse_decode
from .ops.sparse import calibrate_channels, label_scores, select_tokens

__all__ = [
    "Calibration",
    "LabelCache",
    "calibrate",
    "calibrate_channels",
    "double_sparse_decode",
    "label_scores",
    "select_tokens",
]
