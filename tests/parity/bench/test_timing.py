"""Times from a profile's events, and how many inputs rotate."""

import pytest

from parity.bench import timing


def test_a_call_lasts_from_its_first_kernel_to_the_end_of_its_last():
    events = [(100, 10), (0, 10), (115, 5), (15, 5)]
    assert timing.spans(events, 2) == [(0, 20), (100, 120)]


def test_a_kernel_that_runs_beside_another_and_ends_last_counts_to_its_end():
    assert timing.spans([(0, 50), (10, 5)], 1) == [(0, 50)]
    # nor does the device rest while it runs: the longest rest is behind it
    assert timing.spans([(0, 50), (10, 5), (40, 5), (80, 50)], 2) == [(0, 50), (80, 130)]


def test_calls_of_different_numbers_of_kernels_are_parted_where_the_device_rests():
    assert timing.spans([(0, 10), (100, 10), (115, 5), (200, 1)], 3) == [(0, 10), (100, 120), (200, 201)]


def test_where_no_rest_stands_out_every_call_has_as_many_kernels():
    assert timing.spans([(0, 10), (15, 5), (26, 10), (40, 5)], 2) == [(0, 20), (26, 45)]


def test_kernels_that_neither_rest_nor_divide_over_the_calls_give_no_time():
    assert timing.spans([(0, 1), (5, 1), (9, 1)], 2) is None
    assert timing.spans([], 2) is None


def test_devices_that_meet_are_timed_from_when_the_last_has_begun():
    devices = [[(0, 50), (100, 160)], [(30, 50), (110, 150)]]
    assert timing.of_devices(devices, meeting=True) == pytest.approx([20e-6, 50e-6])
    assert timing.of_devices(devices, meeting=False) == pytest.approx([50e-6, 60e-6])


def test_kernels_that_run_beside_an_exchange_hide_it():
    found = timing.exchange([[(0, 100, "ncclDevKernel_SendRecv"), (40, 20, "gemm"), (50, 70, "gemm")]], 1)
    assert found == timing.Exchange(ms=100e-6, hidden=0.6, kernels=("ncclDevKernel_SendRecv",))
    # of several devices the one on which they took longest, by call
    other = [(0, 300, "MemcpyP2P"), (400, 100, "RaggedAllToAllKernelImpl")]
    assert timing.exchange([[(0, 10, "nccl")], other], 2).ms == pytest.approx(200e-6)
    assert timing.exchange([[(0, 100, "gemm")]], 1) is None


def test_little_work_rotates_over_many_inputs_and_much_over_few():
    # one token of eight experts of 9.4 MB: four sets pass the cache by
    assert timing.sets_of(75.5e6, cached=True) == 4
    assert timing.sets_of(1e9, cached=True) == timing.LEAST_SETS
    assert timing.sets_of(1e3, cached=True) == timing.MOST_SETS
    assert timing.sets_of(1e3, cached=False) == timing.LEAST_SETS


def test_the_median_and_the_spread_over_it():
    assert timing.summary([3.0, 1.0, 2.0]) == (2.0, 1.0)


def test_the_wall_clock_runs_long_enough_and_not_forever():
    assert timing.calls_for(10.0, 3) == 5
    assert timing.calls_for(1000.0, 3) == 3
    assert timing.calls_for(1e-9, 3) == 200
