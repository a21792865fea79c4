"""Finding backends, choosing among them, and what they say they can do."""

import pytest

from parity import backends
from parity.backends import BackendError
from parity.backends.base import Backend, Capabilities, Options
from parity.case import FLAGS, Case


class Complete(Backend):
    def setup(self, member):
        return {}

    def run(self, case, arrays, lessons=None):
        return {}


class Incomplete(Backend):
    def setup(self, member):
        return {}


@pytest.fixture
def installed(monkeypatch):
    """Pretends that entry points are installed: name -> module:Class."""

    def install(**places):
        monkeypatch.setattr(backends, "available", lambda: {**places, **backends.BUILT_IN})

    return install


def test_a_list_with_commas_names_each_framework_once():
    assert backends.chosen(None) == ("jax", "torch")
    assert backends.chosen("torch, jax,torch") == ("torch", "jax")
    assert backends.chosen("hf-*,jax,hf-qwen3") == ("hf-deepseek-v3", "hf-gpt-oss", "hf-mixtral", "hf-qwen3", "jax")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("jax,trch", r"unknown framework 'trch' \(did you mean 'torch'\?\); allowed: .*jax, .*torch"),
        ("jax,", "unknown framework ''; allowed: "),
        ("JAX", "unknown framework 'JAX'"),
        ("hg-*", "unknown framework 'hg-\\*'"),
    ],
)
def test_an_unknown_name_is_answered_with_what_there_is(text, message):
    with pytest.raises(BackendError, match=message):
        backends.chosen(text)


def test_the_entry_points_name_is_the_backends(installed):
    installed(mine=f"{__name__}:Complete")
    assert backends.load("mine", Options()).name == "mine"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no.such.module:Complete", "cannot be imported: No module named 'no'"),
        (f"{__name__}:Missing", "cannot be imported: .* has no attribute 'Missing'"),
        ("parity.case:Case", "is no subclass of parity.backends.base.Backend"),
        (f"{__name__}:Incomplete", "cannot be constructed: .*abstract method.*run"),
    ],
)
def test_a_class_that_cannot_be_had_is_explained(installed, place, message):
    installed(mine=place)
    with pytest.raises(BackendError, match=f"backend 'mine' at '{place}' {message}"):
        backends.load("mine", Options())


SMALL = Capabilities(
    formats=("f32",),
    modes=("single", "DP", "EP+SP"),
    transports=("local", "allgather"),
    options=frozenset({"gate", "renorm", "gelu", "groups"}),
    needs=frozenset({"gate"}),
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dp2.tp1/local/f32/t4.d8.f8/e4.k2/gate+renorm+gelu+groups2-1+seed3+mean", None),
        ("dp1.tp1/local/bf16/t4.d8.f8/e4.k2/gate", "it has no format 'bf16'; it has f32"),
        ("dp1.tp2/local/f32/t4.d8.f8/e4.k2/gate", "it has no parallel mode 'TP'; it has single, DP, EP+SP"),
        ("dp2.tp2.ep/ragged/f32/t4.d8.f8/e4.k2/gate", "it has no transport 'ragged'; it has local, allgather"),
        ("dp1.tp1/local/f32/t4.d8.f8/e4.k2/gate+latent+scale2.5", "it has no 'latent' and no 'scale'"),
        ("dp1.tp1/local/f32/t4.d8.f8/e4.k2/renorm", "it always has 'gate', and the case does not"),
    ],
)
def test_a_refusal_names_the_missing_capability(text, reason):
    assert SMALL.missing(Case.parse(text)) == reason
    assert Capabilities().missing(Case.parse(text)) is None


def test_every_flag_that_changes_the_layer_is_an_option():
    texts = {
        "shared2": "shared", "shared+sharedgate": "sharedgate", "gate": "gate", "ids": "ids", "latent4": "latent",
        "sigmoid": "sigmoid", "renorm": "renorm", "groups2-1": "groups", "bias": "bias", "scale2": "scale",
        "weightin": "weightin", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "swigluoai": "swigluoai", "relu2": "relu2",
        "ungated": "ungated", "interleaved": "interleaved", "swigluoai+alpha2": "alpha", "swigluoai+limit2": "limit",
        "expertbias": "expertbias",
    }  # fmt: skip
    for text, option in texts.items():
        assert option in Case.parse(f"dp1.tp1/local/f32/t4.d8.f8/e4.k2/{text}").options
    assert Case.parse("dp1.tp1/local/f32/t4.d8.f8/e4.k2/relu2").options == {"relu2"}
    assert Case.parse("dp2.tp1.ep/padded/f32/t4.d8.f8/e4.k2/capacity1+mean+hot+seed4").options == {"capacity"}
    words = {word.strip().rstrip("XNGK-") for key in FLAGS for word in key.split(",")}
    assert set(texts.values()) == words - {"capacity", "maxrows", "mean", "hot", "ties", "nearties", "seed"}
