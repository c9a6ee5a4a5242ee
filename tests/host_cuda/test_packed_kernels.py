"""CUDA's kernels for packed caches read nothing outside the arrays, whatever a directory or a page holds."""

import pytest
import torch
from fastok import PackedKV
from kv_cases import FORMATS, packed
from torch import Tensor

host_cuda = pytest.importorskip("host_cuda", reason="the harness was not built", exc_type=ImportError)


def made(name: str, pages: int = 3, width: int = 64) -> PackedKV:
    fmt = FORMATS[name]
    return packed(name, 1, pages * fmt.page + fmt.hot + 1, 2, width)[0]


def decode(q: Tensor, cache: PackedKV, directory: tuple[Tensor, ...], tokens: Tensor | None = None) -> list[Tensor]:
    return list(
        host_cuda.decode_packed(q, *directory, *cache.arguments[3:], cache.format.flat, 0.125, 0.0, None, tokens)
    )


@pytest.mark.parametrize("name", ["kivi-2", "two classes, per token"])
@pytest.mark.parametrize("spoilt", ["no multiple of 16", "before the data", "behind the data", "data cut off"])
def test_pages_that_contradict_the_data_are_skipped(spoilt: str, name: str) -> None:
    cache, page = made(name), FORMATS[name].page
    data, offset, counts = cache.data, cache.offset.clone(), cache.counts
    bad = torch.zeros(2, 3, dtype=torch.bool)
    if spoilt == "data cut off":  # in the last record
        bad[1, 2], data = True, data[: int(offset[0, 1, 2]) + 16]
    else:
        wrong = {"no multiple of 16": int(offset[0, 1, 1]) + 8, "before the data": -1024, "behind the data": 2**40}
        bad[1, 1], offset[0, 1, 1] = True, wrong[spoilt]
    directory = (data, offset, counts)
    total = int(cache.seq_lens.max())
    k, _ = host_cuda.kv_unseal(*directory, *cache.arguments[3:], cache.format.flat, total)
    pages = k[0, : 3 * page].unflatten(0, (3, page)).permute(2, 0, 1, 3)
    assert (pages[bad] == 0).all()
    assert (pages[~bad] != 0).any(-1).any(-1).all()
    # To decode they are as tokens that are not listed.
    q = torch.randn(1, 1, 4, 64)
    place = torch.arange(total).expand(2, -1)
    hidden = torch.nn.functional.pad(bad.repeat_interleave(page, 1), (0, total - 3 * page))
    tokens = torch.where(hidden, -1, place)[None]
    wanted = decode(q, cache, cache.arguments[:3], tokens)
    for got, same in zip(decode(q, cache, directory), wanted, strict=True):
        torch.testing.assert_close(got, same)


@pytest.mark.parametrize("name", ["kivi-2", "zipcache-4/2"])
def test_counts_beyond_a_group_stay_within_the_data(name: str) -> None:
    cache = made(name)
    data, offset, counts = cache.arguments[:3]
    for wrong in (counts + 1, -counts, torch.full_like(counts, 2**15 - 1)):
        out, lse = decode(torch.randn(1, 2, 4, 64), cache, (data, offset, wrong))
        assert torch.isfinite(out).all()
        assert torch.isfinite(lse).all()


@pytest.mark.parametrize("name", ["kivi-2", "vidkv-1.5/1.58", "compat", "1.25", "two classes, per token"])
def test_any_bytes_can_be_read(name: str) -> None:
    cache = made(name, 1, 72)
    cache.data.random_(0, 256)
    host_cuda.decode_packed(torch.randn(1, 1, 2, 72), *cache.arguments, cache.format.flat, 0.125, 0.0, None, None)
    host_cuda.kv_unseal(*cache.arguments, cache.format.flat, int(cache.seq_lens.max()))
