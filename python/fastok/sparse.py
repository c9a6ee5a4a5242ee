"""Sparse decode: attention to the few cached tokens that matter (Double Sparsity and its relatives)."""

from importlib import import_module

from .caches.labels import LabelCache
from .integrations.calibrate import Calibration, calibrate
from .integrations.retrieval_heads import retrieval_heads
from .ops.double_sparse import double_sparse_decode
from .ops.sparse import calibrate_channels, label_scores, rotary_channels, select_tokens


def __getattr__(name: str) -> object:
    if name in CACHES:  # their base class is transformers' Cache, which fastok does without until it is asked for
        return getattr(import_module(f".integrations.{CACHES[name]}", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


CACHES = {
    "DoubleSparseCache": "double_sparse_cache",
    "EMASinkCache": "ema_sink_cache",
    "H2OCache": "h2o_cache",
    "PyramidKVCache": "sparse_caches",
    "RazorCache": "razor_cache",
    "SnapKVCache": "sparse_caches",
    "StreamingCache": "streaming_cache",
    "TidalCache": "sparse_caches",
}
"""By the module of `fastok.integrations` that has them."""

__all__ = [
    "Calibration",
    "LabelCache",
    "calibrate",
    "calibrate_channels",
    "double_sparse_decode",
    "label_scores",
    "retrieval_heads",
    "rotary_channels",
    "select_tokens",
]
