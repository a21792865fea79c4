"""The device's own clock, on a card: profiles in JAX, graphs in PyTorch."""

import numpy as np
import pytest
import torch

from parity.bench.candidates import jax_lab, torch_lab

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
