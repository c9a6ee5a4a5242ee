"""Sparse decode over long dense caches against attention to all of them, ours and PyTorch's best."""

from collections.abc import Callable
from functools import cache
from typing import Any

import fastok
import torch
from fastok import sparse
from fastok.caches.dense import DenseKV
from fastok.testing.bench import Case, interleaved
from rivals import decode_torch

HEADS, GROUPS, WIDTH, CHANNELS = 32, 8, 128, 8
TOTAL, SHARE = 65_536, 16
LENGTHS = (16_384, 32_768, 65_536, 131_072, 262_144)
OWN_DENSE, BEST_OF_TORCH = 5.0, 12.0
SELECTION = 4.0  # a quarter of a step
LAYERS, TIDAL_KEEP, TIDAL = 32, 256, 5.0

Build = Callable[[], Callable[[], Any]]
Stored = tuple[torch.Tensor, torch.Tensor, None]


def cases(device: torch.device) -> list[Case]:
    best, where = fastest(device), f"T={TOTAL} ({HEADS}/{GROUPS},{WIDTH}) bf16"
    name, moved = f"double sparse {where}, 1/{SHARE}", moved_bytes(TOTAL, TOTAL // SHARE, 16)
    ours, own = step(TOTAL, TOTAL // SHARE, 16, device), dense(TOTAL, device)
    found = [
        Case(name, ours, own, "our own dense", bytes_moved=moved, target=OWN_DENSE),
        Case(name, ours, in_torch(best, TOTAL, device), best, bytes_moved=moved, target=BEST_OF_TORCH),
    ]
    for bits in (8, 4):
        found.append(
            Case(f"  labels of {bits} bits", step(TOTAL, TOTAL // SHARE, bits, device), own, "our own dense",
                 bytes_moved=moved_bytes(TOTAL, TOTAL // SHARE, bits))
        )  # fmt: skip
    found += [
        Case("  labels of 4 bits, rows kivi-2", packed_step(TOTAL, TOTAL // SHARE, device), own, "our own dense"),
        Case("  label_scores alone", scores(TOTAL, device), ours, "the whole step"),
        Case("  select_tokens alone", selection(TOTAL, TOTAL // SHARE, device), ours, "the whole step",
             target=SELECTION),
    ]  # fmt: skip
    keep = TOTAL // SHARE
    for total in LENGTHS:
        found.append(
            Case(f"double sparse, {keep} of T={total}", step(total, keep, 16, device), dense(total, device),
                 "our own dense", bytes_moved=moved_bytes(total, keep, 16))
        )  # fmt: skip
        found.append(
            Case(f"  decode over {keep} of T={total}", listed(total, keep, device), listed(LENGTHS[0], keep, device),
                 f"of T={LENGTHS[0]}", bytes_moved=moved_bytes(total, keep, 0))
        )  # fmt: skip
    tidal = f"TidalDecode {where}, k={TIDAL_KEEP}, {LAYERS} layers"
    selecting, attending = layers((2, 13), device), layers((LAYERS,), device)
    found.append(Case(tidal, selecting, attending, "our own dense", target=TIDAL))
    return found


def moved_bytes(total: int, keep: int, bits: int) -> float:
    """Labels, their scales, and the rows attended to."""
    labels = total * (CHANNELS * bits / 8 + (2 if 0 < bits < 16 else 0))
    return GROUPS * (labels + 2 * keep * WIDTH * 2)


def filled(total: int, device: torch.device) -> DenseKV:
    """Random keys and values, as fastok's caches keep them."""
    k, v = (torch.randn(1, total, GROUPS, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2))
    return DenseKV().append(k, v)


def stored(total: int, device: torch.device) -> Stored:
    """The same as the ops take them."""
    store = filled(total, device)
    return store.k, store.v, None


def query(device: torch.device) -> torch.Tensor:
    return torch.randn(1, 1, HEADS, WIDTH, device=device, dtype=torch.bfloat16)


def labelled(k: torch.Tensor, bits: int) -> sparse.LabelCache:
    channels = torch.stack([torch.randperm(WIDTH, device=k.device)[:CHANNELS] for _ in range(GROUPS)])
    return sparse.LabelCache(channels, bits).append(k)


@cache
def fastest(device: torch.device) -> str:
    """Of PyTorch's formulations, with keys and values heads first, which suits it best."""
    q, k, v = (torch.randn(1, n, heads, WIDTH, device=device, dtype=torch.bfloat16)
               for n, heads in ((1, HEADS), (GROUPS, TOTAL), (GROUPS, TOTAL)))  # fmt: skip
    return decode_torch.fastest(q, k, v, interleaved)


def in_torch(name: str, total: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q = query(device)
        k, v = (torch.randn(1, GROUPS, total, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2))
        return lambda: decode_torch.FORMULATIONS[name](q, k, v)

    return build


def dense(total: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q, cache = query(device), stored(total, device)
        return lambda: fastok.attention_decode(q, cache)

    return build


def listed(total: int, keep: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q, cache = query(device), stored(total, device)
        tokens, _ = sparse.select_tokens(torch.rand(1, GROUPS, total, device=device), keep)
        return lambda: fastok.attention_decode(q, cache, tokens=tokens)

    return build


def step(total: int, keep: int, bits: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q, cache = query(device), stored(total, device)
        labels = labelled(cache[0], bits)
        return lambda: sparse.double_sparse_decode(q, cache, labels, keep)

    return build


def packed_step(total: int, keep: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q, (k, v, _) = query(device), stored(total, device)
        rows, labels = fastok.kv_pack(k, v, "kivi-2"), labelled(k, 4)
        return lambda: sparse.double_sparse_decode(q, rows, labels, keep)

    return build


def scores(total: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q, k = query(device), torch.randn(1, total, GROUPS, WIDTH, device=device, dtype=torch.bfloat16)
        labels = labelled(k, 16)
        return lambda: sparse.label_scores(q, labels)

    return build


def selection(total: int, keep: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        of_labels = torch.randn(1, GROUPS, total, device=device)
        return lambda: sparse.select_tokens(of_labels, keep, recent=1)

    return build


@cache
def stores(device: torch.device) -> list[DenseKV]:
    """Of a few layers: too much together for any cache."""
    return [filled(TOTAL, device) for _ in range(3)]


def layers(select_layers: tuple[int, ...], device: torch.device) -> Build:
    """A step of all layers of a `TidalCache`; without layers that select, all of them attend to everything."""

    def build() -> Callable[[], Any]:
        q, tidal = query(device), sparse.TidalCache(TIDAL_KEEP, select_layers=select_layers)
        token = torch.zeros(1, GROUPS, 1, WIDTH, device=device, dtype=torch.bfloat16)
        for index in range(LAYERS):
            tidal.update(token, token, index)
            layer = tidal.layers[index]
            layer.kv, layer.length = stores(device)[index % 3], TOTAL
        return lambda: [layer.attend(q, WIDTH**-0.5, None, None) for layer in tidal.layers]

    return build
