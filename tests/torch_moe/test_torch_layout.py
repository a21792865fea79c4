"""Which rows are real, on every rank, and what numbers they have."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from torch_moe import ParallelConfig
from torch_moe.layout import TokenLayout, check_agreement, check_counts, chunk_rows, own_count, real_by_rank

SP = ParallelConfig(dp=2, tp=2, expert_parallel=True)
NATIVE = ParallelConfig(dp=2, tp=2, expert_parallel=True, token_layout="dp_tp")
TP = ParallelConfig(dp=2, tp=2)


@hypothesis.given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=2), st.integers(2, 5))
def test_chunks_hold_every_real_token_once_and_in_order(arrays_and_padding, tp):
    parallel = ParallelConfig(dp=2, tp=tp, expert_parallel=True)
    counts = [real for real, _ in arrays_and_padding]
    arrays = [real + padding for real, padding in arrays_and_padding]
    rows = [array for array in arrays for _ in range(tp)]
    found = real_by_rank(rows, counts, parallel)
    assert len(found) == 2 * tp
    for dp, (array, count) in enumerate(zip(arrays, counts, strict=True)):
        chunk = chunk_rows(array, tp)
        tokens = [row for j in range(tp) for row in range(j * chunk, j * chunk + found[dp * tp + j])]
        assert tokens == list(range(count))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (1, 1, 0)), (3, (1, 1, 1)), (4, (2, 2, 0)), (5, (2, 2, 1))],
)
def test_chunks_of_few_tokens(rows, expected):
    parallel = ParallelConfig(tp=3, expert_parallel=True, sequence_parallel=True)
    assert real_by_rank([rows] * 3, None, parallel) == expected


def test_without_sequence_parallelism_there_is_one_entry_per_dp_rank():
    assert real_by_rank([5, 5, 7, 7], None, TP) == (5, 7)
    assert real_by_rank([5, 5, 7, 7], [4, 0], TP) == (4, 0)


def test_in_the_native_layout_each_rank_has_its_own():
    assert real_by_rank([5, 6, 7, 8], None, NATIVE) == (5, 6, 7, 8)
    assert real_by_rank([5, 6, 7, 8], [1, 2, 3, 0], NATIVE) == (1, 2, 3, 0)


def test_the_dense_index_numbers_real_rows_from_the_offset():
    layout = TokenLayout(array_rows=5, own_rows=3, own_real=1, sizes=(3, 1), most_rows=3, offset=3)
    assert layout.dense_index(torch.device("cpu")).tolist() == [3, -1, -1]


def test_counts_must_be_one_per_holder_and_not_negative():
    assert check_counts([3, 4], SP) == (3, 4)
    with pytest.raises(ValueError, match=r"counts=\(1, 2, 3\): allowed is one per DP rank, 2 of them"):
        check_counts([1, 2, 3], SP)
    with pytest.raises(ValueError, match="allowed is one per rank, 4 of them"):
        check_counts([1, 2], NATIVE)
    with pytest.raises(ValueError, match="counts of at least 0"):
        check_counts([1, -2], SP)


def test_a_count_past_the_array_is_an_error_that_shows_both():
    assert own_count([4, 9], 4, SP, 0, 1) == 4
    with pytest.raises(ValueError, match=r"counts\[1\]=9: allowed is at most 4"):
        own_count([4, 9], 4, SP, 1, 0)


def test_ranks_that_disagree_are_told_all_sizes():
    with pytest.raises(ValueError, match=r"counts differ between ranks \[0, 1\]: \[\[1, 2\], \[1, 3\]\]"):
        check_agreement([5, 5], [[1, 2], [1, 3]], TP, [0, 1])
    with pytest.raises(ValueError, match=r"rows of x differ .* \[5, 5, 7, 8\] on ranks \[0, 1, 2, 3\]"):
        check_agreement([5, 5, 7, 8], [[-1]] * 4, SP, range(4))
    check_agreement([5, 6, 7, 8], [[-1]] * 4, NATIVE, range(4))
    check_agreement([500, 500, 256, 256], [[-1]] * 4, TP, range(4))
