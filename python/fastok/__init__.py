"""fastok: native kernels that make transformers cheaper by reducing tokens and KV cache instead of weights."""

from . import _library

_library.load()

from . import reference  # noqa: E402
from .ops.match import bipartite_match, nearest  # noqa: E402
from .token_map import SoftMap, TokenMap  # noqa: E402

__version__ = "0.1.0"

__all__ = ["SoftMap", "TokenMap", "bipartite_match", "nearest", "reference"]
