"""The operations on Hopper GPUs: what the kernels can do, and calls to them that differentiate.

Kernels are imported where they are called: a machine without a GPU does not pay for them, nor depend on them.

Shape suffixes: R rows sorted by group, e groups (local experts), D depth, N outputs, M rows of the first projection
(2F gated, F not), F expert intermediate size, t tokens, K experts per token, E experts.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe._compat import varying_axes
from jax_moe._typing import Array
from jax_moe.activation import Activation
from jax_moe.kernels import reference
from jax_moe.kernels.gradients import with_gradient_of

DTYPES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "relu2")


def capability() -> str | None:
    """Compute capability of the default backend's GPUs, as "9.0"; None where there is no NVIDIA GPU."""
    device = jax.devices()[0]
    return getattr(device, "compute_capability", None) if device.platform == "gpu" else None


def no_hopper() -> str | None:
    """Why Hopper kernels cannot run here. Where there is no GPU at all they can still be lowered for one."""
    found = capability()
    return None if found in (None, "9.0") else f"this GPU has compute capability {found}, the kernels are for 9.0"


@functools.cache
def no_triton() -> str | None:
    """Why Pallas's Triton backend cannot be used: JAX 0.11 announces that a later version will be without it."""
    found = importlib.util.find_spec("jax.experimental.pallas.triton")
    return None if found else "this JAX has no Pallas Triton backend"


def _typed_axes(*operands: Any) -> str | None:
    if any(varying_axes(x) for x in operands if isinstance(x, jax.Array)):
        return "inside shard_map with check_vma=True; the kernels' results carry no varying axes"
    return None


def no_product(x: Any, w: Any, *operands: Any) -> str | None:
    """Why the product of these operands is not for the kernels; None: it is."""
    (rows, depth), (_, columns, _) = x.shape, w.shape
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        return f"operands are {x.dtype} and {w.dtype}, the kernels take two of bfloat16 or two of float16"
    if depth % 8 or columns % 8:
        return f"depth {depth} and {columns} outputs are not both multiples of 8"
    if depth < 64 or columns < 8:
        return f"depth {depth} is less than 64"
    if rows == 0:
        return "there are no rows"
    return no_hopper() or _typed_axes(x, w, *operands)


def no_grouped_matmul(x: Any, w: Any, sizes: Any, bias: Any, out_dtype: Any) -> str | None:
    reason = no_product(x, w, sizes, bias)
    if reason is None and jnp.dtype(out_dtype) != x.dtype:
        return f"the result is asked for in {jnp.dtype(out_dtype)}, the kernels give that of the operands, {x.dtype}"
    return reason


def no_gate_up(x: Any, w: Any, sizes: Any, activation: Activation, bias: Any) -> str | None:
    if activation.name not in ACTIVATIONS:
        return f"activation {activation.name!r} is not one of {', '.join(ACTIVATIONS)}"
    if activation.gated and w.shape[1] % 16:
        return f"an intermediate size of {w.shape[1] // 2} is not a multiple of 8"
    return no_product(x, w, sizes, bias)


def no_rows(x: Any, *operands: Any) -> str | None:
    if 0 in x.shape:
        return f"nothing to move in {x.shape}"
    return no_triton() or _typed_axes(x, *operands)


def no_routing(array: Any, *operands: Any) -> str | None:
    if 0 in array.shape:
        return f"nothing to route in {array.shape}"
    return no_triton() or _typed_axes(array, *operands)


def grouped_matmul(
    x_RD: Array, w_eND: Array, group_sizes_e: Array, bias_eN: Array | None, out_dtype: jnp.dtype
) -> Array:
    """See `ops.grouped_matmul`."""
    from jax_moe.kernels import tiles

    choice = tiles.choose_tile(x_RD.shape[0], w_eND.shape[0])

    def kernel(x_RD: Array, w_eND: Array, group_sizes_e: Array, bias_eN: Array | None) -> Array:
        return _multiply(choice, x_RD, w_eND, group_sizes_e, None, bias_eN)

    plain = functools.partial(reference.grouped_matmul, out_dtype=out_dtype)
    return with_gradient_of(plain, kernel)(x_RD, w_eND, group_sizes_e, bias_eN)


def gate_up(x_RD: Array, w_eMD: Array, group_sizes_e: Array, activation: Activation, bias_eM: Array | None) -> Array:
    """See `ops.gate_up`."""
    from jax_moe.kernels import tiles

    choice = tiles.choose_tile(x_RD.shape[0], w_eMD.shape[0])

    def kernel(x_RD: Array, w_eMD: Array, group_sizes_e: Array, bias_eM: Array | None) -> Array:
        return _multiply(choice, x_RD, w_eMD, group_sizes_e, activation, bias_eM)

    def plain(x_RD: Array, w_eMD: Array, group_sizes_e: Array, bias_eM: Array | None) -> Array:
        return reference.gate_up(x_RD, w_eMD, group_sizes_e, activation, bias_eM)

    return with_gradient_of(plain, kernel)(x_RD, w_eMD, group_sizes_e, bias_eM)


def _multiply(
    choice: Any, x_RD: Array, w: Array, group_sizes_e: Array, activation: Activation | None, bias: Array | None
) -> Array:
    if no_triton() is None:
        from jax_moe.kernels.triton_routing import make_schedule  # one launch in place of three
    else:
        from jax_moe.kernels.schedule import make_schedule

    rows = x_RD.shape[0]
    if rows < choice.tile.rows:  # a load's box must fit into the array; rows past the last group are nobody's
        x_RD = jnp.pad(x_RD, ((0, choice.tile.rows - rows), (0, 0)))
    schedule = make_schedule(group_sizes_e, rows=x_RD.shape[0], tile=choice.tile.rows)
    return choice.run(x_RD, w, schedule, activation=activation, bias=bias, tile=choice.tile)[:rows]


def gather_rows(x_tD: Array, index_R: Array, position_tK: Array | None, group_sizes_e: Array | None) -> Array:
    """See `ops.gather_rows`."""
    from jax_moe.kernels import triton_rows

    if position_tK is None or group_sizes_e is None:
        return with_gradient_of(reference.gather_rows, triton_rows.gather_rows)(x_tD, index_R)

    def kernel(x_tD: Array, index_R: Array, position_tK: Array, group_sizes_e: Array) -> Array:
        return triton_rows.spread_rows(x_tD, position_tK, group_sizes_e, rows=index_R.shape[0])

    return with_gradient_of(reference.gather_rows, kernel)(x_tD, index_R, position_tK, group_sizes_e)


def combine_rows(y_RD: Array, position_tK: Array, weights_tK: Array) -> Array:
    """See `ops.combine_rows`."""
    from jax_moe.kernels import triton_rows

    return with_gradient_of(reference.combine_rows, triton_rows.combine_rows)(y_RD, position_tK, weights_tK)


def choose_experts(
    logits_tE: Array, bias_E: Array | None, top_k: int, scoring: str, renormalize: bool, scaling: float
) -> tuple[Array, Array]:
    """See `ops.choose_experts`. The gradient is that of the weights, for the choice the kernel made."""
    from jax_moe.kernels import triton_routing

    static = {"top_k": top_k, "scoring": scoring, "renormalize": renormalize, "scaling": scaling}

    @jax.custom_vjp
    def run(logits_tE: Array, bias_E: Array | None) -> tuple[Array, Array]:
        return triton_routing.choose_experts(logits_tE, bias_E, **static)

    def forward(logits_tE: Array, bias_E: Array | None):
        ids_tK, weights_tK = run(logits_tE, bias_E)
        return (ids_tK, weights_tK), (logits_tE, bias_E, ids_tK)

    def backward(saved: tuple, cotangents: tuple):
        logits_tE, bias_E, ids_tK = saved
        weigh = functools.partial(
            reference.weigh_experts, ids_tK=ids_tK, scoring=scoring, renormalize=renormalize, scaling=scaling
        )
        (dlogits_tE,) = jax.vjp(weigh, logits_tE)[1](cotangents[1])
        return dlogits_tE, None if bias_E is None else jnp.zeros_like(bias_E)

    run.defvjp(forward, backward)
    return run(logits_tE, bias_E)


def plan_rows(topk_ids_tK: Array, first_expert: Array | int, num_local_experts: int) -> tuple[Array, Array]:
    """See `ops.plan_rows`."""
    from jax_moe.kernels import triton_routing

    return triton_routing.plan_pairs(topk_ids_tK, first_expert, experts=num_local_experts)
