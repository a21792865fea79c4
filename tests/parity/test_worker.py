"""The worker's protocol, spoken by hand, and what a backend lays out on its ranks."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from parity import fixtures
from parity.arrays import float32_of_bits
from parity.backends.layout import block_of_rank, hand_out, parameters, token_blocks
from parity.case import Case
from parity.launch import worker_environment
from parity.results import RankResult
from parity.verdict.layout import holdings
from tests.parity.plugin import RAISES, case_id
from tests.parity.plugin import plugin as plugin


class Spoken:
    """One worker at the other end of two pipes."""

    def __init__(self, log):
        child_read, self.write_fd = os.pipe()
        read_fd, child_write = os.pipe()
        command = [sys.executable, "-m", "parity.worker", "--backend", "fake", "--index", "0", "--processes", "1"]
        command += ["--options", "{}", "--read", str(child_read), "--write", str(child_write)]
        self.process = subprocess.Popen(
            command, pass_fds=(child_read, child_write), stdout=log, stderr=log, env=worker_environment({})
        )
        os.close(child_read)
        os.close(child_write)
        self.messages = os.fdopen(read_fd)

    def send(self, **request):
        os.write(self.write_fd, (json.dumps(request) + "\n").encode())

    def hear(self, kind):
        for line in self.messages:
            message = json.loads(line)
            if message["type"] == kind:
                return message
        raise AssertionError(f"the worker ended without {kind!r}")


@pytest.fixture
def worker(plugin, tmp_path):
    with open(tmp_path / "log", "w") as log:
        spoken = Spoken(log)
        yield spoken
    spoken.process.kill()
    spoken.process.wait()
    spoken.messages.close()
    with contextlib.suppress(OSError):
        os.close(spoken.write_fd)


def _request(case, cache, out, number=1):
    arrays = {name: ref.to_json() for name, ref in fixtures.build(case, cache).items()}
    return {"type": "run", "id": number, "case": str(case), "arrays": arrays, "out": str(out), "mutation": None}


def test_a_worker_serves_one_case_after_another(worker, cache, tmp_path):
    assert worker.hear("ready")["versions"]["fake"] == "1.0"
    case = Case.parse(case_id(1, dp=1))
    for number in (1, 2):
        worker.send(**_request(case, cache, tmp_path, number))
        assert worker.hear("started")["id"] == number
        assert worker.hear("finished") | {"seconds": 0} == {
            "type": "finished", "id": number, "ranks": [0], "seconds": 0,
        }  # fmt: skip
    assert RankResult.load(tmp_path, 0).y.shape == (7, 16)


def test_an_exception_is_a_message_and_the_worker_lives_on(worker, cache, tmp_path):
    case = Case.parse(case_id(1, dp=1))
    request = _request(case, cache, tmp_path)
    worker.send(**request | {"case": "nonsense"})
    failed = worker.hear("failed")
    assert failed["error"].startswith("parity.case.CaseError: case 'nonsense' has 1 parts")
    assert "Traceback" in failed["traceback"]
    worker.send(**request | {"id": 2})
    assert worker.hear("finished")["id"] == 2


def test_a_bug_cannot_be_planted_in_a_backend_that_has_none(worker, cache, tmp_path):
    worker.send(**_request(Case.parse(case_id(1, dp=1)), cache, tmp_path) | {"mutation": "zero_output"})
    assert "no bugs are known for backend 'fake'; allowed: jax, torch" in worker.hear("failed")["error"]


def test_a_worker_beats_while_it_is_idle_and_ignores_interrupts(worker):
    worker.hear("ready")
    worker.process.send_signal(signal.SIGINT)
    worker.hear("heartbeat")
    worker.hear("heartbeat")


def test_a_worker_ends_when_its_pipe_closes(worker):
    worker.hear("ready")
    os.close(worker.write_fd)
    assert worker.process.wait(10) == 0


def test_a_signal_dumps_every_threads_stack_to_the_log(worker, tmp_path):
    worker.hear("ready")
    deadline = time.monotonic() + 10
    # the main thread waits for a request, soon after it has said that it is ready
    while "in next" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
        worker.process.send_signal(signal.SIGUSR1)
        time.sleep(0.2)
    assert "in next" in (tmp_path / "log").read_text()


def test_rank_zero_is_never_in_trouble(worker, cache, tmp_path):
    worker.send(**_request(Case.parse(case_id(RAISES, dp=1)), cache, tmp_path))
    worker.hear("finished")


def test_an_answer_for_all_tokens_is_cut_as_the_inputs_lie():
    for text in (
        "dp2.tp2.ep/allgather/f32/t7-3.d8.f8/e8.k2",
        "dp2.tp2.ep.nosp/allgather/f32/t7-3.d8.f8/e8.k2",
        "dp2.tp2.ep.native/allgather/f32/t7-0.d8.f8/e8.k2",
    ):
        case = Case.parse(text)
        y, ids = np.arange(case.total_tokens)[:, None] * np.ones(8), np.arange(2 * case.total_tokens).reshape(-1, 2)
        ranks = hand_out(case, y, "float32", topk_ids=ids, topk_weights=ids * 0.5)
        for rank, (start, count) in enumerate(holdings(case)):
            assert ranks[rank].y[:, 0].tolist() == list(range(start, start + count))
            decisions = ranks[rank].decisions
            assert len(decisions.token_index) == case.rank_counts[rank]
            assert np.array_equal(decisions.topk_ids, ids[decisions.token_index])
        once = [r for r in ranks if case.sequence_parallel or r % case.tp == 0]
        tokens = np.concatenate([ranks[r].decisions.token_index for r in once])
        assert tokens.tolist() == list(range(case.total_tokens))


# Layout.
def test_uneven_ranks_are_padded_with_poison(cache):
    case = Case.parse("dp3.tp1.ep/allgather/bf16/t2-0-5.d8.f8/e6.k2")
    arrays = fixtures.build(case, cache)
    laid = token_blocks(case, arrays)
    assert laid.counts == (2, 0, 5)
    assert laid.blocks["x"].shape == (3, 5, 8)
    dense = arrays["x"].open()
    assert np.array_equal(laid.blocks["x"][0, :2], dense[:2])
    assert np.array_equal(laid.blocks["x"][2], dense[2:])
    assert np.isnan(float32_of_bits(laid.blocks["x"][0, 2:])).all()
    assert np.isnan(laid.blocks["router_logits"][1]).all()


def test_given_ids_are_padded_with_the_sentinel(cache):
    case = Case.parse("dp2.tp1.ep/allgather/f32/t1-3.d8.f8/e6.k2/ids")
    laid = token_blocks(case, fixtures.build(case, cache))
    assert (laid.blocks["topk_ids"][0, 1:] == 6).all()
    assert np.isnan(laid.blocks["topk_weights"][0, 1:]).all()


def test_equal_ranks_have_no_counts_and_no_padding(cache):
    case = Case.parse("dp2.tp2.ep/allgather/f32/t3.d8.f8/e8.k2")
    laid = token_blocks(case, fixtures.build(case, cache))
    assert laid.counts is None
    assert not np.isnan(laid.blocks["x"]).any()
    assert [block_of_rank(case, rank) for rank in range(4)] == [0, 0, 1, 1]


def test_tokens_split_over_both_axes_have_a_block_a_rank(cache):
    case = Case.parse("dp2.tp2.ep.native/allgather/f32/t3-0.d8.f8/e8.k2")
    arrays = fixtures.build(case, cache)
    laid = token_blocks(case, arrays)
    assert laid.counts == (2, 1, 0, 0)
    assert np.array_equal(laid.blocks["x"][1, :1], arrays["x"].open()[2:])
    assert [block_of_rank(case, rank) for rank in range(4)] == [0, 1, 2, 3]


def test_parameters_are_what_is_no_input(cache):
    case = Case.parse("dp1.tp1/local/f32/t3.d8.f8/e4.k2/gate")
    assert set(parameters(fixtures.build(case, cache))) == {"experts.gate_up", "experts.down", "router.gate"}
