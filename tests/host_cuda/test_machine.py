"""What the host machine offers kernels (features.cuh), against plain Python; schedules change no result."""

import itertools

import pytest
import torch

host = pytest.importorskip("host_cuda")
merge = pytest.importorskip("fastok.reference.merge")

SEEDS = 20


def run(kernel, x, out, **options):
    return host.sample(kernel, x, out, **options)


def ints(*shape):
    return torch.empty(shape, dtype=torch.int32)


@pytest.fixture(autouse=True, params=range(3))
def _schedule(request):
    host.seed = 100 * request.param


# ---- indices, barriers, collectives, atomics -------------------------------------------------------------------------


def test_indices():
    out = run("indices", ints(1), ints(2 * 3 * 2, 64, 9), grid=(2, 3, 2), block=(4, 8, 2))
    spec = [
        (bx, by, bz, tx, ty, tz, 3, 4, 8)
        for bz, by, bx in itertools.product(range(2), range(3), range(2))
        for tz, ty, tx in itertools.product(range(2), range(8), range(4))
    ]
    assert torch.equal(out.reshape(-1, 9), torch.tensor(spec, dtype=torch.int32))


@pytest.mark.parametrize("positive", [0, 1, 37, 96])
def test_block_votes(positive):
    x = (torch.randperm(96) < positive).int()
    out = run("block_votes", x, ints(96, 4), block=(96, 1, 1))
    assert torch.equal(out, torch.tensor([positive, positive == 96, positive > 0, 0]).int().expand(96, 4))


def signed(x):
    return (x & 0xFFFFFFFF) - (x >> 31 & 1) * 2**32


@pytest.mark.parametrize("equal", [False, True])
def test_collectives_of_half_warps(equal):
    x = torch.full((64,), 5).int() if equal else torch.randint(-3, 4, (64,)).int()
    out = run("collectives", x, ints(64, 14)).tolist()
    for t, row in enumerate(out):
        base, lane, first = t // 32 * 32, t % 32, t % 32 // 16 * 16
        segment = lane // 8 * 8
        values = x[base : base + 32].tolist()
        half = range(first, first + 16)
        both = ones = odd = None
        for i in half:
            both = values[i] if both is None else both & values[i]
            ones = values[i] if ones is None else ones | values[i]
            odd = values[i] if odd is None else odd ^ values[i]
        peers = [i for i in half if values[i] == values[lane]]
        xor = lane ^ 5
        assert row == [
            values[segment + 3],
            values[lane - 3 if lane - 3 >= segment else lane],
            values[lane + 3 if lane + 3 < segment + 8 else lane],
            values[xor],
            signed(sum(1 << i for i in half if values[i] > 1)),
            int(any(values[i] > 8 for i in half)),
            1,
            signed(sum(1 << i for i in peers)),
            signed(sum(1 << i for i in half)) if len(peers) == 16 else 0,
            int(len(peers) == 16),
            sum(values[i] for i in half),
            min(values[i] for i in half),
            max(values[i] for i in half),
            signed(both ^ ones ^ odd),
        ], t


def test_exited_lanes_take_no_part():
    out = run("vote_of_the_rest", ints(1), ints(64))
    assert torch.equal(out, (torch.arange(64) % 32 >= 16).int() * signed(0xFFFF0000))


def test_atomics():
    x = torch.randint(-1000, 1000, (64,)).int()
    out = run("atomics", x, ints(10), zeroed=40)
    ones = odd = 0
    for value in x.tolist():
        ones, odd = ones | value, odd ^ value
    power = signed(pow(3, 64, 2**32))
    assert out[:6].tolist() == [x.sum(), min(x.min(), 0), max(x.max(), 0), ones, odd, 64 % 10]
    assert out[6:8].view(torch.int64).item() == x.sum().item() << 20
    assert out[8:9].view(torch.float32).item() == 32
    assert out[9].item() == power


def test_named_barriers():
    x = torch.randint(0, 100, (128,)).int()
    assert torch.equal(
        run("named_barriers", x, ints(128), block=(128, 1, 1), shared_bytes=512), x.reshape(2, 64).flip(1).flatten()
    )
    out = run("arrive", x[:64], ints(64), shared_bytes=128)
    assert torch.equal(out, torch.cat((x[32:64], torch.zeros(32).int())))


def test_flag_in_place_of_a_barrier():
    out = run("flag", ints(1), ints(64), shared_bytes=32)
    assert out.nonzero().tolist() == [[32]]
    assert out[32] == 5


def test_wide_ticket():
    assert run("wide_ticket", ints(1), ints(2), grid=(9, 1, 1), zeroed=8).tolist() == [0, 0]


@pytest.mark.parametrize("blocks", [1, 2, 5, 8])
def test_clusters(blocks):
    """What goes round is every block's in turn, by loads and by stores; clusters know nothing of each other."""
    x = torch.randint(0, 1000, (3 * blocks, 64)).int()
    out = run(
        "cluster_ring", x, ints(3 * blocks, 64, 2), n=blocks, cluster=blocks, grid=(3 * blocks, 1, 1), shared_bytes=512
    )
    handed = x.view(3, blocks, 64).roll(-1, 1).reshape(3 * blocks, 64)
    assert torch.equal(out[..., 0], handed)
    assert torch.equal(out[..., 1], torch.arange(3 * blocks).remainder(blocks)[:, None].expand(-1, 64).int())


def test_arriving_and_waiting():
    out = run("cluster_split", ints(1), ints(2, 4, 64), cluster=2, grid=(4, 1, 1), shared_bytes=256)
    assert torch.equal(out[0], torch.arange(4)[:, None].expand(4, 64).int())
    assert torch.equal(out[1], 100 * (torch.arange(4) ^ 1)[:, None].int() + torch.arange(63, -1, -1).int())


def test_a_fence_after_the_cluster_s_barrier_is_for_all_of_it():
    out = run("cluster_ticket", ints(1), ints(13), n=4, cluster=4, grid=(12, 1, 1), shared_bytes=16, zeroed=4)
    assert out.tolist() == [12] + [1] * 12


# ---- host bodies of csrc/ptx -----------------------------------------------------------------------------------------


def test_copy_groups():
    x = torch.randint(1, 100, (256,)).int()
    out = run("copy_groups", x, ints(256), block=(32, 1, 1), shared_bytes=1024)
    x[128:132] = 0  # the copy that was not valid
    assert torch.equal(out, x)


def test_static_arrays():
    x = torch.randint(1, 100, (64,)).int()
    out = run("static_arrays", x, ints(64), block=(64, 1, 1), shared_bytes=256)
    assert torch.equal(out, x.flip(0))


def test_matrices():
    x = torch.randint(-(2**15), 2**15, (4, 8, 8)).short()
    out = run("matrices", x, torch.empty((7, 8, 8), dtype=torch.int16), block=(32, 1, 1), shared_bytes=1024)
    assert torch.equal(out, torch.cat((x.mT, x[:2].mT, x[:1])))


def test_transposed_matrices():
    x = torch.randint(0, 2**15, (4, 8, 8)).to(torch.int16)
    out = run("transposed_matrices", x, torch.empty_like(x), block=(32, 1, 1), shared_bytes=512)
    assert torch.equal(out, x.mT)


def test_conversions():
    x = 40 * torch.randn(32, 2)
    x[0] = torch.tensor([float("inf"), -float("inf")])
    x[1] = torch.tensor([1e-6, -130.0])
    out = run("conversions", x, torch.empty(3, 32), block=(32, 1, 1))
    assert torch.equal(out[0].view(torch.float16).view(32, 2), x.half())
    assert torch.equal(out[1].view(torch.bfloat16).view(32, 2), x.bfloat16())
    power = torch.where(x[:, 1] < -126, 0, torch.exp2(x[:, 1]))
    torch.testing.assert_close(out[2], power, rtol=1e-6, atol=0)


def test_rounding_to_integers():
    exact = {0.5: 0, 1.5: 2, -2.5: -2, 2.4: 2, -0.6: -1, 2.0**24 - 1: 2**24 - 1, float("nan"): 0}
    exact |= {3e9: 2**31 - 1, float("inf"): 2**31 - 1, -(2.0**31): -(2**31), -float("inf"): -(2**31)}
    x = torch.tensor(list(exact) + [0.0] * (32 - len(exact)))
    out = run("rounding", x, ints(32), block=(32, 1, 1))
    assert out.tolist() == list(exact.values()) + [0] * (32 - len(exact))


@pytest.mark.parametrize("kind", ["f16", "bf16", "tf32"])
def test_products(kind):
    """D + A B with exact products and one rounding; fp32 operands are rounded to tf32 first."""
    dtype, depth = {"f16": (torch.float16, 16), "bf16": (torch.bfloat16, 16), "tf32": (torch.float32, 8)}[kind]
    a, b, d = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype), torch.randn(16, 8)
    x = torch.cat([part.flatten().view(torch.uint8) for part in (a, b, d)])
    out = run(f"product {kind}", x, torch.empty(16, 8), block=(32, 1, 1))
    if kind == "tf32":
        bits = torch.cat((a, b)).view(torch.int32)
        a, b = ((bits + 0x1000) & ~0x1FFF).view(torch.float32).split((16, 8))
        assert (torch.cat((a, b)).view(torch.int32) != bits).any()
    assert torch.equal(out, (d.double() + a.double() @ b.double().mT).float())


def test_copied_tiles_and_products_of_a_warpgroup():
    """D = A B by rows, then D C by columns, from tiles that reach beyond the array."""
    x = torch.randn(192, 72).half()
    a, b, c = x.double().split(64)
    out = run("tile_products", x, torch.empty(128, 64), block=(128, 1, 1), shared_bytes=5 * 8192 + 16)
    torch.testing.assert_close(out[:64].double(), a @ b.mT, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out[64:].double(), out[:64].half().double() @ c[:, :64], rtol=1e-6, atol=1e-4)


def test_products_are_not_there_early():
    out = run("late_product", ints(1), torch.empty(128, 2), block=(128, 1, 1), shared_bytes=8192)
    assert torch.equal(out, torch.tensor([0.0, 16.0]).expand(128, 2))


def halves():
    return torch.arange(2**16).to(torch.uint16).view(torch.float16)


def same_bits(ours, spec):
    """Equal, bit by bit, where the specification is a number; NaN where it is not."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[spec.element_size()]
    nan = spec.float().isnan()
    assert torch.equal(ours.float().isnan(), nan)
    assert torch.equal(ours.view(bits)[~nan], spec.view(bits)[~nan])


def test_half_conversions_exhaustively():
    x = halves()
    wide = torch.tensor([host.native.half_to_float(i) for i in range(2**16)])
    same_bits(wide, x.float())
    # Every half, both its neighbours in fp32, and the midpoints to the next half.
    finite = x[x.isfinite()].float()
    middle = (finite + torch.nextafter(finite.half(), torch.tensor(float("inf")).half()).float()) / 2
    points = torch.cat((finite, middle, torch.nextafter(middle, finite), torch.tensor([65519.9, 65520.0, 1e30, 1e-30])))
    ours = torch.tensor([host.native.float_to_half(i) for i in points.tolist()]).to(torch.uint16).view(torch.float16)
    same_bits(ours, points.half())
    brain = torch.tensor([host.native.float_to_bfloat16(i) for i in points.tolist()]).to(torch.uint16)
    same_bits(brain.view(torch.bfloat16), points.bfloat16())


@pytest.mark.parametrize("e5m2", [False, True])
def test_fp8_conversions_exhaustively(e5m2):
    dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
    x = torch.arange(256).to(torch.uint8).view(dtype)
    wide = torch.tensor([host.native.fp8_to_half(i, e5m2) for i in range(256)]).to(torch.uint16).view(torch.float16)
    same_bits(wide, x.half())
    points = halves()[halves().abs() <= torch.finfo(dtype).max].float()  # beyond, torch and CUDA differ
    ours = [host.native.float_to_fp8(i, e5m2, False) for i in points.tolist()]
    same_bits(torch.tensor(ours).to(torch.uint8).view(dtype), points.to(dtype))
    largest = torch.finfo(dtype).max
    for value, saturate, spec in (
        (1e30, True, largest),
        (-1e30, True, -largest),
        (float("inf"), True, largest),
        (float("-inf"), False, float("-inf") if e5m2 else float("nan")),
    ):
        bits = torch.tensor([host.native.float_to_fp8(value, e5m2, saturate)]).to(torch.uint8)
        torch.testing.assert_close(bits.view(dtype).float(), torch.tensor([spec]), equal_nan=True)


# ---- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("_schedule", [0], indirect=True)
def test_kernels_give_the_same_on_every_schedule():
    """Bitwise: match in one launch and in three, nearest, maps, merge and back."""
    metric, x = torch.randn(2, 150, 40), torch.randn(2, 90, 24)
    many = torch.randn(1, 4200, 4).half()
    assign = torch.randint(-1, 30, (2, 90)).int()
    maps = (assign, *merge.build_map(assign, 30))
    size = torch.rand(2, 90)
    first = None
    for host.seed in range(SEEDS):
        y, size_out = host.merge(x, *maps, size, "mean")
        results = [
            *host.match_map(metric, 40, 1, None, None, None, None, False, True),
            *host.match_map(metric, 40, 1, 0.1, None, None, None, True, True),
            *host.nearest(x, metric[..., :24], 5),
            *host.nearest(x, metric[..., :24], 1),
            *host.build_map(assign, 30),
            y,
            size_out,
            host.merge_backward(y, x, y, *maps, size, size_out, "mean"),
            host.unmerge(y, *maps, None),
        ]
        if host.seed < 2:
            results += host.match_map(many, 1000, 0, None, None, None, None, False, True)
        first = first or results
        for ours, spec in zip(results, first, strict=False):
            assert torch.equal(ours, spec), host.seed
