"""Packing a quantized KV cache: whole prompts against a plain copy, and one token at a time."""

import torch
from fastok import KVFormat, PackedKV, kv_pack
from fastok.testing.bench import Case

GROUPS, WIDTH = 8, 128
# Whole prompts: format, tokens, promised share of a copy that moves as many bytes.
PROMPTS = [
    ("kivi-2", 32768, 0.4),
    ("kivi-4", 32768, None),
    ("vidkv-1.5/1.58", 8192, None),
    ("vidkv-1.5/1.66", 8192, None),
    ("zipcache-4/2", 8192, None),
]


def cases(device: torch.device) -> list[Case]:
    found = [prompt(*row, device) for row in PROMPTS]
    return [*found, append("kivi-2", device)]


def prompt(name: str, total: int, target: float | None, device: torch.device) -> Case:
    """Rival: a copy that reads and writes as many bytes as packing does."""
    fmt = KVFormat.preset(name)
    dense = 2 * total * GROUPS * WIDTH * 2
    moved = int(dense * (1 + sum(fmt.bits_per_element(WIDTH)) / 32))

    def ours():
        k, v = (torch.randn(1, total, GROUPS, WIDTH, device=device).bfloat16() for _ in range(2))
        salient = torch.rand(1, GROUPS, total, device=device) < fmt.salient if fmt.two_classes else None
        return lambda: kv_pack(k, v, fmt, salient=salient)

    def rival():
        source = torch.zeros(moved // 2, dtype=torch.uint8, device=device)
        copy = torch.zeros_like(source)
        return lambda: copy.copy_(source)

    return Case(
        f"kv_pack {name} T={total} {GROUPS} heads D={WIDTH} bf16", ours, rival, "copy of as many bytes",
        bytes_moved=moved, dtype=torch.bfloat16, target=target,
    )  # fmt: skip


def append(name: str, device: torch.device) -> Case:
    """Rival: the same token into a dense cache that has room for it."""
    fmt = KVFormat.preset(name)

    def token() -> list[torch.Tensor]:
        return [torch.randn(1, 1, GROUPS, WIDTH, device=device).bfloat16() for _ in range(2)]

    def empty() -> PackedKV:
        return PackedKV(fmt, 1, GROUPS, WIDTH, dtype=torch.bfloat16, device=device).reserve(8192)

    def ours():
        caches = [empty()]
        k, v = token()

        def run() -> None:  # the sealing of a page in 64 included, all memory taken before
            if caches[0].n_pages == 8192 // fmt.page - 3:
                caches[0] = empty()
            caches[0].append(k, v)

        return run

    def rival():
        k, v = token()
        dense = [torch.zeros(1, 4096, GROUPS, WIDTH, device=device).bfloat16() for _ in range(2)]

        def run() -> None:
            for x, new in zip(dense, (k, v), strict=True):
                x[:, 77:78] = new

        return run

    return Case(
        f"append {name} one token, {GROUPS} heads D={WIDTH} bf16", ours, rival, "into a dense cache", on_host=True
    )
