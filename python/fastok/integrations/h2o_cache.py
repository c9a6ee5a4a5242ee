"""``H2OCache``: each head keeps the tokens that have been attended to most, and the newest."""

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..flash import padded
from ..ops.attention import attention_scores
from ..ops.checks import check_at_least
from ..ops.decode import MOST_ROWS
from ..ops.scores import ScoreSpec
from .dense_layer import HeadwiseLayer
from .held_cache import HeldCache


class H2OCache(HeldCache):
    """Each KV head keeps ``heavy`` tokens that queries attended to most so far, and the ``recent`` newest.

    Args:
        heavy, recent: how many; a number, or a share of the prompt's tokens, padding counted, if below 1. Published:
            0.1 each.

    Raises:
        TypeError, ValueError: an argument of another type or range. NotImplementedError, from the model: an attention
        implementation other than ``"fastok"``, recorded scores, sliding windows over several queries, gradients.

    A token's score is the sum of the probabilities that all queries since gave it, those of the prompt and of every
    step, over the query heads of its KV head, in fp32. After each call the tokens with the smallest scores go, for
    ever and from memory (`nbytes`), but for the newest. Tokens that came early have been seen by more queries: that
    bias is the method's. (As published there is a list per query head, and the scores are summed over a batch.)

    Prompts attend to everything; several tokens at once attend to what is kept and to each other, so results depend
    on how a stream is cut. Rotary positions stay those of the stream. Padding goes first, and its queries do not
    count. Works with batches, beams, `reset`, and ``crop`` back to the last call after which tokens went. Zhang et
    al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS 2023.
    """

    def __init__(self, heavy: float = 0.1, recent: float = 0.1) -> None:
        for name, value in (("heavy", heavy), ("recent", recent)):
            if isinstance(value, float) and value < 1:
                if not value > 0:
                    raise ValueError(f"{name} must be above 0, got {value}")
            else:
                check_at_least(name, value, 1)  # type: ignore[arg-type]
        super().__init__(partial(_layer, heavy, recent))


def _layer(heavy: float, recent: float, index: int) -> "H2OLayer":
    return H2OLayer(heavy, recent)


class H2OLayer(HeadwiseLayer):
    """One layer of an `H2OCache`."""

    spare = MOST_ROWS

    def __init__(self, heavy: float, recent: float) -> None:
        super().__init__()
        self.shares = heavy, recent
        self.heavy = self.recent = 0
        self.scores: Tensor  # fp32 [B,G,K], of the stored tokens

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored, the scores included."""
        return super().nbytes + self.scores.numel() * 4

    def observe(self, q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any]) -> None:
        """See `Held`."""
        self.store_prompt()
        self.heavy, self.recent = (int(n) if n >= 1 else max(int(n * self.length), 1) for n in self.shares)
        self.scores = attended(q, k, lse, masking)
        self._evict()

    def attend(self, q: Tensor, scale: float, softcap: float | None, key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Held`."""
        out, lse = super().attend(q, scale, softcap, key_bias)
        rows = padded(q).to(self.dtype)
        bias = self.bias_of_stored(key_bias, q.shape[2])
        masking = {"scale": scale, "causal": True, "softcap": softcap, "key_bias": bias}
        self.scores = F.pad(self.scores, (0, q.shape[1])) + attended(rows, self.kv.k, lse, masking)
        self._evict()
        return out, lse

    def _evict(self) -> None:
        if self.kv.length > self.heavy + self.recent:
            kept = self.keep_best(self.scores[..., : -self.recent], self.heavy)
            self.scores = self.scores.gather(2, kept)

    def crop_stores(self, length: int) -> None:
        """See `HeadwiseLayer`. What the forgotten tokens attended to still counts."""
        super().crop_stores(length)
        self.scores = self.scores[..., : self.kv.length]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make samples ``indices[B']`` the batch."""
        super().batch_select_indices(indices)
        self.scores = self.scores.index_select(0, indices)


def attended(q: Tensor, k: Tensor, lse: Tensor, masking: dict[str, Any]) -> Tensor:
    """fp32 ``[B,G,T]``: the probabilities that queries ``[B,S,H,D]``, the newest, give to keys; none by padding."""
    bias = masking["key_bias"]
    if bias is not None:
        padding = bias[..., bias.shape[-1] - q.shape[1] :] == -float("inf")
        lse = lse.masked_fill(padding if padding.dim() == 3 else padding[:, None], float("inf"))
    return attention_scores(q, k, lse=lse, spec=ScoreSpec(heads="group_sum"), **masking)
