"""fastok: native kernels that make transformers cheaper by reducing tokens and KV cache instead of weights."""

from . import _library

_library.load()

from . import reducers, reference  # noqa: E402
from .integrations import Handle, apply  # noqa: E402
from .ops.match import bipartite_match, nearest  # noqa: E402
from .token_map import SoftMap, TokenMap  # noqa: E402

__version__ = "0.1.0"

__all__ = ["Handle", "SoftMap", "TokenMap", "apply", "bipartite_match", "nearest", "reducers", "reference"]
