"""Decode attention over dense and packed caches against PyTorch's best."""

from collections.abc import Callable
from functools import cache
from typing import Any

import fastok
import torch
from fastok import KVFormat
from fastok.testing.bench import Case, interleaved
from rivals import decode_torch

HEADS, GROUPS, WIDTH = 32, 8, 128
LENGTHS = (32_768, 262_144)
PRESETS = KVFormat.presets()
PROMISED = ("kivi-4", "kivi-2", "vidkv-1.5/1.58")
BEST_OF_TORCH, OWN_DENSE = 3.0, 1.2
DENSE_TARGET = 2.5

Build = Callable[[], Callable[[], Any]]


def cases(device: torch.device) -> list[Case]:
    found = []
    for total in LENGTHS:
        where = f"T={total} ({HEADS}/{GROUPS},{WIDTH}) bf16"
        flops = 4.0 * HEADS * total * WIDTH
        dense_bytes = 2.0 * total * GROUPS * WIDTH * 2
        best = fastest(total, device)
        found.extend(
            Case(f"dense decode {where}, {layout}", ours, in_torch(best, total, device), best,
                 bytes_moved=dense_bytes, only_reads=True, flops=flops, dtype=torch.bfloat16, target=DENSE_TARGET)
            for layout, ours in (("heads first", heads_first(total, device)), ("tokens first", dense(total, device)))
        )  # fmt: skip
        for name in PRESETS if total == LENGTHS[0] else PROMISED:
            key, value = KVFormat.preset(name).bits_per_element(WIDTH)
            moved = (key + value) / 8 * total * GROUPS * WIDTH
            promised = name in PROMISED
            ours = packed(name, total, device)
            found.append(
                Case(f"{name} decode {where}", ours, in_torch(best, total, device), best, bytes_moved=moved,
                     only_reads=True, target=BEST_OF_TORCH if promised else None)
            )  # fmt: skip
            found.append(
                Case(f"{name} decode {where}", ours, dense(total, device), "our own dense", bytes_moved=moved,
                     only_reads=True, target=OWN_DENSE if promised else None)
            )  # fmt: skip
    return found


def randoms(total: int, device: torch.device) -> list[torch.Tensor]:
    shapes = ((1, 1, HEADS), (1, total, GROUPS), (1, total, GROUPS))
    return [torch.randn(*shape, WIDTH, device=device, dtype=torch.bfloat16) for shape in shapes]


@cache
def fastest(total: int, device: torch.device) -> str:
    """Of PyTorch's formulations, with keys and values heads first, which suits it best."""
    q, k, v = randoms(total, device)
    return decode_torch.fastest(q, *(x.transpose(1, 2).contiguous() for x in (k, v)), interleaved)


def in_torch(name: str, total: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q, k, v = randoms(total, device)
        k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
        return lambda: decode_torch.FORMULATIONS[name](q, k, v)

    return build


def dense(total: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q, k, v = randoms(total, device)
        return lambda: fastok.attention_decode(q, (k, v, None))

    return build


def heads_first(total: int, device: torch.device) -> Build:
    """Keys and values in memory as PyTorch gets them."""

    def build() -> Callable[[], Any]:
        q, k, v = randoms(total, device)
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        return lambda: fastok.attention_decode(q, (k, v, None))

    return build


def packed(name: str, total: int, device: torch.device) -> Build:
    def build() -> Callable[[], Any]:
        q, k, v = randoms(total, device)
        fmt, salient = KVFormat.preset(name), None
        if fmt.two_classes:
            salient = torch.rand(1, GROUPS, total, device=device) < fmt.salient
        held = fastok.kv_pack(k, v, fmt, salient=salient)
        return lambda: fastok.attention_decode(q, held)

    return build
