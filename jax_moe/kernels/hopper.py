"""The operations on GPUs: what the kernels for Hopper, and those in Triton, can do, and calls that differentiate.

Kernels are imported where they are called: a machine without a GPU does not pay for them, nor depend on them.

Shape suffixes: R rows sorted by group, e groups (local experts), D depth, N outputs, M rows of the first projection
(2F gated, F not), F expert intermediate size, t tokens, K experts per token, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jax_moe._compat import varying_axes
from jax_moe._typing import Array
from jax_moe.activation import Activation
from jax_moe.kernels import choice, reference
from jax_moe.kernels.gradients import one_by_one, with_gradient_of
from jax_moe.linear import tf32_asked

NARROW = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
FEW_TOKENS = 8  # all of them in the smallest tile
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "swigluoai", "relu2")


def no_hopper() -> str | None:
    """Why Hopper kernels cannot run here. Where there is no GPU at all they can still be lowered for one."""
    found = choice.capability()
    return None if found in (None, "9.0") else f"this GPU has compute capability {found}: expected 9.0"


def no_tensor_cores() -> str | None:
    """Why the Triton products cannot run here: older cards have no matrix units for bfloat16 and TF32."""
    found = choice.capability()
    if found is None or float(found) >= 8:
        return None
    return f"this GPU has compute capability {found}: expected 8.0 or more"


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
    """Why the product of these operands is not for the Hopper kernels; None: it is."""
    (rows, depth), (experts, columns, _) = x.shape, w.shape
    if not experts:
        return "there are no groups"
    if x.dtype not in NARROW or w.dtype != x.dtype:
        return f"operands are {x.dtype} and {w.dtype}: expected both bfloat16 or both float16"
    if depth % 8 or depth < 64:
        return f"depth {depth}: expected a multiple of 8, 64 or more"
    if columns % 8 or not columns:
        return f"{columns} outputs: expected a multiple of 8"
    if rows == 0:
        return "there are no rows"
    return no_hopper() or _typed_axes(x, w, *operands)


def no_grouped_matmul(x: Any, w: Any, sizes: Any, bias: Any, out_dtype: Any) -> str | None:
    reason = no_product(x, w, sizes, bias)
    if reason is None and jnp.dtype(out_dtype) != x.dtype:
        return f"the result is asked for in {jnp.dtype(out_dtype)}: expected that of the operands, {x.dtype}"
    return reason


def no_gate_up(x: Any, w: Any, sizes: Any, activation: Activation, bias: Any) -> str | None:
    if activation.gated and w.shape[1] % 16:
        return f"an intermediate size of {w.shape[1] // 2}: expected a multiple of 8"
    return no_product(x, w, sizes, bias) or _no_activation(activation)


def no_triton_grouped_matmul(x: Any, w: Any, sizes: Any, bias: Any, out_dtype: Any) -> str | None:
    """Why the product of these operands is not for the Triton kernel; None: it is."""
    if 0 in (*x.shape, *w.shape):
        return f"nothing to multiply in {x.shape} and {w.shape}"
    if x.dtype not in (*NARROW, jnp.float32) or w.dtype != x.dtype:
        return f"operands are {x.dtype} and {w.dtype}: expected both bfloat16, float16, or float32 as TF32"
    if x.dtype == jnp.float32 and not tf32_asked():
        return "operands are float32: expected jax.default_matmul_precision('tensorfloat32') around the call"
    return no_tensor_cores() or no_triton() or _typed_axes(x, w, sizes, bias)


def no_triton_gate_up(x: Any, w: Any, sizes: Any, activation: Activation, bias: Any) -> str | None:
    return no_triton_grouped_matmul(x, w, sizes, bias, x.dtype) or _no_activation(activation)


def _no_activation(activation: Activation) -> str | None:
    known = activation.name in ACTIVATIONS
    return None if known else f"activation {activation.name!r}: expected one of {', '.join(ACTIVATIONS)}"


def no_rows(x: Any, *operands: Any) -> str | None:
    if 0 in x.shape:
        return f"nothing to move in {x.shape}"
    return no_triton() or _typed_axes(x, *operands)


def no_routing(array: Any, *operands: Any) -> str | None:
    if 0 in array.shape:
        return f"nothing to route in {array.shape}"
    return no_triton() or _typed_axes(array, *operands)


def no_gather_gate_up(x: Any, index: Any, w: Any, sizes: Any, activation: Activation, bias: Any) -> str | None:
    """Why rows are better gathered before they are multiplied, or have to be; None: while others are multiplied."""
    rows, (experts, outputs, _), tiles = index.shape[0], w.shape, _tiles()
    gathered = jax.ShapeDtypeStruct((rows, x.shape[1]), x.dtype)
    if (reason := no_gate_up(gathered, w, sizes, activation, bias) or _typed_axes(x, index)) is not None:
        return reason
    if not x.shape[0]:
        return "there are no tokens"
    if rows < tiles.AHEAD_ROWS * experts:
        return f"{rows} rows for {experts} experts: expected {tiles.AHEAD_ROWS} an expert or more"
    if outputs < tiles.AHEAD_WEIGHTS:
        return f"{outputs} rows of weights an expert: expected {tiles.AHEAD_WEIGHTS} or more"
    return None


def no_few_tokens(
    x: Any,
    logits: Any,
    bias: Any,
    w_up: Any,
    bias_up: Any,
    w_down: Any,
    bias_down: Any,
    activation: Activation,
    rule: Any,
) -> str | None:
    if x.shape[0] > FEW_TOKENS:
        return f"{x.shape[0]} tokens: expected at most {FEW_TOKENS}"
    if w_up.shape[0] > 512:
        return f"{w_up.shape[0]} experts: expected at most 512"
    h = jax.ShapeDtypeStruct((x.shape[0], w_down.shape[2]), x.dtype)
    return (
        no_routing(logits, bias)
        or no_gate_up(x, w_up, None, activation, bias_up)
        or no_grouped_matmul(h, w_down, None, bias_down, x.dtype)
    )


def grouped_matmul(x_RD: Array, w_eND: Array, group_sizes_e: Array, bias_eN: Array | None, out_dtype: Any) -> Array:
    """See `ops.grouped_matmul`."""
    return _product(_on_hopper, x_RD, w_eND, group_sizes_e, None, bias_eN, out_dtype)


def gate_up(x_RD: Array, w_eMD: Array, group_sizes_e: Array, activation: Activation, bias_eM: Array | None) -> Array:
    """See `ops.gate_up`."""
    return _product(_on_hopper, x_RD, w_eMD, group_sizes_e, activation, bias_eM, x_RD.dtype)


def gather_gate_up(
    x_tD: Array, index_R: Array, w_eMD: Array, group_sizes_e: Array, activation: Activation, bias_eM: Array | None
) -> Array:
    """See `ops.gather_gate_up`."""

    def kernel(x_tD: Array, index_R: Array, w_eMD: Array, group_sizes_e: Array, bias_eM: Array | None) -> Array:
        gathered = {"index_R": index_R.astype(jnp.int32)}
        return _on_hopper(x_tD, w_eMD, group_sizes_e, activation, bias_eM, x_tD.dtype, **gathered)

    def plain(x_tD: Array, index_R: Array, w_eMD: Array, group_sizes_e: Array, bias_eM: Array | None) -> Array:
        return reference.gather_gate_up(x_tD, index_R, w_eMD, group_sizes_e, activation, bias_eM)

    return with_gradient_of(plain, kernel)(x_tD, index_R, w_eMD, group_sizes_e, bias_eM)


def triton_grouped_matmul(
    x_RD: Array, w_eND: Array, group_sizes_e: Array, bias_eN: Array | None, out_dtype: Any
) -> Array:
    """See `ops.grouped_matmul`."""
    return _product(_in_triton, x_RD, w_eND, group_sizes_e, None, bias_eN, out_dtype)


def triton_gate_up(
    x_RD: Array, w_eMD: Array, group_sizes_e: Array, activation: Activation, bias_eM: Array | None
) -> Array:
    """See `ops.gate_up`."""
    return _product(_in_triton, x_RD, w_eMD, group_sizes_e, activation, bias_eM, x_RD.dtype)


def _product(
    multiply: Callable,
    x_RD: Array,
    w: Array,
    group_sizes_e: Array,
    activation: Activation | None,
    bias: Array | None,
    out_dtype: Any,
) -> Array:
    """The product by `multiply`, with the reference's gradient."""

    def kernel(x_RD: Array, w: Array, group_sizes_e: Array, bias: Array | None) -> Array:
        return multiply(x_RD, w, group_sizes_e, activation, bias, jnp.dtype(out_dtype))

    def plain(x_RD: Array, w: Array, group_sizes_e: Array, bias: Array | None) -> Array:
        if activation is None:
            return reference.grouped_matmul(x_RD, w, group_sizes_e, bias, jnp.dtype(out_dtype))
        return reference.gate_up(x_RD, w, group_sizes_e, activation, bias)

    return with_gradient_of(plain, kernel)(x_RD, w, group_sizes_e, bias)


def _on_hopper(
    x_RD: Array,
    w: Array,
    group_sizes_e: Array,
    activation: Activation | None,
    bias: Array | None,
    _out_dtype: jnp.dtype,
    **gathered: Array,
) -> Array:
    """`gathered` may have index_R: then x is of tokens, and R is at least a tile."""
    rows, gated = gathered.get("index_R", x_RD).shape[0], activation is not None and activation.gated
    pick = _tiles().choose_tile(rows, w.shape[0], gated=gated)
    room = max(rows, pick.tile.rows)  # a load's box must fit into the array; rows past the last group are nobody's
    if rows < room:
        x_RD = jnp.pad(x_RD, ((0, room - rows), (0, 0)))
    schedule = _schedule(group_sizes_e, room, pick.tile.rows)
    return pick.run(x_RD, w, schedule, activation=activation, bias=bias, tile=pick.tile, **gathered)[:rows]


def _in_triton(
    x_RD: Array,
    w: Array,
    group_sizes_e: Array,
    activation: Activation | None,
    bias: Array | None,
    out_dtype: jnp.dtype,
) -> Array:
    from jax_moe.kernels import triton_grouped_matmul as triton

    tile = triton.choose_tile(x_RD.shape[0], w.shape[0])
    schedule = _schedule(group_sizes_e, x_RD.shape[0], tile.rows)
    # Float32 comes here only where TF32 is asked for.
    precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32 if x_RD.dtype == jnp.float32 else None
    return triton.grouped_matmul(
        x_RD, w, schedule, activation=activation, bias=bias, out_dtype=out_dtype, precision=precision, tile=tile
    )


def _tiles() -> Any:
    from jax_moe.kernels import tiles

    return tiles


def hopper_tile(rows: int, experts: int, gated: bool) -> str:
    """What the table says of the tile, and the measurement it says it from."""
    return str(_tiles().choose_tile(rows, experts, gated=gated))


def triton_tile(rows: int, experts: int, gated: bool) -> str:
    """The tile of the Triton kernel."""
    del gated
    from jax_moe.kernels import triton_grouped_matmul as triton

    return f"tiles of {triton.choose_tile(rows, experts).rows} rows"


def _schedule(group_sizes_e: Array, rows: int, tile: int) -> Array:
    if no_triton() is None:
        from jax_moe.kernels.triton_routing import make_schedule  # one launch in place of three
    else:
        from jax_moe.kernels.schedule import make_schedule
    return make_schedule(group_sizes_e, rows=rows, tile=tile)


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
    logits_tE: Array,
    bias_E: Array | None,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scaling: float,
    num_groups: int = 1,
    groups_kept: int = 1,
) -> tuple[Array, Array]:
    """See `ops.choose_experts`. The gradient is that of the weights, for the choice the kernel made."""
    from jax_moe.kernels import triton_routing

    static = {"top_k": top_k, "scoring": scoring, "renormalize": renormalize, "scaling": scaling}
    static |= {"num_groups": num_groups, "groups_kept": groups_kept}

    @jax.custom_vjp
    def run(logits_tE: Array, bias_E: Array | None) -> tuple[Array, Array]:
        return one_by_one(functools.partial(triton_routing.choose_experts, **static))(logits_tE, bias_E)

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


def plan_rows(topk_ids_tK: Array, first_expert: Array | int, num_local_experts: int) -> tuple[Array, Array, Array]:
    """See `ops.plan_rows`."""
    from jax_moe.kernels import triton_routing

    plan = one_by_one(functools.partial(triton_routing.plan_pairs, experts=num_local_experts))
    return plan(topk_ids_tK, jnp.asarray(first_expert, jnp.int32))


def few_tokens(
    x_tW: Array,
    logits_tE: Array,
    bias_E: Array | None,
    w_EMW: Array,
    bias_EM: Array | None,
    w_EWF: Array,
    bias_EW: Array | None,
    activation: Activation,
    rule: reference.Rule,
) -> Array:
    """See `ops.few_tokens`. The gradient is the reference's, for the choice the kernel made."""
    from jax_moe.kernels import mosaic_gpu_small_groups as small
    from jax_moe.kernels import triton_routing

    tokens, tile = x_tW.shape[0], small.Tile(rows=FEW_TOKENS)

    @one_by_one
    def experts(*operands: Any) -> tuple[Array, Array]:
        x_tW, logits_tE, bias_E, w_EMW, bias_EM, w_EWF, bias_EW = operands
        ids_tK, weights_tK, position_tK, schedule = triton_routing.route(logits_tE, bias_E, **dataclasses.asdict(rule))
        h_RF = small.grouped_matmul(
            x_tW,
            w_EMW,
            schedule,
            activation=activation,
            bias=bias_EM,
            tile=tile,
            rows=tokens * rule.top_k,
        )
        y_RW = small.grouped_matmul(h_RF, w_EWF, schedule, bias=bias_EW, tile=tile)
        return reference.combine_rows(y_RW, position_tK, weights_tK), ids_tK

    @jax.custom_vjp
    def run(*operands: Any) -> Array:
        return experts(*operands)[0]

    def forward(*operands: Any):
        y_tW, ids_tK = experts(*operands)
        return y_tW, (operands, ids_tK)

    def backward(saved: tuple, dy_tW: Array):
        operands, ids_tK = saved

        def plain(x_tW: Array, logits_tE: Array, bias_E: Array | None, *weights: Any) -> Array:
            del bias_E
            weights_tK = reference.weigh_experts(logits_tE, ids_tK, rule.scoring, rule.renormalize, rule.scaling)
            return reference.chosen_experts(x_tW, ids_tK, weights_tK, *weights, activation=activation)

        return jax.vjp(plain, *operands)[1](dy_tW)

    run.defvjp(forward, backward)
    return run(x_tW, logits_tE, bias_E, w_EMW, bias_EM, w_EWF, bias_EW)
