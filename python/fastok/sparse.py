"""Sparse decode: attention to the few cached tokens that matter (Double Sparsity and its relatives)."""

from .caches.labels import LabelCache
from .integrations.calibrate import Calibration, calibrate
from .ops.double_sparse import double_sparse_decode
from .ops.sparse import calibrate_channels, label_scores, select_tokens


def __getattr__(name: str) -> object:
    if name in CACHES:  # their base class is transformers' Cache, which fastok does without until it is asked for
        from .integrations import sparse_caches

        return getattr(sparse_caches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


CACHES = ("DoubleSparseCache", "PyramidKVCache", "SnapKVCache", "TidalCache")

__all__ = [
    "Calibration",
    "LabelCache",
    "calibrate",
    "calibrate_channels",
    "double_sparse_decode",
    "label_scores",
    "select_tokens",
]
