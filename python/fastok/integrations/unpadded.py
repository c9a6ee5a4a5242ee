"""Where tokens stand whose prompt was stored without its padding."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unpadded:
    """A batch of prompts of ``T`` tokens, of which some are padding, and of what comes behind them.

    Attributes:
        places: int64 ``[B,T]``, the places of tokens that are no padding, ascending, then those of padding.
        seen: int64 ``[B]``, how many are no padding.
    """

    places: Tensor
    seen: Tensor

    @classmethod
    def of(cls, hidden: Tensor) -> "Unpadded":
        """From bool ``hidden[B,T]``, which says what is padding."""
        order = hidden.to(torch.int8).argsort(dim=1, stable=True)
        return cls(order, (~hidden).sum(1))

    def positions(self, total: int) -> Tensor:
        """int64 ``[B,total]``: where the first ``total`` stored tokens stand."""
        prompt = self.places.shape[1]
        entry = torch.arange(max(total, prompt), device=self.places.device)
        later = entry + (prompt - self.seen)[:, None]
        known = torch.nn.functional.pad(self.places, (0, max(total - prompt, 0)))
        return torch.where(entry < self.seen[:, None], known, later)[:, :total]

    def of_stored(self, key_bias: Tensor) -> Tensor:
        """``[B,T']`` or ``[B,H,T']`` of all tokens as that of the stored ones; what is behind the last is arbitrary."""
        total = key_bias.shape[-1]
        places = self.positions(total).clamp(max=total - 1)
        return key_bias.gather(-1, places if key_bias.dim() == 2 else places[:, None].expand_as(key_bias))

    def spread(self, x: Tensor, total: int) -> Tensor:
        """Stored tokens ``x[B,G,N,D]`` where they stand among all ``[B,G,total,D]``; 0 elsewhere."""
        places = self.positions(x.shape[2]).clamp(max=total)
        out = x.new_zeros(*x.shape[:2], total + 1, x.shape[3])
        return out.scatter(2, places[:, None, :, None].expand_as(x), x)[:, :, :total]

    def crop(self, length: int) -> tuple["Unpadded", Tensor]:
        """The same of the ``length`` oldest tokens, and how many of those are stored, ``[B]``."""
        prompt = self.places.shape[1]
        if length >= prompt:
            return self, length - (prompt - self.seen)
        of_prompt = torch.arange(prompt, device=self.places.device) < self.seen[:, None]
        seen = ((self.places < length) & of_prompt).sum(1)
        return Unpadded(self.places[:, :length], seen), seen

    def select(self, index: Tensor) -> "Unpadded":
        """Of samples ``index[B']``."""
        return Unpadded(self.places.index_select(0, index), self.seen.index_select(0, index))
