import numpy as np
import pytest

from parity.case import Case
from parity.delivery import deliver, kept


def case(text, flags=""):
    return Case.parse(text + ("/" + flags if flags else ""))


def test_allgather_brings_every_token_everywhere():
    c = case("dp2.tp1.ep/allgather/f32/t2-1.d8.f8/e4.k2")
    both = deliver(c, np.array([[0, 3], [1, 0], [2, 3]]))
    assert [d.tokens.tolist() for d in both] == [[0, 1, 2], [0, 1, 2]]
    assert both[1].live.tolist() == [[False, True], [False, False], [True, True]]


@pytest.mark.parametrize("transport", ["ragged", "padded"])
def test_a_token_comes_once_to_each_rank_that_holds_its_experts(transport):
    c = case(f"dp2.tp1.ep/{transport}/f32/t2-1.d8.f8/e4.k2")
    both = deliver(c, np.array([[0, 3], [1, 0], [2, 3]]))
    assert [d.tokens.tolist() for d in both] == [[0, 1], [0, 2]]
    assert both[0].live.tolist() == [[True, False], [True, True]]
    assert not any(d.dropped for d in both)
    assert kept(c, np.array([[0, 3], [1, 0], [2, 3]])).all()


def test_padded_drops_the_last_in_the_sources_order_and_the_source_counts_them():
    # three rows, K = 1, two ranks, factor 0.7: ceil(0.7 * 3 / 2) = 2 slots
    c = case("dp2.tp1.ep/padded/f32/t3.d8.f8/e2.k1", "capacity0.7")
    ids = np.array([[0], [0], [0], [1], [0], [1]])
    both = deliver(c, ids)
    assert [d.tokens.tolist() for d in both] == [[0, 1, 4], [3, 5]]
    assert [d.dropped for d in both] == [1, 0]
    assert kept(c, ids)[:, 0].tolist() == [True, True, False, True, True, True]


def test_max_rows_accepts_the_first_as_they_arrive_and_the_receiver_counts_the_rest():
    c = case("dp2.tp1.ep/ragged/f32/t3.d8.f8/e2.k1", "maxrows3")
    both = deliver(c, np.array([[0], [0], [1], [0], [0], [1]]))
    assert [d.tokens.tolist() for d in both] == [[0, 1, 3], [2, 5]]
    assert [d.dropped for d in both] == [1, 0]


def test_over_nodes_rows_come_by_rail_then_node_then_token():
    # four ranks on two nodes, one expert each: every token wants expert 3, on rank 3 = node 1, place 1
    c = case("dp4.tp1.ep.nodes2/ragged/f32/t1.d8.f8/e4.k1")
    out = deliver(c, np.array([[3], [3], [3], [3]]))
    assert [d.tokens.tolist() for d in out] == [[], [], [], [0, 2, 1, 3]]


def test_nodes_do_not_change_what_reaches_whom():
    rng = np.random.default_rng(0)
    ids = np.array([rng.permutation(16)[:3] for _ in range(40)])
    flat = deliver(case("dp4.tp2.ep/padded/f32/t10.d8.f8/e16.k3"), ids)
    nodes = deliver(case("dp4.tp2.ep.nodes2/padded/f32/t10.d8.f8/e16.k3"), ids)
    for one, other in zip(flat, nodes, strict=True):
        assert sorted(one.tokens) == sorted(other.tokens)
        order = np.argsort(other.tokens)
        assert np.array_equal(one.live, other.live[order])
