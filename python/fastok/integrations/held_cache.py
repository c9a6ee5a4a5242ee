"""What fastok's caches for transformers have in common: a store per layer that attention reads in place."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..ops.checks import check_shape
from ..ops.decode import MOST_ROWS
from .held import hold


class Store(Protocol):
    """Keys and values of one layer."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def crop(self, length: int) -> Any:
        """Forget all but the ``length`` oldest tokens."""

    def select(self, index: Tensor) -> Any:
        """Make samples ``index[B']`` the batch."""


class HeldLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a cache that fastok's attention reads in place.

    Attributes:
        length: tokens that went through it, whatever is still stored.
        kv_heads, widths: of what goes through it, heads and channels of a key and of a value.
    """

    is_sliding = False
    is_croppable = True
    most_rows: int = MOST_ROWS
    """New tokens that can be attended with in place."""
    whole = False
    """See `Held`."""
    compiles = False
    """See `Held`."""
    slides = True
    """Whether it heeds what a sliding window hides from a new token."""

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self._prompt: tuple[Tensor, Tensor] | None = None
        self.kv_heads, self.widths = 0, (0, 0)

    # ---- for subclasses ----------------------------------------------------------------------------------------------

    @property
    def stores(self) -> list[Store]:
        """All that is stored."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, spare capacity included."""
        self.settle()
        return sum(store.nbytes for store in self.stores)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens ``[B,G,S,D]``."""
        raise NotImplementedError

    def crop_stores(self, length: int) -> None:
        """Forget all but the ``length`` oldest tokens."""
        for store in self.stores:
            store.crop(length)

    def stored(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B,G,T,D]``."""
        raise NotImplementedError

    @property
    def wants_prompt(self) -> bool:
        """Whether a prompt is only to be stored once its attention was seen (`observe`)."""
        return False

    # ---- transformers' interface -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True
        self.kv_heads, self.widths = key_states.shape[1], (key_states.shape[3], value_states.shape[3])

    def expect(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these; ValueError unless they go with each other and with what is stored."""
        if not self.is_initialized:
            check_shape("key_states", key_states, (None, None, None, None), "[B,G,S,D]")
            check_shape("value_states", value_states, (*key_states.shape[:3], None), "[B,G,S,D]")
            self.lazy_initialization(key_states, value_states)
            return
        batch = self.batch if self.length else None
        check_shape("key_states", key_states, (batch, self.kv_heads, None, self.widths[0]), "[B,G,S,D] of the cache")
        check_shape("value_states", value_states, (*key_states.shape[:3], self.widths[1]), "[B,G,S,D] of the cache")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B,G,S,D]``; what the attention function is to be given."""
        self.settle()
        self.expect(key_states, value_states)
        new, before = key_states.shape[2], self.length
        states = key_states.detach(), value_states.detach()
        if before and new > self.most_rows:
            old = self.unpacked()
            self.length += new
            self.append(*states)
            return torch.cat([old[0], key_states], 2), torch.cat([old[1], value_states], 2)
        self.length += new
        if before == 0:
            if self.wants_prompt:
                self._prompt = states
                return hold(self, key_states, value_states)
            self.append(*states)
            return key_states, value_states
        self.append(*states)
        return hold(self, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a mask for ``query_length`` more tokens has, and the position of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens that went through."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized, self.length, self._prompt = False, 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, given as a number of at most 0."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be at most 0, got {tokens_to_remove}")
        if tokens_to_remove < 0 and self.is_initialized:
            self.settle()
            length = max(self.length + tokens_to_remove, 0)
            self.crop_stores(length)
            self.length = length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make samples ``beam_idx[B]`` the batch."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sample ``repeats`` times."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make samples ``indices[B']`` the batch."""
        if self.is_initialized:
            self.settle()
            for store in self.stores:
                store.select(indices)

    @property
    def batch(self) -> int:
        """How many samples there are."""
        raise NotImplementedError

    def offload(self) -> None:
        """Not supported."""
        raise NotImplementedError(f"{type(self).__name__}: required, offloading; supported, the model's device")

    # ---- for the attention function ----------------------------------------------------------------------------------

    def called_by(self, attention: nn.Module, position: Tensor | None, window: int | None) -> None:
        """See `Held`. NotImplementedError for a sliding window that this layer would not keep to."""
        if window is not None and not self.slides:
            raise NotImplementedError(
                f"sliding_window: required, {window}; supported by {type(self).__name__}, layers without such windows"
            )

    @property
    def observes(self) -> bool:
        """See `Held`."""
        return self._prompt is not None

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        prompt = self._prompt
        self.settle()
        return self.stored() if prompt is None else prompt

    def settle(self) -> None:
        """Store a prompt that waits for its attention: it went to one that tells nothing, or to none."""
        if self._prompt is not None:
            prompt, self._prompt = self._prompt, None
            self.append(*prompt)


@dataclass
class LayerByLayer:
    """Makes the layers of one cache, in order. It goes where the cache goes when that is copied or pickled.

    Attributes:
        make: from a layer's index to the layer; whatever it holds of the cache would keep the cache from being freed.
        made: how many there are.
    """

    make: Callable[[int], HeldLayer]
    made: int = 0

    def __call__(self) -> HeldLayer:
        """The next one."""
        index, self.made = self.made, self.made + 1
        return self.make(index)


class HeldCache(Cache):  # type: ignore[misc]
    """A cache of `HeldLayer`, each of them by ``make(index)``."""

    def __init__(self, make: Callable[[int], HeldLayer]) -> None:
        super().__init__(layer_class_to_replicate=LayerByLayer(make))

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, spare capacity included."""
        return sum(layer.nbytes for layer in self.filled())

    def filled(self) -> list[Any]:
        """The layers that hold something."""
        return [layer for layer in self.layers if layer.is_initialized]
