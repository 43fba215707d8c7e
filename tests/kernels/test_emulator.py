"""The emulator that other tests run CUDA C++ kernels in: what it computes and what it catches."""

import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from emulator import build

BYTES = 1024
THREADS = 128
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

# What is said of each faulty kernel of tests/emulator/samples.
# Which of a race's two sides comes second, and is told, is the seed's matter.
EITHER = r"(reads|overwrites) what (another warp|warp \d) (wrote|read) by .*, without __syncthreads"
FAULTS = {
    "read_other_warp!": rf"(load|store)_shared .*: shared bytes \d+ to \d+: {EITHER}",
    "overwrite_other_warp!": EITHER,
    "overwrite_what_all_read!": EITHER,
    "copy_over_what_was_read!": EITHER,
    "write_same!": r"store_shared .* overwrites what warp \d wrote by store_shared",
    "read_other_lane!": r"reads what lane \d+ of this warp wrote by .*, without __syncwarp",
    "overwrite_other_lane!": r"overwrites what another lane of this warp read .* __syncwarp",
    "ldmatrix_of_own_stores!": r"ldmatrix_x4 .* reads what lane \d+ of this warp wrote",
    "copy_and_read_too_early!": r"reads what lane \d+ of warp \d copies there, for which no",
    "copy_and_read_uncommitted!": r"reads what lane \d+ of warp \d copies there",
    "copy_and_end!": r"cp_async_4 .*: the thread ended without cp_async_wait",
    "store_into_copy!": r"store_shared .* overwrites what lane 0 of warp 0 copies there",
    "touch_shared_past!": r"shared byte 1024 and on, 4 bytes, is out of bounds: .* has 1024",
    "touch_shared_before!": r"shared byte -4 and on, 4 bytes, is out of bounds",
    "touch_shared_askew!": r"shared byte 6 is misaligned for 4 bytes",
    "copy_askew!": r"cp_async_16 .*: shared byte 8 is misaligned for 16 bytes",
    "copy_past!": r"cp_async_16 .*: shared byte 1024 and on, 16 bytes, is out of bounds",
    "misaligned_rows!": r"ldmatrix_x2 .*: shared byte 8 is misaligned for 16 bytes",
    "read_global_past!": r"load_global .* out of bounds: 4 bytes at byte -?\d+ of a tensor of 1024",
    "read_global_before!": r"load_global .* out of bounds: 4 bytes at byte -4 of a tensor of 1024",
    "read_global_askew!": r"load_global .*: byte 2 of a tensor is misaligned for 4 bytes",
    "write_global_past!": r"store_global .* out of bounds: 4 bytes at byte -?\d+ of a tensor of",
    "write_input_of_other_block!": r"load_global .* reads global memory that block \d wrote",
    "part_at_operations!": r"lanes of warp 3 wait at ldmatrix_x4 .* and at mma_16x8x16 ",
    "part_at_lines!": r"lanes of warp \d wait at mma_16x8x8 .*:\d+\) and at mma_16x8x8 .*:\d+\)",
    "part_at_barrier!": r"lanes of warp 0 wait at __syncwarp .* and at __syncthreads ",
    "part_at_barriers!": r"warps wait at __syncthreads .* and at __syncthreads ",
    "end_before_product!": r"1 lanes of warp 0 have ended, the others wait at mma_16x8x16 ",
    "take_from_ended!": r"lane 2, __shfl_xor_sync .* takes the value of lane 3, which has ended",
    "name_few_lanes!": r"__syncwarp .*: the mask must name all lanes",
}


@pytest.fixture(scope="module")
def module():
    source = build.HERE / "samples" / "samples.cpp"
    return build.load(build.build_module([source], build.CACHE, "samples"))


@pytest.fixture
def samples(module):
    """The module, as it is at first."""
    yield module
    module.emulator.set_seed(0)
    module.emulator.set_most_shared_bytes(232448)
    module.emulator.set_resident_blocks(2)


def run(samples, name, given=None, shape=(BYTES // 4,), dtype=torch.float32, **how):
    """What a kernel writes, NaN where it does not: one block of four warps if not told."""
    given = torch.zeros(BYTES // 4) if given is None else given.contiguous()
    out = torch.full(shape, float("nan")).view(torch.uint8).view(dtype)
    how = {"blocks": 1, "threads": THREADS, "shared_bytes": BYTES} | how
    samples.run(name, given.view(torch.uint8).numpy(), out.numpy(), *how.values())
    return out


@pytest.mark.parametrize("seed", [0, 1, 7])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(samples, name, seed):
    samples.emulator.set_seed(seed)
    with pytest.raises(RuntimeError, match=FAULTS[name]) as caught:
        run(samples, name, blocks=2 if name == "write_input_of_other_block!" else 1)
    assert str(caught.value).startswith("block ")
    assert "faults.h:" in str(caught.value)
    # The same kernel put right, after an error.
    right = name.removesuffix("!")
    if right in samples.names():
        run(samples, right)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("read_other_warp!", {"reads what warp", "overwrites what warp"}),
        ("overwrite_other_warp!", {"reads what warp", "overwrites what warp"}),
        ("overwrite_what_all_read!", {"reads what warp", "overwrites what another"}),
        ("copy_over_what_was_read!", {"reads what warp", "overwrites what warp"}),
    ],
)
def test_both_sides_of_a_race_are_seen(samples, name, kinds):
    found = set()
    for seed in range(20):
        samples.emulator.set_seed(seed)
        with pytest.raises(RuntimeError, match=EITHER) as caught:
            run(samples, name)
        found.add(re.search("(reads|overwrites) what (warp|another)", str(caught.value))[0])
    assert found == kinds


def test_every_faulty_kernel_is_tested(samples):
    assert {name for name in samples.names() if name.endswith("!")} == FAULTS.keys()


@pytest.mark.parametrize(
    "name",
    [
        "touch_shared_last",
        "touch_shared_half",
        "read_global",
        "write_global",
        "copy_from_nowhere",
        "end_before_barrier",
    ],
)
def test_what_is_allowed_runs(samples, name):
    run(samples, name, shared_bytes=16 * THREADS if name == "copy_from_nowhere" else BYTES)


def test_blocks_that_write_the_same_are_caught(samples):
    with pytest.raises(RuntimeError, match=r"block (0|1), .*: writes .* that block (0|1) wrote"):
        run(samples, "read_other_warp", blocks=2)


def test_memory_is_forgotten_after_a_launch(samples):
    old = torch.zeros(64)
    run(samples, "read_global", old)
    with pytest.raises(RuntimeError, match="out of bounds: 4 bytes at byte 4 of a tensor of 4"):
        run(samples, "read_global", torch.zeros(1))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"threads": 100}, "1 to 32 whole warps, got 100 threads"),
        ({"threads": 1056}, "1 to 32 whole warps, got 1056 threads"),
        ({"shared_bytes": 232449}, "a block may have 232448 bytes of shared memory, got 232449"),
        ({"blocks": -1}, "1 to 2147483647 blocks, got -1"),
    ],
)
def test_launches_that_no_gpu_takes(samples, how, message):
    with pytest.raises(RuntimeError, match=message):
        run(samples, "read_global", **how)


def test_shared_memory_can_be_scarce(samples):
    samples.emulator.set_most_shared_bytes(101376)
    with pytest.raises(RuntimeError, match="a block may have 101376 bytes"):
        run(samples, "read_global", shared_bytes=101377)
    run(samples, "read_global", shared_bytes=101376)
    assert samples.most_shared_bytes() == 101376


def test_so_many_blocks_are_said_to_be_resident(samples):
    assert samples.resident_blocks() == 2
    samples.emulator.set_resident_blocks(5)
    assert samples.resident_blocks() == 5


def test_what_goes_round_the_device_functions_is_seen(samples):
    code = (
        "import sys; from pathlib import Path; import numpy; from emulator import build;"
        "samples = build.load(Path(sys.argv[1])); given = numpy.zeros(4);"
        "samples.run('read_directly', given, given, 1, 32, 1024)"
    )
    command = [sys.executable, "-c", code, samples.__file__]
    folder = build.HERE.parent
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True)
    assert done.returncode == -signal.SIGSEGV


def test_the_seed_draws_the_order_of_blocks_and_warps(samples):
    def order(seed):
        samples.emulator.set_seed(seed)
        out = run(samples, "arrive", shape=(8 * THREADS,), dtype=torch.int32, blocks=8)
        assert out.sort().values.equal(torch.arange(8 * THREADS, dtype=torch.int32))
        return out.tolist()

    orders = [order(seed) for seed in (0, 1, 2)]
    assert orders[0] == order(0)
    assert orders[0] != orders[1] != orders[2]
    warps = np.array(orders[0]).reshape(8, 4, 32).min(2)
    assert len({tuple(np.argsort(block)) for block in warps}) > 1
    assert list(np.argsort(warps.min(1))) != list(range(8))


def test_counts(samples):
    samples.emulator.reset()
    product = torch.zeros(32 * 48 + 48 * 16, dtype=torch.float16)
    run(samples, "multiply_tiles_float16_16", product, (32, 16), shared_bytes=4608)
    run(samples, "arrive", blocks=2)
    assert samples.emulator.counts() == {
        "launches": 2,
        "blocks": 3,
        "mma": 4 * 3,
        "ldmatrix": 4 * 3 * 2,
        "ldmatrix_conflicts": 0,
        # Copies: of four rows 48 bytes apart, 32 bytes each, two lie in the same banks.
        "shared_conflicts": 3 * (32 + 16) / 4,
    }
    samples.emulator.reset()
    assert set(samples.emulator.counts().values()) == {0}
    assert samples.emulator.conflicts() == {}


@pytest.mark.parametrize(
    ("name", "ldmatrix", "shared"),
    [
        # 8 rows in one group of banks, in two groups, and in different ones; one row 8 times.
        ("load_rows_128", 4 * 7, 0),
        ("load_rows_32", 4 * 1, 0),
        ("load_rows_144", 0, 0),
        ("load_rows_0", 0, 0),
        # Every second word, 8 and 16 bytes: two loads that take two turns for every 128 bytes.
        ("load_apart_4", 0, 2 * 1),
        ("load_apart_8", 0, 2 * 2),
        ("load_apart_16", 0, 2 * 4),
        # 16 bytes that are all in the same banks.
        ("load_apart_128", 0, 2 * 4 * 7),
    ],
)
def test_bank_conflicts_are_counted(samples, name, ldmatrix, shared):
    samples.emulator.reset()
    run(samples, name, threads=32, shared_bytes=2 * 32 * 128)
    counts = samples.emulator.counts()
    assert (counts["ldmatrix_conflicts"], counts["shared_conflicts"]) == (ldmatrix, shared)
    where = r"(ldmatrix_x4|load_shared) \(values\.h:\d+\)"
    assert all(re.fullmatch(where, name) for name in samples.emulator.conflicts())
    assert sum(samples.emulator.conflicts().values()) == ldmatrix + shared


def test_shared_memory_starts_as_nan(samples):
    assert run(samples, "read_unwritten")[:3].isnan().all()


def test_copies_arrive_and_fill_with_zeros(samples):
    given = torch.randn(THREADS)
    expected = torch.where(torch.arange(THREADS) % 2 == 0, given, 0)
    assert run(samples, "copy_and_read", given, (THREADS,)).equal(expected)


def test_shuffles(samples):
    out = run(samples, "shuffle_all", shape=(32, 8), threads=32).T
    lane = np.arange(32)
    expected = [
        lane ^ 5,
        lane ^ 3,
        np.full(32, 9),
        lane // 8 * 8 + 1,
        np.where(lane + 3 < 32, lane + 3, lane),
        np.where(lane % 8 + 3 < 8, lane + 3, lane),
        np.full(32, sum(range(32)) - 20 * 32),
        np.full(32, sum(range(32))),
    ]
    np.testing.assert_array_equal(out.numpy(), expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_conversions(samples, dtype):
    given = torch.randn(THREADS) * torch.logspace(-9, 5, THREADS)
    # Ties, the largest, what is beyond it, subnormal results, and what is not a number.
    special = [1 + 2**-9, 1 + 3 * 2**-9, 1 + 2**-12, 1 + 3 * 2**-12, 65504, 65520, 1e38, 3.4e38]
    special += [1e-40, 2.0**-25, -126.5, -127, 0.0, float("inf"), float("-inf"), float("nan")]
    given[: len(special)] = torch.tensor(special)
    # NaN whose payload is in the lower half only.
    given.view(torch.int32)[len(special)] = 0x7F800001
    low, high, power = run(samples, f"convert_{dtype}", given, (THREADS, 3)).T
    expected = given.to(TYPES[dtype]).float()
    torch.testing.assert_close(low, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(high, -expected, rtol=0, atol=0, equal_nan=True)
    powers = given.double().exp2().float()
    powers[powers < torch.finfo(torch.float32).tiny] = 0
    torch.testing.assert_close(power, powers, rtol=3e-7, atol=0, equal_nan=True)


def test_byte_instructions(samples):
    rng = np.random.default_rng(0)
    given = rng.integers(0, 2**32, (THREADS, 4), dtype=np.uint32)
    given[:, 2] &= 0x7777
    out = run(samples, "take_bytes", torch.from_numpy(given), (THREADS, 2), torch.int32)
    for (a, b, c, _), found in zip(given.tolist(), out.numpy().view(np.uint32), strict=True):
        both = a.to_bytes(4, "little") + b.to_bytes(4, "little")
        picked = bytes(both[c >> 4 * i & 7] for i in range(4))
        inner = c + sum(x * y for x, y in zip(both[:4], both[4:], strict=True))
        assert found.tolist() == [int.from_bytes(picked, "little"), inner % 2**32]


def test_ldmatrix_gives_what_the_manual_says(samples):
    # Value 64 m + 8 r + c is in column c of row r of matrix m.
    given = torch.arange(256, dtype=torch.int16)
    out = run(samples, "load_fragments", given, (32, 12), torch.int16, threads=32)
    for lane, found in enumerate(out.view(32, 12, 2).tolist()):
        row, columns = lane // 4, [lane % 4 * 2, lane % 4 * 2 + 1]
        plain = [[64 * m + 8 * row + column for column in columns] for m in range(4)]
        transposed = [[64 * m + 8 * column + row for column in columns] for m in range(4)]
        assert found == plain + transposed + plain[:2] + transposed[:2]


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("dtype", TYPES)
class TestProducts:
    def test_one(self, samples, dtype, depth):
        a, b = torch.randn(16, depth).to(TYPES[dtype]), torch.randn(depth, 8).to(TYPES[dtype])
        given = torch.cat([a.flatten(), b.flatten()])
        name = f"multiply_by_formula_{dtype}_{depth}"
        out = run(samples, name, given, (16, 8), threads=32)
        np.testing.assert_allclose(out, 1 + a.double().numpy() @ b.double().numpy(), 0, 1e-5)

    def test_tiles(self, samples, dtype, depth):
        a, b = torch.randn(32, 48).to(TYPES[dtype]), torch.randn(48, 16).to(TYPES[dtype])
        given = torch.cat([a.flatten(), b.flatten()])
        out = run(samples, f"multiply_tiles_{dtype}_{depth}", given, (32, 16), shared_bytes=4608)
        np.testing.assert_allclose(out, a.double().numpy() @ b.double().numpy(), 0, 1e-5)

    def test_what_is_not_finite_stays_in_its_row(self, samples, dtype, depth):
        a, b = torch.ones(16, depth).to(TYPES[dtype]), torch.ones(depth, 8).to(TYPES[dtype])
        a[3, 2], a[5, 1], b[0, 6] = float("nan"), float("inf"), float("-inf")
        given = torch.cat([a.flatten(), b.flatten()])
        name = f"multiply_by_formula_{dtype}_{depth}"
        out = run(samples, name, given, (16, 8), threads=32)
        expected = (a.double() @ b.double()).float() + 1
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
