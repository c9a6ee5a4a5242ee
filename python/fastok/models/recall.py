"""Text with things to remember in it: Python's own standard library as bytes, and key-value pairs strewn among them.

A sequence is a stretch of source text. Single tokens from a vocabulary of keys, each followed by a value, stand at
random places in it. Later the keys come again, and the value behind them can only be known by looking back to where the
key stood first, at any distance. Perplexity is measured on the text, recall on the repeated keys' values. Nothing here
depends on the rest of fastok.
"""

import sysconfig
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

BYTES = 256
KEYS = 128
VALUES = 128
VOCABULARY = BYTES + KEYS + VALUES
"""Token ids: bytes, then keys, then values."""

MODEL_DIR = Path(__file__).resolve().parent / "recall_lm"
"""Folder of the shipped language model, ready for ``LlamaForCausalLM.from_pretrained``."""

SPACING = 64
"""Tokens per key, which comes twice."""

Split = Literal["train", "test"]


class Sequences(NamedTuple):
    """A batch of sequences."""

    tokens: Tensor
    """int64 ``[n, length]``."""
    recalled: Tensor
    """bool ``[n, length]``: values behind keys that came before, to be told from the token in front of them."""


class RecallTexts:
    """The standard library's sources, a tenth of the files kept for testing, with pairs to remember.

    Args:
        split: the ``"train"`` files or the ``"test"`` files.
    """

    def __init__(self, split: Split) -> None:
        self.text = _text(split)

    def batch(
        self, n: int, length: int, generator: Generator, *, spacing: int = SPACING, recall_last: float = 0.0
    ) -> Sequences:
        """``n`` sequences of ``length`` tokens, a multiple of ``spacing``, which is at least 4.

        ``recall_last``: of the sequence, this share at the end has all the repeated keys, and no other pair; 0: they
        come anywhere behind the first.
        """
        starts = torch.randint(len(self.text) - length, (n,), generator=generator)
        tokens = self.text[starts[:, None] + torch.arange(length)].long()
        recalled = torch.zeros_like(tokens, dtype=torch.bool)
        for row in range(n):
            pairs = min(max(1, length // spacing), KEYS)
            keys = BYTES + torch.randperm(KEYS, generator=generator)[:pairs]
            values = BYTES + KEYS + torch.randint(VALUES, (pairs,), generator=generator)
            first, second = _places(pairs, length, recall_last, generator)
            for place in (first, second):
                tokens[row, place] = keys
                tokens[row, place + 1] = values
            recalled[row, second + 1] = True
        return Sequences(tokens, recalled)


def _places(pairs: int, length: int, recall_last: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """int64 ``[pairs]`` each: where the keys stand first and where they come again, two tokens for each."""
    if recall_last > 0:
        border = 2 * int(length * (1 - recall_last) / 2)
        first = 2 * torch.randperm(border // 2, generator=generator)[:pairs]
        second = border + 2 * torch.randperm((length - border) // 2, generator=generator)[:pairs]
        return first, second
    both = 2 * torch.randperm(length // 2, generator=generator)[: 2 * pairs].view(pairs, 2)
    return both.amin(1), both.amax(1)


@lru_cache
def _text(split: Split) -> Tensor:
    """uint8 ``[bytes]``: the sources one after the other, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    parts = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in name or (zlib.crc32(name.encode()) % 10 == 0) != (split == "test"):
            continue
        parts.append(path.read_bytes())
    return torch.frombuffer(bytearray(b"\n".join(parts)), dtype=torch.uint8)
