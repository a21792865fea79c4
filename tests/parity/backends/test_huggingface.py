"""The MoE blocks of transformers, which nobody here wrote: held to the oracle, and what they cannot express."""

import json
import subprocess
import sys

import pytest

from parity import backends, grids
from parity.backends import contract
from parity.backends.base import Member, Options
from parity.case import Case
from parity.records import read
from parity.verdict import judge

BLOCKS = ("hf-mixtral", "hf-qwen3", "hf-deepseek-v3", "hf-gpt-oss")
GRID = grids.load("huggingface")
TAKEN = [(name, case) for name in BLOCKS for case in GRID if backends.load(name, Options()).unsupported(case) is None]


@pytest.fixture(scope="module")
def block():
    """name -> that block's backend, set up in this process."""
    pytest.importorskip("torch", reason="needs PyTorch")
    pytest.importorskip("transformers", reason="needs transformers: pip install 'moe-parity[transformers]'")
    made = {}

    def get(name):
        if name not in made:
            made[name] = backends.load(name, Options())
            made[name].setup(Member(index=0, processes=1, options=Options(), publish=print, receive=str))
        return made[name]

    return get


def answer(backend, case, arrays):
    return [result for _, result in sorted(contract.check(case, backend.run(case, arrays), False).items())]


def test_the_grid_asks_every_block_and_no_block_for_all():
    taken = {name: [case for who, case in TAKEN if who == name] for name in BLOCKS}
    assert all(2 <= len(cases) < len(GRID) for cases in taken.values())
    assert {str(case) for cases in taken.values() for case in cases} == set(map(str, GRID))
    options = {name: frozenset().union(*(case.options for case in cases)) for name, cases in taken.items()}
    known = {name: backends.load(name, Options()).capabilities.options for name in BLOCKS}
    assert options["hf-deepseek-v3"] == known["hf-deepseek-v3"] - {"gelu_tanh"}
    assert options["hf-gpt-oss"] == known["hf-gpt-oss"]


@pytest.mark.parametrize(("name", "case"), TAKEN, ids=[f"{name} {case}" for name, case in TAKEN])
def test_a_block_agrees_with_the_oracle(block, oracle, name, case):
    _, arrays, reference = oracle(str(case))
    judgement = judge(case, reference, {name: answer(block(name), case, arrays)})
    assert judgement.verdict == "pass", judgement.reason
    side = judgement.metrics["frameworks"][name]
    assert side["exemptions"] == 0
    assert side["not_checked"] == ["rows, loads and drops"]
    assert 0.1 < side["observed_over_model"] < 1


def test_the_command_holds_them_to_both_frameworks(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'moe-parity[transformers]'")
    case = "dp2.tp1/local/f32/t1-9.d64.f48/e8.k3/gate+renorm+gelu_tanh+mean"
    command = [sys.executable, "-m", "parity", "run", case, "--frameworks", "jax,torch,hf-mixtral,hf-gpt-oss"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = read(tmp_path / "results.jsonl")[case].metrics
    assert {"jax vs torch", "jax vs hf-mixtral", "torch vs hf-mixtral"} <= set(metrics)
    assert set(metrics["skipped"]) == {"hf-gpt-oss"}
    assert "transformers" in json.loads((tmp_path / "summary.json").read_text())["versions"]


@pytest.mark.parametrize(
    ("name", "text", "gates"),
    [
        ("hf-mixtral", "dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate", {"router", "oracle"}),
        ("hf-qwen3", "dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate+renorm+gelu", {"oracle"}),
        ("hf-deepseek-v3", "dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate+sigmoid+renorm+scale2", {"router", "oracle"}),
        ("hf-gpt-oss", "dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate+renorm+swigluoai+interleaved+limit0.5", {"oracle"}),
    ],
)
def test_a_block_that_does_another_thing_than_the_case_fails(block, oracle, monkeypatch, name, text, gates):
    case, arrays, reference = oracle(text)
    backend = block(name)
    right = backend.config(case)
    wrong = {"norm_topk_prob": False, "hidden_act": "silu", "swiglu_limit": 7.0}  # without the case's option
    monkeypatch.setattr(backend, "config", lambda case: right | {k: v for k, v in wrong.items() if k in right})
    judgement = judge(case, reference, {name: answer(backend, case, arrays)})
    assert judgement.verdict == "fail"
    assert gates <= {gate.gate for gate in judgement.gates if not gate.passed}


def test_a_block_left_without_a_weight_is_refused(block, oracle, monkeypatch):
    case, arrays, _ = oracle("dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate+renorm")
    backend = block("hf-mixtral")
    state = backend.state
    monkeypatch.setattr(
        backend, "state", lambda *args: {k: v for k, v in state(*args).items() if k != "experts.down_proj"}
    )
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.down_proj"):
        backend.run(case, arrays)


DEEPSEEK = "dp1.tp1/local/f32/t13.d64.f48/e8.k2/gate+sigmoid"


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("hf-mixtral", "dp1.tp1/local/f32/t5.d8.f8/e4.k2/gate", "it always has 'renorm', and the case does not"),
        ("hf-mixtral", "dp1.tp1/local/f32/t5.d8.f8/e4.k2/renorm", "it always has 'gate', and the case does not"),
        ("hf-qwen3", "dp1.tp1/local/f32/t5.d8.f8/e4.k2/gate+shared", "it has no 'shared'"),
        ("hf-qwen3", "dp1.tp1/local/f32/t5.d8.f8/e4.k2/gate+ties", "it has no rule for equal scores"),
        ("hf-qwen3", "dp1.tp1/local/f32/t5.d8.f8/e4.k2/gate+relu2", "it has no 'relu2'"),
        ("hf-qwen3", "dp2.tp1.ep/padded/f32/t5.d8.f8/e4.k2/gate+capacity1", "it has no 'capacity'"),
        ("hf-deepseek-v3", DEEPSEEK + "+groups2-1", "by its best two experts; without 'bias'"),
        ("hf-deepseek-v3", DEEPSEEK + "+groups8-4+bias", "by its best two experts; the case has 1 in a group"),
        ("hf-deepseek-v3", DEEPSEEK + "+interleaved", "it has no 'interleaved'"),
        ("hf-gpt-oss", "dp1.tp1/local/f32/t5.d8.f8/e4.k2/gate+renorm+swigluoai", "it always has 'interleaved'"),
    ],
)
def test_what_a_block_cannot_express_is_refused_by_name(name, text, reason):
    assert reason in backends.load(name, Options()).unsupported(Case.parse(text))


def test_without_transformers_the_message_says_how_to_get_it(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert backends.load("hf-qwen3", Options()).missing() == (
        "backend 'hf-qwen3' needs the package 'transformers', which is not installed; "
        "install it with: pip install 'moe-parity[transformers]'"
    )
