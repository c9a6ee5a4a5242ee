"""``Window`` against lists, and ``HostKV`` against `DenseKV`: any sequence of operations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fastok.caches import memory
from fastok.caches.dense import DenseKV
from fastok.caches.host import HostKV
from fastok.caches.window import Window
from fastok.testing import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

B, G, D = 2, 2, 3


class Lists:
    """What a `Window` means: for each sample, its stream as (column, padding)."""

    def __init__(self, sink: int, recent: int) -> None:
        self.sink, self.recent = sink, recent
        self.streams: list[list[bool]] = [[] for _ in range(B)]

    def state(self, row: int) -> tuple[list[int], list[int], list[int]]:
        """Columns of sinks, of tokens in the window, of tokens that are gone."""
        stream = self.streams[row]
        begin = max(len(stream) - self.recent, 0)
        left = [column for column in range(begin) if not stream[column]]
        there = [column for column in range(begin, len(stream)) if not stream[column]]
        return left[: self.sink], there, left[self.sink :]


def column_of(x: Tensor) -> list[int]:
    """Columns that were written as values ``[n,D]``."""
    return [int(value) for value in x[:, 0]]


operations = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.integers(1, 12), st.sampled_from(["none", "left", "any"]), st.integers(0, 99)),
        st.tuples(st.just("crop"), st.integers(0, 6)),
        st.tuples(st.just("select"), st.sampled_from([(0, 1), (1, 0), (1, 1)])),
    ),
    max_size=12,
)


@given(st.integers(0, 4), st.integers(1, 7), operations)
@settings(max_examples=150)
def test_a_window_is_what_its_lists_are(sink: int, recent: int, steps: list[Any]) -> None:
    window = Window(sink, recent, torch.zeros(B, G, 1, D), torch.zeros(B, G, 1, D + 1))
    lists, size = Lists(sink, recent), window.k.numel()
    for name, *how in steps:
        if name == "push":
            count, padding, seed = how
            begin = len(lists.streams[0])
            column = torch.arange(begin, begin + count, dtype=torch.float32)[:, None]
            k, v = column.expand(B, G, count, D), -column.expand(B, G, count, D + 1)
            hidden = {
                "none": None,
                "left": torch.arange(count).expand(B, -1) < torch.tensor([[0], [count // 2]]),
                "any": torch.rand(B, count, generator=torch.Generator().manual_seed(seed)) < 0.4,
            }[padding]
            before = [set(lists.state(row)[2]) for row in range(B)]
            gone = window.push(k, v, hidden)
            for row in range(B):
                lists.streams[row] += [False] * count if hidden is None else hidden[row].tolist()
                now = sorted(set(lists.state(row)[2]) - before[row])
                assert now == ([] if gone is None else column_of(gone.k[row, 0][gone.counts[row]]))
        elif name == "crop":
            length = max(len(lists.streams[0]) - how[0], 0)
            if length == len(lists.streams[0]):
                window.crop(length)
            elif any(lists.state(row)[2] for row in range(B)):
                with pytest.raises(NotImplementedError, match="crop"):
                    window.crop(length)
            else:
                window.crop(length)
                lists.streams = [stream[:length] for stream in lists.streams]
        else:
            window.select(torch.tensor(how[0]))
            lists.streams = [list(lists.streams[row]) for row in how[0]]
        check(window, lists)
    assert window.k.numel() == size


def check(window: Window, lists: Lists) -> None:
    place, bias = window.places()
    place = place.expand(B, -1)
    for row in range(B):
        sinks, there, _ = lists.state(row)
        seen = torch.ones_like(place[row], dtype=torch.bool) if bias is None else bias[row] == 0
        order = place[row][seen].argsort()
        assert_same(place[row][seen][order], torch.arange(len(sinks) + len(there)))
        for part, sign in ((window.k, 1), (window.v, -1)):
            assert column_of(sign * part[row, 1][seen][order]) == sinks + there
        assert window.sink_column[row].tolist() == sinks + [-1] * (window.sink - len(sinks))
        k, _, hidden = window.newest()
        kept = k[row, 0] if hidden is None else k[row, 0][~hidden[row]]
        assert column_of(kept) == there


@given(st.lists(st.integers(0, 9), min_size=1, max_size=10), st.integers(0, 99))
def test_host_memory_holds_the_same(steps: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    host, device = HostKV(), DenseKV()
    for step in steps:
        if step == 8 and device.length:
            host.crop(device.length // 2)
            device.crop(device.length // 2)
        elif step == 9 and device.length:
            host.select(torch.tensor([1, 1]))
            device.select(torch.tensor([1, 1]))
        else:
            k, v = (torch.randn(B, step, G, width, generator=generator) for width in (D, D + 1))
            host.append(k, v)
            device.append(k, v)
    for got, wanted in zip(host.all(torch.device("cpu")), (device.k, device.v), strict=True):
        assert_same(got, wanted)
    if device.length:
        tokens = torch.randint(device.length, (B, 2 * G, 5), generator=generator)
        index = tokens[..., None]
        for got, part in zip(host.rows(tokens, torch.device("cpu")), (device.k, device.v), strict=True):
            of_head = part.transpose(1, 2).repeat_interleave(2, 1)
            assert_same(got, of_head.gather(2, index.expand(-1, -1, -1, part.shape[3])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_memory_is_in_huge_pages_and_small_is_not(dtype: torch.dtype) -> None:
    like = torch.zeros(1, dtype=dtype)
    small, large = memory.empty(like, (3, 5)), memory.empty(like, (3, memory.LEAST))
    assert small.shape == (3, 5)
    assert large.shape == (3, memory.LEAST)
    assert small.dtype == large.dtype == dtype
    large.fill_(1)
    assert int(large[::2, ::9999].sum(dtype=torch.float64)) == large[::2, ::9999].numel()
    advised = flags_of(large.data_ptr())
    if advised is None:
        pytest.skip("the system does not tell")
    assert "hg" in advised
    address = large.data_ptr()
    del large
    assert "hg" not in (flags_of(address) or "")  # given back


def flags_of(address: int) -> str | None:
    """What Linux knows about the memory at ``address``."""
    try:
        regions = Path("/proc/self/smaps").read_text()
    except OSError:
        return None
    found = None
    for line in regions.splitlines():
        bounds = line.split(" ")[0].split("-")
        if len(bounds) == 2:
            inside = int(bounds[0], 16) <= address < int(bounds[1], 16)
        elif line.startswith("VmFlags") and inside:
            found = line
    return found
