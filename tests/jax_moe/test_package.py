"""Importing the package, and running it with one process a rank."""

import importlib.util
import pathlib
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import jax_moe

from . import dense
from .layers import SHARED, arrays, tokens

ROOT = pathlib.Path(__file__).parents[2]


def test_array_types_mean_nothing_without_jaxtyping(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxtyping", None)
    path = pathlib.Path(jax_moe.__file__).with_name("_typing.py")
    spec = importlib.util.spec_from_file_location("typing_alone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.Float[module.Array, "t D"] is module.Int32[module.Array, ""]


def test_every_public_name_is_documented():
    for name in vars(jax_moe):
        thing = getattr(jax_moe, name)
        if callable(thing) and not name.startswith("_"):
            assert thing.__doc__, name


PROCESS = """
    import sys
    import jax
    import numpy as np
    rank, port, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=rank)
    import jax_moe as jm
    from tests.jax_moe.layers import SHARED, arrays, tokens

    for number, parallel in enumerate((
        jm.ParallelConfig(tp=2, expert_parallel=True, sequence_parallel=True),
        jm.ParallelConfig(tp=2),
    )):
        mesh = jm.make_mesh(parallel)
        params = jm.shard(jm.from_mapping(arrays(SHARED)), SHARED, parallel, mesh)
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("dp"))
        x = tokens(5, 16)
        x[3:] = np.nan
        x = jax.make_array_from_callback(x.shape, rows, lambda index: x[index])
        step = jax.jit(lambda p, x, c: jm.moe(p, x, config=SHARED, parallel=parallel, mesh=mesh, counts=c))
        y = step(params, x, np.array([3], np.int32))
        back = jm.to_mapping(jm.unshard(params, SHARED))
        assert all(np.array_equal(back[name], array) for name, array in arrays(SHARED).items())
        np.save(f"{out}/{number}.{rank}.npy", y.addressable_data(0))
"""


def test_one_process_a_rank_computes_the_same(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", textwrap.dedent(PROCESS)]
    ranks = [
        subprocess.Popen([*command, str(r), port, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for r in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        pytest.fail("\n".join(error[-2000:] for error in errors))
    wanted = dense.layer(arrays(SHARED), tokens(5, 16)[:3], SHARED)
    for number in range(2):
        for rank in range(2):
            y = np.load(tmp_path / f"{number}.{rank}.npy")
            np.testing.assert_allclose(y[:3], wanted, rtol=1e-5, atol=1e-5)
            assert (y[3:] == 0).all()
