"""One layer of Double Sparsity: labels say which of the stored tokens to attend to."""

from torch import Tensor

from ..caches.labels import LabelCache
from ..ops.sparse import label_scores, label_tokens, select_tokens
from .dense_layer import DenseLayer, hidden
from .held_cache import Store


class DoubleSparseLayer(DenseLayer):
    """One sparse layer of a `DoubleSparseCache`."""

    def __init__(self, channels: Tensor, n_keep: float, sink: int, recent: int, bits: int, shared: bool) -> None:
        super().__init__()
        self.channels, self.bits, self.shared = channels, bits, shared
        self.n_keep, self.sink, self.recent = n_keep, sink, recent
        self.labels = LabelCache(channels, bits)

    @property
    def stores(self) -> list[Store]:
        """All that is stored."""
        return [self.kv, self.labels]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Get ready for tensors like these."""
        super().lazy_initialization(key_states, value_states)
        self.labels = LabelCache(self.channels.to(self.device), self.bits)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Store new tokens ``[B,G,S,D]``."""
        super().append(keys, values)
        self.labels.append(keys.transpose(1, 2).to(self.dtype))

    def budget(self, rows: int, length: int) -> tuple[int, int]:
        """How many tokens ``rows`` new queries attend to, of ``length``, and how many of them are the newest."""
        recent = max(self.recent, rows)
        n_keep = int(self.n_keep) if self.n_keep >= 1 else max(64, int(self.n_keep * length))
        return max(n_keep, self.sink + recent), recent

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        n_keep, recent = self.budget(q.shape[1], self.length)
        if n_keep >= self.length:
            return super().attend(q, scale, softcap, key_bias)
        rows = q.to(self.dtype)
        if key_bias is None:
            tokens, _ = label_tokens(rows, self.labels, n_keep, sink=self.sink, recent=recent, shared=self.shared)
        else:
            # A sample's own first tokens are its sinks, not the padding in front of them.
            scores = hidden(label_scores(rows, self.labels, shared=self.shared), key_bias, self.sink)
            tokens, _ = select_tokens(scores, n_keep, recent=recent)
        return self.to_tokens(tokens, q, scale, softcap, key_bias)
