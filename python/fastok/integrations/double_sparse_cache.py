"""``DoubleSparseCache``: everything is kept, on the device or in host memory, and little of it attended to."""

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ..caches.labels import BITS
from ..ops.checks import check_at_least
from ..ops.sparse import check_shared
from .calibrate import Calibration
from .dense_layer import DenseLayer
from .double_sparse_layer import DoubleSparseLayer
from .held_cache import HeldCache, HeldLayer
from .offload import OffloadedLayer, look_ahead


class DoubleSparseCache(HeldCache):
    """Decode attends to the ``n_keep`` tokens whose label channels say that they matter; the prompt attends to all.

    Args:
        calibration: of the model, see :func:`fastok.sparse.calibrate`.
        n_keep: tokens attended to, per KV head: a number, or a share of those there are, padding
            counted, if below 1 (at least 64).
        dense_layers: layers that attend to all tokens; published: the first two.
        sink, recent: first and last tokens always among them.
        bits: of the labels, 16, 8 or 4.
        shared: one list for all query heads of a KV head; published: one for each.
        offload: keep keys and values of the sparse layers in host memory (pinned where there is CUDA); labels stay.
        prefetch: the model; with ``offload``, what a layer will want is fetched while the one before it computes.

    Raises:
        TypeError, ValueError: an argument of another type or range.

    With ``offload`` a step copies the rows it attends to, and nothing else, to the model's device. With ``prefetch``
    most of them are there by then: the next layer's query is guessed from the input of the layer before (the residual
    stream changes little from one to the next), its tokens are chosen and copied on a side stream; once the true
    query is known, what was not foreseen is copied too. Results are the same bit for bit; `prefetched` says what share
    was foreseen. (As published the guess decides, and the newest token can be missing.) Dense layers stay on the
    device. A hook on the model does it, which goes when the cache does. On CPUs the same code runs, without copies'
    sense.

    For ``attn_implementation="fastok"``; another one gets all tokens, with a warning. All keys and values stay in the
    model's dtype; `nbytes` has the labels too. Steps of up to 16 tokens are sparse, longer ones attend to everything.
    Padding is never chosen. Works with batches, beams, ``crop``, `reset`. Yang et al., arXiv 2408.07092.
    """

    def __init__(
        self,
        calibration: Calibration,
        n_keep: float,
        *,
        dense_layers: tuple[int, ...] = (0, 1),
        sink: int = 0,
        recent: int = 16,
        bits: int = 16,
        shared: bool = True,
        offload: bool = False,
        prefetch: nn.Module | None = None,
    ) -> None:
        if not isinstance(calibration, Calibration):
            raise TypeError(f"calibration must be a fastok.sparse.Calibration, got {type(calibration).__name__}")
        check_at_least("sink", sink, 0)
        check_at_least("recent", recent, 0)
        if not isinstance(dense_layers, (tuple, list)):
            raise TypeError(f"dense_layers must be a tuple of ints, got {type(dense_layers).__name__} {dense_layers!r}")
        if isinstance(n_keep, float) and n_keep < 1:
            if not n_keep > 0:
                raise ValueError(f"n_keep must be above 0, got {n_keep}")
        else:
            check_at_least("n_keep", n_keep, max(1, sink + recent))  # type: ignore[arg-type]
        if bits not in BITS:
            raise ValueError(f"bits must be one of {', '.join(map(str, BITS))}; got {bits!r}")
        check_shared(shared)
        for layer in dense_layers:
            check_at_least("dense_layers", layer, 0)
        if prefetch is not None and not offload:
            raise ValueError("prefetch must be None without offload=True: there is nothing to fetch")
        kind = OffloadedLayer if offload else DoubleSparseLayer
        sparse = partial(kind, n_keep=n_keep, sink=sink, recent=recent, bits=bits, shared=shared)
        super().__init__(partial(_layer, calibration.channels, dense_layers, sparse))
        if prefetch is not None:
            calibration.check(prefetch)
            look_ahead(prefetch, self)

    @property
    def device_nbytes(self) -> int:
        """Bytes of `nbytes` that are on the model's device."""
        return self.nbytes - sum(layer.kv.nbytes for layer in self.filled() if isinstance(layer, OffloadedLayer))

    @property
    def prefetched(self) -> float:
        """The share of all rows copied so far that had been foreseen; NaN while there are none."""
        layers = [layer for layer in self.filled() if isinstance(layer, OffloadedLayer)]
        wanted = sum(layer.wanted for layer in layers)
        return sum(layer.foreseen for layer in layers) / wanted if wanted else math.nan


def _layer(channels: Tensor, dense: tuple[int, ...], sparse: Callable[[Tensor], HeldLayer], index: int) -> HeldLayer:
    if index >= len(channels):
        raise ValueError(f"calibration must have every layer's channels, got {len(channels)}")
    return DenseLayer() if index in dense else sparse(channels[index])
