"""GPUs found, ranks put on them, and the library that lets ranks share one, on machines with and without a GPU."""

import importlib.metadata
import os
import shutil
import stat
import subprocess
import sys

import pytest

from parity.backends import gpu, nccl
from parity.backends.base import Options
from parity.backends.jax import JaxBackend
from parity.backends.torch import TorchBackend
from parity.case import Case

LISTED = "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.1\nNVIDIA H100 80GB HBM3, 81559, 9.0, 580.1\n"
FOUR = Case.parse("dp2.tp2.ep/allgather/bf16/t7.d64.f48/e8.k2")


@pytest.fixture
def fresh():
    """Findings are kept for the life of a process; tests want new ones."""
    caches = (gpu.cards, gpu.count, nccl.version_of)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.fixture
def two_gpus(fresh, tmp_path, monkeypatch):
    """An nvidia-smi that lists two GPUs."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!{sys.executable}\nprint({LISTED!r}, end='')\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_cards_are_what_the_driver_lists(two_gpus):
    assert gpu.count() == 2
    assert gpu.cards()[1] == gpu.Card("NVIDIA H100 80GB HBM3", 81559, "9.0", "580.1")


@pytest.mark.parametrize(("visible", "left"), [("0", 1), ("1,0", 2), ("", 0), ("-1", 0), ("0,-1,1", 1)])
def test_hidden_gpus_do_not_count(two_gpus, monkeypatch, visible, left):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.count() == left


def test_a_driver_that_fails_lists_nothing(two_gpus, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert gpu.cards() == ()


def test_ranks_fill_one_gpu_after_the_other():
    assert [gpu.of_rank(rank, 1) for rank in range(4)] == [0, 1, 2, 3]
    assert [gpu.of_rank(rank, 4) for rank in range(6)] == [0, 0, 0, 0, 1, 1]


def test_all_ranks_of_both_frameworks_together_stay_below_the_card():
    for ranks in (1, 2, 4, 8):
        assert 0.8 <= 2 * ranks * gpu.memory_fraction(ranks) <= 0.95


def test_a_case_of_more_ranks_than_there_is_room_for_is_refused_with_the_numbers(two_gpus):
    for cls in (JaxBackend, TorchBackend):
        one = cls(Options(platform="gpu")).unsupported(FOUR)
        assert one == "4 ranks need as many GPUs; this machine has 2 (--ranks-per-gpu 2 would share them)"
        assert cls(Options(platform="gpu", ranks_per_gpu=2)).unsupported(FOUR) is None
        eight = Case.parse("dp8.tp1.ep/allgather/bf16/t7.d64.f48/e8.k2")
        assert "8 ranks at 3 a GPU need 3 GPUs; this machine has 2" in str(
            cls(Options(platform="gpu", ranks_per_gpu=3)).unsupported(eight)
        )
        assert cls(Options()).unsupported(eight) is None


def test_one_sided_is_for_one_jax_process_over_hopper_gpus_and_for_pytorch_anywhere(two_gpus, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.11.0")
    case = Case.parse("dp2.tp1.ep/one_sided/bf16/t7.d64.f48/e8.k2")
    for options in (Options(), Options(platform="gpu"), Options(platform="gpu", jax_processes=True)):
        assert TorchBackend(options).unsupported(case) is None
    assert JaxBackend(Options(platform="gpu")).unsupported(case) is None
    assert "--platform gpu" in str(JaxBackend(Options()).unsupported(case))
    for options in (Options(platform="gpu", jax_processes=True), Options(platform="gpu", ranks_per_gpu=2)):
        assert "one process over all GPUs" in str(JaxBackend(options).unsupported(case))
    assert JaxBackend(Options()).unsupported(Case.parse("dp1.tp1.ep/one_sided/bf16/t7.d64.f48/e8.k2")) is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    assert "JAX 0.11 or newer; here is 0.10.2" in str(JaxBackend(Options(platform="gpu")).unsupported(case))
    monkeypatch.setattr(gpu, "cards", lambda: (gpu.Card("NVIDIA L4", 23034, "8.9", "580.1"),))
    assert "9.0; here is 8.9" in str(JaxBackend(Options(platform="gpu")).unsupported(case))


def test_ranks_that_share_a_gpu_are_a_process_each_with_the_library_and_a_share_of_memory(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    options = Options(platform="gpu", ranks_per_gpu=4, nccl_library="/opt/libnccl.so.2")
    for cls in (JaxBackend, TorchBackend):
        backend = cls(options)
        environment = backend.environment(FOUR)
        assert backend.processes(FOUR) == 4
        assert environment["LD_PRELOAD"] == "/opt/libnccl.so.2"
        assert environment["NCCL_MULTI_RANK_GPU_ENABLE"] == "1"
        assert environment["NCCL_NVLS_ENABLE"] == "0"
        assert int(environment["NCCL_MAX_NCHANNELS"]) < 8
    jax = JaxBackend(options).environment(FOUR)
    assert float(jax["XLA_PYTHON_CLIENT_MEM_FRACTION"]) == gpu.memory_fraction(4)
    assert jax["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    # XLA takes the last of a flag given twice
    assert jax["XLA_FLAGS"].index("autotune_level=0") < jax["XLA_FLAGS"].index("autotune_level=4")


def test_with_a_gpu_a_rank_jax_is_one_process_unless_asked_otherwise():
    assert JaxBackend(Options(platform="gpu")).processes(FOUR) == 1
    assert JaxBackend(Options(platform="gpu", jax_processes=True)).processes(FOUR) == 4
    assert "LD_PRELOAD" not in JaxBackend(Options(platform="gpu")).environment(FOUR)


def test_the_installed_xla_knows_every_flag_that_gpus_are_given():
    # XLA ends a process whose flags it does not know, so this is found before a GPU is
    flags = JaxBackend(Options(platform="gpu")).environment(FOUR)["XLA_FLAGS"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-500:]


# The library.
@pytest.fixture
def library(tmp_path):
    """Compiles a library that says it is some version of NCCL."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler, to make a library")

    def make(body, name="libnccl.so.2"):
        source = tmp_path / "nccl.c"
        source.write_text(body)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(tmp_path / name), str(source)], check=True)
        return tmp_path / name

    return make


SAYS = "int ncclGetVersion(int *v) {{ *v = {}; return 0; }}"


def test_a_run_tells_the_version_of_the_library_that_is_loaded(fresh, library):
    import torch

    options = Options(platform="gpu", ranks_per_gpu=4, nccl_library=str(library(SAYS.format(23102))))
    assert TorchBackend(options)._nccl(torch) == "2.31.2"


def test_a_library_that_is_new_enough_is_taken_by_file_folder_or_variable(fresh, library, monkeypatch):
    path = library(SAYS.format(23102))
    assert nccl.find(str(path)) == path
    assert nccl.find(str(path.parent)) == path
    monkeypatch.setenv(nccl.VARIABLE, str(path))
    assert nccl.find() == path
    assert nccl.words(nccl.version_of(str(path))[0]) == "2.31.2"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (SAYS.format(22809), "is NCCL 2.28.9; several ranks on one GPU need 2.30 or newer"),
        ("int other(void) { return 0; }", "it has no ncclGetVersion, so it is not NCCL"),
        ("int ncclGetVersion(int *v) { return 3; }", "ncclGetVersion failed with status 3"),
        ("int ncclGetVersion(int *v) { *(volatile int *)0 = 1; return 0; }", "was killed by signal 11"),
    ],
    ids=["too old", "not NCCL", "fails", "crashes"],
)
def test_a_library_that_will_not_do_is_refused_with_the_reason_and_what_to_get(fresh, library, body, message):
    with pytest.raises(nccl.NcclError) as caught:
        nccl.find(str(library(body)))
    assert message in str(caught.value)
    assert "pip install --no-deps --target nccl 'nvidia-nccl-cu13>=2.30'" in str(caught.value)


def test_a_path_that_leads_nowhere_or_to_no_library_is_refused(fresh, tmp_path):
    (tmp_path / "text.so").write_text("not a library")
    (tmp_path / "libnccl.so.2.xz").write_bytes(b"")
    for name, message in (
        ("nowhere.so", "there is no such file"),
        ("text.so", "file too short"),
        ("libnccl.so.2.xz", "it is packed; unpack it"),
    ):
        with pytest.raises(nccl.NcclError, match=message):
            nccl.find(str(tmp_path / name))


def test_without_any_library_the_message_says_why_one_is_needed(fresh, monkeypatch):
    monkeypatch.delenv(nccl.VARIABLE, raising=False)
    monkeypatch.setattr(nccl, "installed", lambda: None)
    with pytest.raises(nccl.NcclError, match=r"'Duplicate GPU detected'; none is installed; get one with"):
        nccl.find()


def test_an_installed_library_that_is_new_enough_needs_no_option(fresh, library, monkeypatch):
    path = library(SAYS.format(23000))
    monkeypatch.delenv(nccl.VARIABLE, raising=False)
    monkeypatch.setattr(nccl, "installed", lambda: path)
    assert nccl.find() == path
