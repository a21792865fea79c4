"""Problems for kernels: adversarial group sizes, and the float64 formulas they are held to."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_moe.activation import Activation

SILU = Activation(name="silu")
ACTIVATIONS = {
    "silu": SILU,
    "interleaved": Activation(name="silu", layout="interleaved"),
    "gelu": Activation(name="gelu"),
    "gelu_tanh": Activation(name="gelu_tanh"),
    "swigluoai": Activation(name="swigluoai", layout="interleaved"),
    "relu2": Activation(name="relu2", gated=False),
    "ungated gelu": Activation(name="gelu", gated=False),
}


CARDS = {"A100": "NVIDIA A100-SXM4-80GB", "L4": "NVIDIA L4", "H100": "NVIDIA H100 80GB HBM3"}


def card(kind: str, mesh: jax.sharding.Mesh | None = None):
    """A context in which programs are lowered for a GPU that is not here, alone or as the devices of `mesh`."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=108, platform="gpu")
    sizes, names, types = (mesh.axis_sizes, mesh.axis_names, mesh.axis_types) if mesh is not None else ((), (), None)
    abstract = jax.sharding.AbstractMesh(sizes, names, axis_types=types, abstract_device=device)
    return jax.sharding.use_abstract_mesh(abstract)


def group_sizes(kind: str, tile: int) -> list[int]:
    """Sizes around the edges of a tile, and the shapes of load that real routers make."""
    kinds = {
        "one row": [0, 0, 1, 0],
        "edges": [1, tile - 1, tile, tile + 1, 2 * tile, 0, 7, 9, tile + tile // 2, tile // 2 + 1],
        "mostly empty": [{17: 5, 64: tile + 3, 65: 1, 200: 5, 254: tile, 255: tile + 3}.get(g, 0) for g in range(256)],
        "everything in one": [0, 0, 3 * tile + 5],
        "none": [0, 0, 0],
    }
    return kinds[kind]


KINDS = ("one row", "edges", "mostly empty", "everything in one", "none")


def operands(sizes, depth, weight_rows, *, spare=0, bias=False, seed=0, dtype=jnp.bfloat16):
    """Rows of `dtype` with NaN past the last group, weights, int32 sizes, and biases or None."""
    rng = np.random.default_rng(seed)
    total = sum(sizes)
    x = rng.standard_normal((max(total + spare, 1), depth))
    x[total:] = np.nan
    w = rng.standard_normal((len(sizes), weight_rows, depth)) / math.sqrt(depth)
    b = rng.standard_normal((len(sizes), weight_rows))
    x, w, b = (jnp.asarray(a, dtype) for a in (x, w, b))
    return x, w, jnp.asarray(sizes, jnp.int32), b if bias else None


def activated(gate_up: np.ndarray, activation: Activation) -> np.ndarray:
    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    up = None
    gate = gate_up
    if activation.gated:
        half = gate_up.shape[1] // 2
        pair = (gate_up[:, :half], gate_up[:, half:])
        gate, up = pair if activation.layout == "concatenated" else (gate_up[:, ::2], gate_up[:, 1::2])
    if activation.name == "swigluoai":
        gate, up = np.minimum(gate, activation.limit), np.clip(up, -activation.limit, activation.limit) + 1
        return gate * sigmoid(activation.alpha * gate) * up
    h = {
        "silu": lambda v: v * sigmoid(v),
        "gelu": lambda v: 0.5 * v * (1 + np.vectorize(math.erf, otypes=[float])(v / math.sqrt(2))),
        "gelu_tanh": lambda v: 0.5 * v * (1 + np.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
        "relu2": lambda v: np.maximum(v, 0) ** 2,
    }[activation.name](gate)
    return h if up is None else h * up


def expected(x, w, sizes, *, activation=None, bias=None) -> np.ndarray:
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out, start = None, 0
    for group, size in enumerate(np.asarray(sizes)):
        y = x[start : start + size] @ w[group].T
        if bias is not None:
            y = y + np.asarray(bias, np.float64)[group]
        if activation is not None:
            y = activated(y, activation)
        if out is None:
            out = np.zeros((len(x), y.shape[1]))
        out[start : start + size] = y
        start += size
    return out


def assert_right(got, want, total: int) -> None:
    """Per row within the error of one rounding to its dtype after float32 sums; exact zeros past the last row."""
    roundoff = float(jnp.finfo(got.dtype).eps) / 2
    got = np.asarray(got, np.float64)
    assert got.shape == want.shape
    assert (got[total:] == 0).all(), "rows past the last group are not zeros"
    norm = np.maximum(np.linalg.norm(want[:total], axis=1), 1e-30)
    error = np.linalg.norm(got[:total] - want[:total], axis=1) / norm
    worst = int(np.argmax(error)) if total else 0
    assert total == 0 or error[worst] < roundoff, f"row {worst} of {total} is off by {error[worst]:.2e}"
