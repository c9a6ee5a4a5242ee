"""The kernels of attention's gradient on the host SIMT machine: every instance, several tiles, packed sequences.

What the gradient means is tested in tests/test_attention_backward.py, which this machine serves as a backend.
"""

import itertools

import pytest
import torch

host = pytest.importorskip("host_cuda")
reference = pytest.importorskip("fastok.reference.attention")
examples = pytest.importorskip("fastok.testing.examples")

from host_cuda.test_attention_kernels import DTYPES, inputs, masking, offsets  # noqa: E402


def check(q, k, v, *mask, with_lse=True):
    """The gradients, compared with the specification's in fp64."""
    out, lse = reference.attention(q, k, v, *mask)
    arguments = torch.randn(out.shape).to(q.dtype), torch.randn(lse.shape) if with_lse else None, q, k, v, out, lse
    result = host.attention_backward(*arguments, *mask)
    examples.verify("attention_backward", (*arguments, *mask), result)
    return (*arguments, *mask), result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "v_width"), [(8, 8), (64, 40), (72, 128), (96, 96), (136, 256), (256, 16)])
def test_every_instance(dtype, width, v_width):
    check(*inputs(dtype, 35, 70, width=width, v_width=v_width), *masking(width, left=30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("left", "right"), [(-1, -1), (-1, 0), (20, 70), (0, 3)])
def test_several_tiles(dtype, left, right):
    mask = masking(40, left=left, right=right)
    arguments, whole = check(*inputs(dtype, 150, 131, heads=2, groups=1, width=40, batch=(2,)), *mask)
    alone = [x[1:] if isinstance(x, torch.Tensor) else x for x in arguments]
    for part, expected in zip(host.attention_backward(*alone)[:3], whole, strict=False):
        assert torch.equal(part, expected[1:])


@pytest.mark.parametrize("heads", [(), (4,)])
@pytest.mark.parametrize("width", [64, 256])
def test_bias_of_all_heads_or_of_each(heads, width):
    """A bias that all heads share is summed over KV heads by a kernel of its own."""
    bias = torch.randn(2, *heads, 70)
    bias[..., 5:9] = -float("inf")
    mask = masking(width, right=-1, softcap=2.0, key_bias=bias)
    check(*inputs(torch.float16, 20, 70, heads=4, groups=2, width=width, batch=(2,)), *mask, with_lse=False)


def test_packed_sequences():
    mask = masking(64, cu_q=offsets(9, 0, 70, 1), cu_k=offsets(80, 20, 0, 66), key_bias=torch.randn(170))
    check(*inputs(torch.bfloat16, 83, 170, heads=4, groups=2, batch=()), *mask)  # and tokens behind the last


@pytest.mark.parametrize(("s", "t"), [(0, 20), (20, 0)])
def test_nobody_there(s, t):
    mask = masking(64, key_bias=torch.randn(1, 2, t))
    for part in check(*inputs(torch.float16, s, t), *mask)[1]:
        assert not part.any()


def test_schedule_changes_no_result():
    mask = masking(64, key_bias=torch.randn(1, 140))
    arguments, _ = check(*inputs(torch.bfloat16, 130, 140, heads=4, groups=2), *mask)
    found = []
    for host.seed in (0, 1000, 2000):
        found.append(host.attention_backward(*arguments))
    for again, first in itertools.product(found[1:], found[:1]):
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
