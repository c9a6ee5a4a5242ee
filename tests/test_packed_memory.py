"""What packed caches take of a process's memory, and when."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fastok import KVFormat, PackedKV
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

SCRIPT = Path(__file__).parents[1] / "bench" / "memory_kv.py"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's accounts")
def test_a_process_grows_by_what_the_cache_says() -> None:
    """8 layers of 32k tokens, then 100 steps, during which each buffer grows."""
    pytest.importorskip("transformers")
    ran = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True, timeout=300)
    prompt, steps = json.loads(ran.stdout)
    assert (prompt["tokens"], steps["tokens"]) == (32768, 32868)
    for told in (prompt, steps):
        assert told["grown"] == pytest.approx(told["nbytes"], rel=0.03)
    assert prompt["nbytes"] == pytest.approx(prompt["promised"], rel=0.01)
    # Memory grows by a 64th.
    assert steps["nbytes"] == pytest.approx(steps["promised"], rel=0.025)


def allocated(cache: PackedKV, k: Tensor, v: Tensor) -> int:
    """Bytes that appending takes from the allocator, be it for a moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        cache.append(k, v)
    events = profiled.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


@pytest.mark.parametrize("name", ["int8", "kivi-2", "vidkv-1.5/1.58"])
def test_appending_a_token_allocates_nothing_after_warming_up(name: str) -> None:
    """Nothing of any size: PyTorch makes a tensor of the one number added to the lengths, and a page has offsets."""
    fmt = KVFormat.preset(name)
    cache = PackedKV(fmt, 1, 8, 128, dtype=torch.bfloat16).reserve(fmt.hot + 4 * fmt.page)
    tokens = torch.randn(2, fmt.hot + 4 * fmt.page - 1, 1, 1, 8, 128).bfloat16()
    for k, v in zip(*tokens[:, : fmt.hot + fmt.page + 1], strict=True):
        cache.append(k, v)
    assert cache.n_pages == 1
    for k, v in zip(*tokens[:, fmt.hot + fmt.page + 1 :][:, : fmt.page + 1], strict=True):
        before = cache.n_pages
        taken = allocated(cache, k, v)
        assert taken <= (16 if cache.n_pages == before else 512)
    assert cache.n_pages == 2


def test_data_grows_by_little_and_seldom() -> None:
    cache, seen = PackedKV("kivi-2", 1, 2, 64), []
    k = torch.randn(1, 64, 2, 64)
    pages = 1024
    for _ in range(pages):
        cache.append(k, k)
        if not seen or seen[-1] is not cache.data:
            seen.append(cache.data)
    used = cache.n_pages * 2 * cache.layout.full_record()
    assert cache.data.numel() <= used * 65 / 64 + 4 * 2 * cache.layout.full_record()
    assert len(seen) <= 64 + 64 * 1.5  # every fourth page up to 256 pages, then by a 64th: log(4) / log(65 / 64) = 89
    assert torch.equal(cache.record(0, 1, 0), cache.record(0, 1, pages - 4))
