"""The device's own clock, on a card: profiles in JAX, graphs in PyTorch; and spreads over two cards."""

import jax
import numpy as np
import pytest
import torch

from parity.bench import mesh, mesh_jax
from parity.bench.candidates import jax_lab, torch_lab
from parity.bench.shapes import Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_jax_is_timed_by_a_profile():
    lab = jax_lab.Lab("gpu")
    arrays = [(lab.put(np.full((1024, 1024), part, np.float32)),) for part in (1.0, 2.0)]
    timed = lab.measure(lambda a: a @ a, arrays, 6)
    assert timed.clock == "profile"
    assert 0 < timed.device_ms <= timed.wall_ms * 1.5


def test_pytorch_is_timed_by_a_graph_and_between_events_where_it_waits_for_the_device():
    lab = torch_lab.Lab("gpu")
    sets = [(torch.full((512, 512), part, device="cuda"),) for part in (1.0, 2.0)]
    assert lab.measure(lambda a: a @ a, sets, 4).clock == "graph"
    assert lab.measure(lambda a: a * a.sum().item(), sets, 4).clock == "events"
    torch.cuda.empty_cache()  # which an abandoned capture would forbid
    assert lab.measure(lambda a: a @ a, sets, 4).clock == "graph"


@pytest.mark.parametrize("what", ["mesh", "shared"])
@pytest.mark.parametrize("parallel", mesh.every(2))
def test_a_spread_over_two_cards_is_right_and_timed_by_a_profile(parallel, what):
    if len(jax.devices()) < 2:
        pytest.skip("one GPU; a spread needs two")
    # Small sums over tp are a kernel of XLA's own, which has no name to know it by; 64 MB are NCCL's.
    tokens = 65536 if "tp2" in parallel and ".sp" not in parallel else 130
    shape = Shape(name="s", tokens=tokens, hidden=256, intermediate=128, experts=16, top_k=4)
    row = mesh_jax.run(jax_lab.Lab("gpu"), what, shape, parallel, 4)
    assert (row["status"], row["clock"]) == ("ok", "profile")
    assert row["exchange_ms"] > 0


def test_plain_collectives_between_two_cards_have_a_bandwidth_and_kernels():
    if len(jax.devices()) < 2:
        pytest.skip("one GPU; a collective needs two")
    row = mesh_jax.run(jax_lab.Lab("gpu"), "collectives", None, "dp2.tp1", 4)
    assert all(row["kernels"].values())
    assert all(each["busbw"] > 0 for points in row["collectives"].values() for each in points)
