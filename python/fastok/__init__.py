"""fastok: native kernels that make transformers cheaper by reducing tokens and KV cache instead of weights."""

from . import _library

_library.load()

from . import flash, reducers, reference, sparse  # noqa: E402
from .caches import Code, KVFormat, PackedKV, kv_pack, semantic_tokens  # noqa: E402
from .integrations import Handle, apply, record_scores, register_transformers  # noqa: E402
from .ops.attention import attention, attention_scores, attention_with_scores, merge_states  # noqa: E402
from .ops.decode import PagedKV, attention_decode  # noqa: E402
from .ops.k_center import k_center  # noqa: E402
from .ops.match import bipartite_match, nearest  # noqa: E402
from .ops.max_coverage import max_coverage  # noqa: E402
from .ops.scores import ScoreSpec  # noqa: E402
from .ops.select import density_peaks, sample_cdf, top_tokens  # noqa: E402
from .reducers import TokenContext  # noqa: E402
from .token_map import SoftMap, TokenMap  # noqa: E402

reference.functions.adopt_signatures()

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "PackedCache":  # its base class is transformers' Cache, which fastok does without until it is asked for
        from .integrations.packed_cache import PackedCache

        return PackedCache
    if name == "protect_semantics":
        from .integrations.protection import protect_semantics

        return protect_semantics
    if name in sparse.CACHES:
        return getattr(sparse, name)
    if name == "viz":  # draws with Pillow
        from importlib import import_module  # `from . import viz` would ask for this attribute first

        return import_module(".viz", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Code",
    "Handle",
    "KVFormat",
    "PackedKV",
    "PagedKV",
    "ScoreSpec",
    "SoftMap",
    "TokenContext",
    "TokenMap",
    "apply",
    "attention",
    "attention_decode",
    "attention_scores",
    "attention_with_scores",
    "bipartite_match",
    "density_peaks",
    "flash",
    "k_center",
    "kv_pack",
    "max_coverage",
    "merge_states",
    "nearest",
    "record_scores",
    "reducers",
    "reference",
    "register_transformers",
    "sample_cdf",
    "semantic_tokens",
    "sparse",
    "top_tokens",
]
