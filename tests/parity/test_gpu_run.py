"""The command on a GPU: both frameworks, their own kernels and collectives, against the same oracle and bounds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity.backends import gpu, nccl

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu.why_no_gpu() is not None, reason="needs an NVIDIA GPU and JAX's CUDA plugin"),
]
ONE_RANK = ("dp1.tp1/local/bf16/t13.d64.f48/e8.k2/gate", "dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate")
FOUR_RANKS = (
    "dp1.tp4/local/bf16/t31.d72.f52/e5.k3/shared+gate",
    "dp2.tp2.ep/allgather/bf16/t7-3.d64.f48/e8.k2/shared",
    "dp2.tp2.ep/allgather/f32/t13.d64.f48/e8.k2/gate+shared+latent",
    "dp4.tp1.ep/padded/bf16/t5-0-7-1.d64.f48/e8.k2/gate+shared+latent",
    "dp4.tp1.ep/ragged/bf16/t5-0-7-1.d64.f48/e8.k2/gate+shared+latent",
    "dp2.tp1.ep/ragged/bf16/t1.d64.f48/e2.k2/gate+sigmoid+weightin",
)


def sharing():
    """Why ranks cannot share a GPU here; None: they can."""
    try:
        nccl.find()
    except nccl.NcclError as error:
        return str(error)
    return None


def run(out, *arguments):
    command = [sys.executable, "-m", "parity", "run", "--platform", "gpu", "--out", str(out), *arguments]
    # JAX in this process sees the card; a worker has settings of its own
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=550, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return json.loads((out / "summary.json").read_text())


def test_one_rank_on_one_gpu_agrees_with_the_oracle(tmp_path):
    summary = run(tmp_path, *ONE_RANK)
    assert summary["counts"]["pass"] == len(ONE_RANK)
    assert summary["platform"]["gpus"]
    assert summary["versions"]["gpu"]


def test_jax_in_one_process_and_in_one_a_rank_on_as_many_gpus(tmp_path):
    if gpu.count() < 2:
        pytest.skip("needs two NVIDIA GPUs")
    cases = [case for case in FOUR_RANKS if gpu.count() >= 4 or case.startswith("dp2.tp1")]
    for name, more in (("one", ()), ("each", ("--jax-processes",))):
        assert run(tmp_path / name, *cases, *more)["counts"]["pass"] == len(cases)


@pytest.mark.skipif(sharing() is not None, reason="needs NCCL 2.30 or newer (PARITY_NCCL_LIBRARY)")
def test_four_ranks_on_one_gpu_agree_with_the_oracle_in_every_transport(tmp_path):
    assert run(tmp_path, *FOUR_RANKS, "--ranks-per-gpu", "4")["counts"]["pass"] == len(FOUR_RANKS)
