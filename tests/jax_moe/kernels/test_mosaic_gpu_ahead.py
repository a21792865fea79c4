"""How rows are gathered ahead: the instructions of the warps that copy and of the one that waits, run in NumPy."""

import numpy as np
import pytest

from jax_moe.kernels import mosaic_gpu_ahead as ahead
from tests.jax_moe.kernels import ptx


def play(warps, rng):
    """Runs warps to their end, a few instructions of one and then of another."""
    for _ in range(20_000):
        if not warps:
            return
        number = int(rng.integers(len(warps)))
        for _ in range(int(rng.integers(1, 60))):
            if next(warps[number], None) is None:
                del warps[number]
                break
    raise AssertionError("some warp does not end")


@pytest.mark.parametrize(
    ("width", "rows", "total", "unit", "early"),
    [
        (64, 300, 300, 32, 3),  # a quarter of a load a row
        (72, 290, 259, 4, 0),
        (1032, 140, 131, 2, 2),  # one whole round of loads, and one piece of 16 bytes
        (1280, 129, 129, 1, 5),  # a round and one load of all lanes
        (2048, 20, 1, 4, 2),
        (8, 10, 0, 32, 2),
    ],
)
def test_all_rows_arrive_whoever_copies_them_and_no_one_reads_them_before(width, rows, total, unit, early):
    rng = np.random.default_rng(width)
    x = rng.integers(0, 2**16, (7, width)).astype(np.uint16)
    index = rng.integers(-1, 8, rows).astype(np.int32)  # -1 and 7 are out of range
    out = np.full((rows, width), 12345, np.uint16)
    want = np.where(((index >= 0) & (index < 7))[:, None], x[np.clip(index, 0, 6)], 0).astype(np.uint16)
    want[total:] = 12345
    counters = np.zeros(1 + -(-rows // ahead.BLOCK), np.int32)
    memory = ptx.Memory(x, index, out, counters)
    text = {once: ahead.copy_ptx(tokens=7, width=width, unit=unit, once=once) for once in (True, False)}
    copying = [ptx.warp(text[n < early], memory, [*memory.addresses, total]) for n in range(early + 3)]

    def loading(tiles):
        for first, count in tiles:
            yield from ptx.warp(ahead.WAIT_PTX, memory, [memory.addresses[3], first, count, total])
            np.testing.assert_array_equal(out[first : first + count], want[first : first + count])

    tiles = [(first, min(144, total - first)) for first in range(0, total, 50)] + [(total, 0), (0, 0)]
    play([*copying, loading(tiles[::2]), loading(tiles[1::2])], rng)
    np.testing.assert_array_equal(out, want)
    assert counters[1:].sum() == total


def test_one_warp_copies_everything_and_nothing_is_copied_when_all_is_claimed():
    x, index, out = np.arange(64, dtype=np.uint16)[None], np.zeros(200, np.int32), np.zeros((200, 64), np.uint16)
    for claimed, arrived in ((0, 200), (200, 0)):
        counters = np.array([claimed, 0, 0], np.int32)
        memory = ptx.Memory(x, index, out, counters)
        play(
            [ptx.warp(ahead.copy_ptx(tokens=1, width=64, unit=32, once=False), memory, [*memory.addresses, 200])],
            np.random.default_rng(0),
        )
        assert counters[1:].sum() == arrived
    assert (out == x).all()


def test_a_wait_that_does_not_end_traps():
    memory = ptx.Memory(np.zeros(2, np.int32))
    text = ahead.WAIT_PTX.replace(f"looks, {ahead.LOOKS};", "looks, 100;")
    with pytest.raises(ptx.Trap):
        play([ptx.warp(text, memory, [memory.addresses[0], 0, 5, 5])], np.random.default_rng(0))


def test_a_unit_is_a_power_of_two_that_lanes_can_hold_the_indices_of():
    assert [ahead.unit_rows(width) for width in (64, 2048, 2880, 4096, 7168, 9000)] == [32, 4, 2, 2, 1, 1]
