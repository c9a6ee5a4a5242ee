"""Caches of keys and values: sealed pages of packed bytes plus a hot window in the model's dtype."""

from .formats import Code, KVFormat
from .packed import PackedKV, kv_pack
from .semantic import semantic_tokens

__all__ = ["Code", "KVFormat", "PackedKV", "kv_pack", "semantic_tokens"]
