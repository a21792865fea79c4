"""Variants of a batch, what is compared, the table of promises, and both layers held to it."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from parity import backends, determinism, fixtures
from parity.arrays import values
from parity.backends.base import Options
from parity.backends.layout import token_blocks
from parity.case import FORMATS, TRANSPORTS, Case
from parity.determinism import compare, variants
from parity.launch import RankError
from parity.promises import KERNELS, LAYERS, PROPERTIES, promised
from tests.parity.backends.alone import alone
from tests.parity.simulated import simulate

CASE = "dp2.tp1/local/f32/t5-2.d16.f8/e4.k2"


@pytest.fixture
def varied(oracle, tmp_path):
    """case id -> (case, its arrays, variants by name)."""

    def make(text):
        case, arrays, _ = oracle(text)
        return case, arrays, {variant.what: variant for variant in variants(case, arrays, tmp_path)}

    return make


def test_every_way_of_changing_a_batch_has_its_variant(varied):
    assert set(varied(CASE)[2]) == set(PROPERTIES) - {"repeat"}
    assert set(varied("dp1.tp1/local/f32/t4.d16.f8/e4.k2")[2]) == {"values", "others", "fewer", "moved"}
    assert set(varied("dp2.tp1/local/f32/t1.d16.f8/e4.k2")[2]) == {"elsewhere"}
    assert set(varied("dp2.tp2.ep.native/allgather/f32/t3.d16.f8/e4.k2")[2]) > {"padding", "elsewhere"}


@pytest.mark.parametrize("flags", ["", "/gate", "/ids"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_watched_tokens_are_the_same_and_the_others_are_not(varied, flags, fmt):
    _, arrays, found = varied(CASE.replace("f32", fmt) + flags)
    for variant in found.values():
        changed = 0
        for name in ("x", "router_logits", "topk_ids", "topk_weights"):
            if name not in arrays:
                continue
            one, two = values(arrays[name]), values(variant.arrays[name])
            assert len(two) == variant.case.total_tokens
            assert np.array_equal(one[variant.before], two[variant.after]), (variant.what, name)
            if len(one) == len(two):
                left = np.setdiff1d(np.arange(len(one)), variant.before)
                changed += bool(len(left)) and (one[left] != two[left]).any(axis=1).all()
        assert changed or variant.what in ("padding", "moved", "fewer"), variant.what
        assert variant.arrays["experts.down"] == arrays["experts.down"]
    assert found["fewer"].case.tokens == (3, 1)
    assert found["moved"].after.tolist() == [4, 3, 2, 1, 0, 6, 5]
    assert found["elsewhere"].before.tolist() == [0, 1, 2, 3, 4]


def test_tokens_that_keep_their_experts_keep_them(varied, oracle):
    from parity.oracle import reference

    for flags in ("", "/gate", "/ids", "/gate+sigmoid"):
        case, arrays, found = varied(CASE + flags)
        ids = reference(case, arrays).ids
        assert np.array_equal(reference(case, found["values"].arrays).ids, ids)
        assert not np.array_equal(reference(case, found["others"].arrays).ids, ids)


def test_padding_holds_the_number_it_is_given(varied):
    case, arrays, found = varied(CASE)
    blocks = [token_blocks(case, each).blocks["x"][1, 2:] for each in (arrays, found["padding"].arrays)]
    assert np.isnan(blocks[0]).all()
    assert (blocks[1] == determinism.OTHER_PADDING).all()


def test_one_other_bit_is_seen_counted_and_placed(varied, oracle):
    case, _, reference = oracle(CASE)
    variant = varied(CASE)[2]["values"]
    base, changed = simulate(case, reference), simulate(case, reference)
    assert compare(case, base, variant, changed, "jax", True).state == "equal"
    row = changed[0].y[2]
    row[3] = np.nextafter(row[3], np.inf, dtype=np.float32)
    found = compare(case, base, variant, changed, "jax", True)
    assert (found.state, found.tokens, found.differing, found.first) == ("differs", 4, 1, "output")
    assert 0 < found.ulps <= 1
    assert not found.good
    assert compare(case, base, variant, changed, "mine", False).good
    changed[0].y[2] = base[0].y[2]
    changed[0].y[1] += 1  # not watched
    assert compare(case, base, variant, changed, "jax", True).state == "equal"


def test_a_negative_zero_is_another_bit(varied, oracle):
    case, _, reference = oracle(CASE)
    zeros = dataclasses.replace(reference, y=np.zeros_like(reference.y))
    base, changed = simulate(case, zeros), simulate(case, zeros)
    changed[0].y[0] *= -1
    assert compare(case, base, varied(CASE)[2]["others"], changed, "jax", True).differing == 1


def test_logits_that_differ_are_named_before_the_output(varied, oracle):
    case, _, reference = oracle(CASE)
    base = simulate(case, reference)
    off = dataclasses.replace(reference, logits=reference.logits + 1e-3, y=reference.y + 1e-3)
    assert compare(case, base, varied(CASE)[2]["others"], simulate(case, off), "jax", False).first == "router logits"


def test_a_variant_whose_tokens_were_routed_otherwise_is_not_judged(varied, oracle):
    case, _, reference = oracle(CASE)
    ids = reference.ids.copy()
    ids[1] = (ids[1] + 1) % 4
    found = compare(
        case, simulate(case, reference), varied(CASE)[2]["values"], simulate(case, reference.replay(ids)), "jax", True
    )
    assert (found.state, found.good) == ("not tried", True)


@dataclasses.dataclass
class Live:
    """A session whose backends answer in this process."""

    backends: list
    scratch: object
    cache: object

    def arrays(self, case):
        return fixtures.build(case, self.cache)

    def answers(self, case, arrays, backends):
        return {each.name: [result for _, result in sorted(each.run(case, arrays).items())] for each in backends}, None


class Toy:
    """A layer of one line, under a name of the table; `leaks` lets the batch into each token."""

    def __init__(self, name="jax", leaks=0.0, fails=False):
        self.name, self.leaks, self.fails, self.options = name, leaks, fails, Options()

    def unsupported(self, case):
        return None

    def run(self, case, arrays):
        from parity.backends.layout import hand_out

        if self.fails and case.tokens != (5, 2):
            raise RankError("died", "rank 1 died", "rank 1", "log", "")
        x = values(arrays["x"]).astype(np.float64)
        y = np.sin(x) + self.leaks * x.mean()
        return hand_out(case, y.astype(np.float32), "float32", repeat_equal=True)


def findings(live):
    return {(f.framework, f.what): f for f in determinism.run(live, [Case.parse(CASE)])}


def test_a_layer_that_lets_the_batch_in_breaks_its_promises_and_no_others(tmp_path, cache):
    found = findings(Live([Toy("jax"), Toy("torch", leaks=1e-3), Toy("mine", leaks=1e-3)], tmp_path, cache))
    assert {what for _, what in found} == set(PROPERTIES)
    assert all(f.state == "equal" for (name, _), f in found.items() if name == "jax")
    differ = {what for (name, what), f in found.items() if name == "torch" and f.state == "differs"}
    assert {"values", "elsewhere", "others", "fewer"} <= differ
    assert {what for what in differ if not found["torch", what].good} == {"values", "elsewhere"}
    assert all(f.good and not f.promised for (name, _), f in found.items() if name == "mine")


@pytest.mark.parametrize(
    ("toys", "status", "words"),
    [
        ([Toy("jax"), Toy("torch")], 0, "8 of 8 promises kept"),
        ([Toy("jax"), Toy("mine", leaks=1e-3)], 0, "4 of 4 promises kept"),
        ([Toy("jax", leaks=1e-3)], 1, "2 of 4 promises kept"),
        ([Toy("jax", fails=True)], 3, "rank 1 died"),
        ([], 3, "0 of 0"),
    ],
)
def test_the_status_says_whether_promises_were_kept(tmp_path, cache, monkeypatch, toys, status, words):
    import contextlib

    live = contextlib.nullcontext(Live(toys, tmp_path, cache))
    monkeypatch.setattr(determinism, "session", lambda *_, **__: live)
    out = io.StringIO()
    assert determinism.main([Case.parse(CASE)], toys, 1.0, False, Console(file=out, width=250)) == status
    assert words in out.getvalue()
    said = []
    determinism.main([Case.parse(CASE)], toys, 1.0, True, Console(file=io.StringIO()), said.append)
    assert json.loads(said[0])["status"] == status


def test_the_table_has_every_framework_platform_and_transport():
    rows = [(p.framework, p.platform, p.what) for p in LAYERS]
    assert sorted(rows) == sorted(
        (name, where, transport) for name in backends.DEFAULT for where in ("cpu", "gpu") for transport in TRANSPORTS
    )
    for promise in (*LAYERS, *KERNELS):
        assert promise.keeps <= set(PROPERTIES)
        assert promise.why
    assert promised("mine", "cpu", Case.parse(CASE)) == frozenset()
    assert promised("jax", "cpu", Case.parse(CASE)) == {"repeat", "padding", "values", "elsewhere"}
    assert len(determinism.promises()) == len(LAYERS) + len(KERNELS)


ALONE = "dp1.tp1/local/f32/t6.d16.f8/e4.k2"


@pytest.mark.parametrize(
    ("name", "text"), [("torch", ALONE), ("jax", ALONE), pytest.param("jax", CASE, marks=pytest.mark.slow)]
)
def test_the_layers_keep_what_is_promised(name, text, tmp_path, cache, monkeypatch):
    mine, every = promised(name, "cpu", Case.parse(text)), variants
    monkeypatch.setattr(determinism, "variants", lambda *args: (v for v in every(*args) if v.what in mine))
    with alone(name) as backend:
        found = list(determinism.run(Live([backend], tmp_path, cache), [Case.parse(text)]))
    assert {f.what for f in found} == mine - ({"padding", "elsewhere"} if text == ALONE else set())
    assert [f for f in found if f.state != "equal"] == []


def test_the_command_prints_the_table(capsys):
    from typer.testing import CliRunner

    from parity.cli import app

    shown = CliRunner().invoke(app, ["list", "--determinism"])
    assert shown.exit_code == 0
    for word in (*PROPERTIES, *TRANSPORTS, "mosaic_gpu"):
        assert word in shown.output
    data = json.loads(CliRunner().invoke(app, ["list", "--determinism", "--json"]).output)
    assert data == determinism.promises()
