"""Each detector of the host machine finds the bug planted for it (planted.cuh and its like) and says where.

Correct twins pass.
"""

import re

import pytest
import torch

host = pytest.importorskip("host_cuda")

N = 64
SHARED = 4 * N + 64


def run(kernel, **options):
    """The kernel on 0, 1, 2, ... with a result for each of 64 threads."""
    x = options.pop("x", torch.arange(N, dtype=torch.int32))
    out = options.pop("out", torch.empty(N, dtype=torch.int32))
    return host.sample(kernel, x, out, **{"shared_bytes": SHARED, **options})


def line_of(kernel, text):
    """Where a planted kernel says ``text``."""
    for source in ("planted.cuh", "cluster_samples.cuh"):
        lines = (host.SOURCE / source).read_text().splitlines()
        begin = next((i for i, line in enumerate(lines) if f" {kernel}(" in line), len(lines))
        for i in range(begin, len(lines)):
            if text in lines[i]:
                return f"tests/host_cuda/{source}:{i + 1}"
    raise ValueError(f"{kernel} says no {text}")


# Kernel, what the report says, the source line it names, how to run it. Where any of several threads may be the first
# to be caught, the pattern leaves the number open.
BUGS = {
    "missing_barrier": (r"data race in shared memory\n  place .*'values'", "values[s.n - 1", {}),
    "missing_barrier_static": (r"data race in shared memory\n  place .*'values'", "values[s.n - 1", {}),
    "missing_syncwarp": (r"data race in shared memory\n  place .*'values'", "values[thread() ^ 31]", {}),
    "partial_syncwarp": (
        r"data race in shared memory\n  place     shared array 'values' at byte 0 of 4\n"
        r"(.|\n)* thread \(0, 0, 0\) of block \(0, 0, 0\), warp 0 lane 0\n",
        "= values[0]",
        {"block": (32, 1, 1), "out": torch.empty(32, dtype=torch.int32)},
    ),
    "arrive_without_wait": (
        r"data race in shared memory\n  place .* 'values' at byte \d+ of 256\n"
        r"(  read .*warp 1 lane (.|\n)*  write .* warp 0|  write .* warp 0 (.|\n)*  read .* warp 1)",
        None,
        {},
    ),
    "barrier_of_part_of_a_warp": (r"bar.sync of barrier 1 for 16 threads: barriers are", "bar_sync(1, k", {}),
    "same_value": (r"data race in shared memory\n  place     shared array 'flag' at byte 0 of 4", "flag[0] = 1", {}),
    "byte_race": (
        r"data race in shared memory\n  place     shared array 'bytes' at byte \d+ of 64",
        "thread() / 2",
        {},
    ),
    "plain_counter": (r"data race in global memory\n  place     global array out\[0\]", "s.to()[0] += 1", {}),
    "block_race": (
        r"data race between blocks\n  place     global array out\[63\]\n"
        r"  write .* thread \(0, 0, 0\) of block \(\d+, 0, 0\)(.|\n)*"
        r"  write     before that by thread \(0, 0, 0\) of block \(\d+, 0, 0\)",
        "s.n - 1",
        {"grid": (N, 1, 1)},
    ),
    "last_block": (
        r"data race between blocks\n  place     global array out\[\d\]\n"
        r"  read .* by thread \(2, 0, 0\) (.|\n)*  write     before that by thread \(1, 0, 0\)",
        "sum +=",
        {"grid": (6, 1, 1), "out": torch.empty(7, dtype=torch.int32), "zeroed": 4},
    ),
    "divergent_barrier": (r"divergent barrier: threads of the block are at different barriers", "__syncthreads()", {}),
    "early_exit": (
        r"divergent barrier: a thread (exits while others wait|has exited, and others wait)\n"
        r"  exite?[ds]    ? thread \(40, 0, 0\) of block \(0, 0, 0\), warp 1 lane 8",
        "__syncthreads()",
        {},
    ),
    "deadlock": (
        r"deadlock: all threads wait\n(.|\n)*  waits     33 threads in __syncthreads(.|\n)*"
        r"  waits     31 threads in __syncwarp",
        "__syncwarp()",
        {},
    ),
    "foreign_mask": (
        r"warp mask 0xffffffdf does not name the lane that gives it\n  caller    thread \(5, 0, 0\)|lanes disagree",
        "__syncwarp(",
        {},
    ),
    "unequal_masks": (r"lanes disagree(.|\n)*0x0000ffff(.|\n)*__shfl_xor_sync", "__shfl_xor_sync", {}),
    "unequal_collectives": (r"lanes disagree(.|\n)*(__ballot_sync|__any_sync)", "__ballot_sync", {}),
    "absent_source": (r"__shfl_sync reads lane 16, which takes no part", "__shfl_sync", {}),
    "shared_overrun": (
        r"access out of bounds\n  place     shared memory, \d+ bytes behind 'first' of 256 bytes\n  write     4 bytes",
        "first[thread()",
        {"shared_bytes": 512},
    ),
    "static_overrun": (
        r"access out of bounds\n  place     shared memory, \d+ bytes behind 'low' of 256 bytes\n  write     4 bytes",
        "low[thread()",
        {},
    ),
    "global_overrun": (
        r"access out of bounds\n  place     0 bytes behind 'in' of 256 bytes\n"
        r"  read      4 bytes by thread \(63, 0, 0\) of block \(0, 0, 0\), warp 1 lane 31",
        "s.from()[",
        {},
    ),
    "view_overrun": (
        r"access out of bounds\n  place     (between the rows of the view in\[\d+, 3\]|0 bytes behind 'in')",
        "s.from()[",
        {"x": torch.ones((N, 5), dtype=torch.int32)[:, :3]},
    ),
    "library_overrun": (
        r"access out of bounds\n  place     global array in\[0\]\n  read      260 bytes",
        "std::memcpy",
        {},
    ),
    "other_stack": (r"access out of bounds", "*pointer[0]", {}),
    "too_much_shared": (
        r"with 'second' the block uses 288 bytes, and the launch asked for 272",
        None,
        {"shared_bytes": 272},
    ),
    "input_write": (
        r"write to an input\n  place     global array in\[(\d+)\]\n  write .* thread \(\1, 0, 0\)",
        "const_cast",
        {},
    ),
    "uninitialised_shared": (
        r"read of uninitialised shared memory\n  place     shared array 'values' at byte 36 of 256\n"
        r"  read      4 bytes by thread \(9, 0, 0\)",
        "= values[",
        {},
    ),
    "stale_shared": (r"read of uninitialised shared memory\n  place     shared array 'after'", "= after[", {}),
    "unwritten_output": (r"output out\[11\] was never written", None, {}),
    "unwritten_read": (
        r"read of an output that has not been written\n  place     global array out\[(\d+)\]\n  read .* \(\1, 0, 0\)",
        "+= 1",
        {},
    ),
    "copy_without_wait": (
        r"access to shared memory that cp.async is still writing\n  place     shared array 'values'",
        "= values[i]",
        {"block": (32, 1, 1), "x": torch.arange(128).int(), "out": torch.empty(128).int(), "shared_bytes": 512},
    ),
    "copy_without_barrier": (
        r"access to shared memory that cp.async is still writing|read of uninitialised|data race in shared memory",
        "= values[i]",
        {"block": (32, 1, 1), "x": torch.arange(128).int(), "out": torch.empty(128).int(), "shared_bytes": 512},
    ),
    "misaligned_vector": (
        r"misaligned access\n  place     global array in\[3\]\n  read      16 bytes by thread \(0, 0, 0\)",
        "*reinterpret_cast",
        {},
    ),
    "misaligned_copy": (r"misaligned cp.async\n  place     global array in\[3\]", "cp_async_16(values, s.from() +", {}),
    "misaligned_atomic": (r"misaligned atomic\n  place     global array out\[1\]", "atomicAdd(", {}),
    "misaligned_matrix": (
        r"misaligned ldmatrix\n  place     shared array 'tile' at byte (\d+) of 640\n  read      16 bytes",
        "ldmatrix_x4(",
        {"block": (32, 1, 1), "out": torch.empty(32).int(), "shared_bytes": 640},
    ),
    "part_of_a_warp": (
        r"mma f16 needs all lanes of the warp, and some have exited",
        None,
        {"block": (32, 1, 1), "out": torch.empty(32).int()},
    ),
    "wide_shift": (r"undefined behaviour: shift(.|\n)*thread \(\d+, 0, 0\)", "1 <<", {}),
    "overflow": (r"undefined behaviour: signed multiplication overflows", "1 << 30", {}),
    "array_index": (r"undefined behaviour: index outside", "local[thread()", {}),
}
HOPPER = {
    "tile_without_wait": r"(data race in|read of uninitialised) shared memory\n  place .*'tile'",
    "misaligned_tile": r"a tile must begin at a multiple of 1024 bytes of shared memory: shared array 'tile' at byte 5",
    "bytes_that_never_come": r"deadlock(.|\n)*mbarrier, even phase",
    "mbarrier_not_initialised": r"use of an mbarrier that was not initialised\n  place     shared array 'barriers'",
    "released_before_the_product": r"data race in shared memory\n  place .*'tile'(.|\n)*wgmma_rows<f16, 64>",
    "product_never_waited_for": r"a thread exits and has not waited for its wgmma",
    "part_of_a_warpgroup": r"wgmma by some warps of warpgroup 0 only",
    "arrival_too_many": r"more arrivals than the phase of an mbarrier has\n  place     shared array 'barriers' at byte",
}
on_hopper = {"x": torch.ones(64, 64).half(), "block": (128, 1, 1), "shared_bytes": 2 * 8192 + 16}
BUGS |= {kernel: (pattern, None, on_hopper) for kernel, pattern in HOPPER.items()}
BETWEEN = r"data race between blocks of a cluster\n  place     shared array 'values{}"
CLUSTERS = {
    "read_without_cluster_barrier": (
        BETWEEN.format(
            r"' at byte \d+ of 256(.|\n)*  read(.|\n)*  write|' at byte \d+ of 256(.|\n)*  write(.|\n)*  read"
        ),
        "ld_shared_cluster(",
    ),
    "two_blocks_write": (
        BETWEEN.format("' at byte 0 of 256(, of block 3 of the cluster)?\n  write(.|\n)*  write     before that"),
        "st_shared_cluster(",
    ),
    "one_buffer_for_two_rounds": (BETWEEN.format("' at byte 0 of 8"), "sum += *value"),
    "written_after_arriving": (BETWEEN.format("'"), "if (!kCorrect) values"),
    "cluster_block_race": (
        r"data race between blocks of a cluster\n  place     global array out\[7\](.|\n)*"
        r"order     none between these blocks since they last met",
        "s.to()[kCorrect",
    ),
    "remote_overrun": (
        r"access out of bounds\n  place     shared memory, 0 bytes behind 'values' of 256 bytes, of block \d of the "
        r"cluster\n  read      4 bytes by thread \(63, 0, 0\)",
        "ld_shared_cluster(",
    ),
    "block_beyond_the_cluster": ("mapa to block 4 of a cluster of 4", "mapa(values"),
    "global_address_mapped": (r"mapa of what is not the block's shared memory: global array in\[0\]", "mapa(place"),
    "divided_differently": (
        r"blocks of a cluster divide their shared memory differently\n  place     shared array '(sums|values)'",
        "st_shared_cluster(",
    ),
    "uninitialised_remote": (
        r"read of uninitialised shared memory\n  place     shared array 'values' at byte 36 of 256, of block \d of the",
        "ld_shared_cluster(",
    ),
    "before_the_blocks_have_met": ("access to a block that may not have begun", "st_shared_cluster("),
    "exit_without_cluster_barrier": (
        "access to a block that has exited|a block exits while another may still be in its shared memory",
        "ld_shared_cluster(",
    ),
    "block_skips_the_cluster_barrier": (
        r"divergent cluster barrier: a thread (has exited, and others arrive|exits, and others have arrived)",
        None,
    ),
    "cluster_barrier_in_a_branch": (
        r"deadlock: all threads wait(.|\n)*  waits     128 threads in __syncthreads(.|\n)*"
        r"  waits     128 threads in barrier.cluster.wait",
        "__syncthreads",
    ),
    "wait_without_arrival": (
        r"a thread waits for the cluster's barrier, and has not arrived\n  thread    thread \(5, 0, 0\)",
        "barrier_cluster_wait",
    ),
    "arrival_without_wait": (
        r"a thread exits, and has not waited for the cluster's barrier\n  thread    thread \(5, 0, 0\)",
        None,
    ),
    "second_arrival": (
        r"arrives again at the cluster's barrier, and has not waited\n  thread    thread \(5, 0, 0\)",
        "if (!kCorrect && threadIdx.x == 5)",
    ),
}
in_clusters = {"cluster": 4, "grid": (8, 1, 1), "n": 4, "shared_bytes": 512}
in_clusters |= {"x": torch.arange(8 * N, dtype=torch.int32), "out": torch.empty(8 * N, dtype=torch.int32)}
BUGS |= {kernel: (*found, in_clusters) for kernel, found in CLUSTERS.items()}


@pytest.fixture(autouse=True, params=range(6))
def _schedule(request):
    host.seed = 100 * request.param


@pytest.mark.parametrize("kernel", BUGS)
def test_bug_is_found(kernel):
    pattern, text, options = BUGS[kernel]
    with pytest.raises(host.KernelError) as caught:
        run(kernel, **options)
    report = str(caught.value)
    assert re.search(pattern, report), report
    if text is not None:
        assert line_of(kernel, text) in report, report
    if kernel != "unwritten_output":  # found after the launch
        assert f"kernel    {kernel}<false>, grid " in report, report
        assert f"host_cuda.seed = {host.seed}, launch 0" in report, report


# Where the result is more than that nothing was found.
RESULTS = {
    "missing_barrier": torch.arange(N - 1, -1, -1),
    "missing_barrier_static": torch.arange(N - 1, -1, -1),
    "missing_syncwarp": torch.arange(N) ^ 31,
    "partial_syncwarp": torch.full((32,), 7),
    "same_value": torch.ones(N),
    "block_race": torch.arange(N),
    "last_block": torch.tensor([15, 0, 1, 2, 3, 4, 5]),
    "plain_counter": torch.tensor([N] + [0] * (N - 1)),
    "unequal_masks": torch.arange(N) ^ 1,
    "library_overrun": torch.arange(N),
    "view_overrun": torch.full((N,), 3),
    "stale_shared": torch.full((N,), 2),
    "copy_without_wait": torch.arange(128),
    "copy_without_barrier": torch.arange(128),
    "read_without_cluster_barrier": torch.arange(8 * N).view(4, 2, N).flip(1).flatten(),
    "one_buffer_for_two_rounds": torch.full((8 * N,), 3),
    "divided_differently": torch.ones(8 * N),
}


@pytest.mark.parametrize("kernel", BUGS)
def test_correct_twin_passes(kernel):
    out = run(f"{kernel} (correct)", **BUGS[kernel][2])
    if kernel in RESULTS:
        assert torch.equal(out, RESULTS[kernel].int())


def test_race_names_both_threads_and_the_element():
    """In out[t] = values[63 - t] the reader of element i is thread 63 - i, and its writer thread i."""
    with pytest.raises(host.KernelError) as caught:
        run("missing_barrier")
    report = str(caught.value)
    element = int(re.search(r"at byte (\d+) of 256", report)[1]) // 4
    parties = {kind: int(t) for kind, t in re.findall(r"  (read|write) .*by thread \((\d+), 0, 0\)", report)}
    assert parties == {"read": N - 1 - element, "write": element}
    assert line_of("missing_barrier", "values[thread()] = s.from()") in report
    assert f"none since barrier 1 of the block, at {line_of('missing_barrier', '__syncthreads')}" in report


def test_report_is_the_same_for_the_same_seed():
    reports = []
    for _ in range(2):
        with pytest.raises(host.KernelError) as caught:
            run("missing_barrier")
        reports.append(str(caught.value))
    assert reports[0] == reports[1]


def test_machine_works_again_after_a_report():
    with pytest.raises(host.KernelError):
        run("deadlock")
    assert torch.equal(run("missing_barrier (correct)"), torch.arange(N - 1, -1, -1, dtype=torch.int32))


def test_races_can_be_allowed():
    with host.races_allowed():
        run("same_value")
        with pytest.raises(host.KernelError, match="out of bounds"):
            run("global_overrun")
    with pytest.raises(host.KernelError, match="data race"):
        run("same_value")


def test_impossible_launches_are_refused():
    for options, reason in (
        ({"grid": (0, 1, 1)}, "a grid of no blocks"),
        ({"grid": (1, 1, 65536)}, "a grid of more than 65535"),
        ({"block": (33, 1, 1)}, "a block of 33 threads"),
        ({"block": (2048, 1, 1)}, "a block of 2048 threads"),
        ({"shared_bytes": 100 << 10}, "102400 bytes of shared memory"),
        ({"cluster": 0}, "clusters of 0 blocks"),
        ({"cluster": 16, "grid": (16, 1, 1)}, "clusters of 16 blocks: must be 1 to 8, and divide the grid in x"),
        ({"cluster": 2, "grid": (3, 2, 1)}, "clusters of 2 blocks"),
    ):
        with pytest.raises(host.KernelError, match=reason):
            run("unwritten_output (correct)", **options)
