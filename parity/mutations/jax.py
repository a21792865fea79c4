"""The planted bugs, in the JAX layer. Imported in its workers only."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp

import jax_moe
from jax_moe import experts, kernels, layer, router
from jax_moe.kernels import reference
from jax_moe.transport import allgather
from parity.mutations.plant import find, replaced

ACCUMULATION_STEP = 8


def plant(name: str) -> AbstractContextManager[None]:
    """Hold a bug in place. Functions compiled before must be dropped by the caller, and those compiled inside after."""
    return replaced(find(BUGS, name)())


def _rank() -> jax.Array:
    return jax.lax.axis_index(("dp", "tp"))


def _on_output(change):
    """Replace what the layer returns: `change(y, x, counts)`."""
    original = jax_moe.moe

    def moe(params, x, *, counts=None, trace=False, **options):
        y, traced = original(params, x, counts=counts, trace=True, **options)
        y = change(y, x, counts)
        return (y, traced) if trace else y

    return [(jax_moe, "moe", moe)]


def _padding(x, counts):
    """(T, 1) which rows are padding, in the layout of one block a DP rank."""
    rows = x.shape[0] // counts.shape[0]
    return (jnp.arange(rows) >= counts[:, None]).reshape(-1, 1)


def zero_output():
    return _on_output(lambda y, x, counts: jnp.zeros_like(y))


def zeroed_rows():
    return _on_output(lambda y, x, counts: y.at[::20].set(0))


def nan_padding():
    def by_product(x, real_c):
        return x if real_c is None else x * real_c[:, None].astype(x.dtype)

    return [(layer, "_zero_padding", by_product)]


def stale_padding():
    return _on_output(lambda y, x, counts: jnp.where(_padding(x, counts), jnp.ones_like(y), y))


def padding_routed():
    original = jax_moe.moe
    return [(jax_moe, "moe", lambda *args, counts=None, **options: original(*args, **options))]


def dropped_slot():
    original = allgather.combine

    def combine(y_RW, handle):
        return original(y_RW, dataclasses.replace(handle, weights_nK=handle.weights_nK.at[:, -1].set(0)))

    return [(allgather, "combine", combine)]


def dropped_expert():
    original = experts.down

    def down(h_RF, params, group_sizes_e, **options):
        y_RW = original(h_RF, params, group_sizes_e, **options)
        first = (jnp.arange(y_RW.shape[0]) < group_sizes_e[0])[:, None]
        return jnp.where(first & (_rank() == 0), jnp.zeros_like(y_RW), y_RW)

    return [(experts, "down", down)]


def lost_rank():
    original = allgather.combine

    def combine(y_RW, handle):
        y_tW = original(y_RW, handle)
        return jnp.where(_rank() == 1, jnp.zeros_like(y_tW), y_tW)

    return [(allgather, "combine", combine)]


def swapped_experts():
    originals = experts.gate_up, experts.down

    def swap(params):
        def first_two(w):
            return None if w is None else jnp.where(_rank() == 0, w.at[:2].set(w[:2][::-1]), w)

        names = ("gate_up", "down", "gate_up_bias", "down_bias")
        return dataclasses.replace(params, **{name: first_two(getattr(params, name)) for name in names})

    def gate_up(rows_RW, params, group_sizes_e, **options):
        return originals[0](rows_RW, swap(params), group_sizes_e, **options)

    def down(h_RF, params, group_sizes_e, **options):
        return originals[1](h_RF, swap(params), group_sizes_e, **options)

    return [(experts, "gate_up", gate_up), (experts, "down", down)]


def rows_shifted():
    original = allgather.dispatch

    def dispatch(*args, **options):
        rows_RW, handle = original(*args, **options)
        return jnp.roll(rows_RW, 1, axis=0), handle

    return [(allgather, "dispatch", dispatch)]


def bias_skipped():
    original = experts.gate_up

    def gate_up(rows_RW, params, group_sizes_e, **options):
        return original(rows_RW, dataclasses.replace(params, gate_up_bias=None), group_sizes_e, **options)

    return [(experts, "gate_up", gate_up)]


def _on_latent(change):
    """Run the routed experts with other projections of the latent: `change(latent)`."""
    original = layer._routed_experts

    def routed_experts(params, *args, **options):
        return original(dataclasses.replace(params, latent=change(params.latent)), *args, **options)

    return [(layer, "_routed_experts", routed_experts)]


def latent_in_short():
    return _on_latent(lambda latent: dataclasses.replace(latent, down=latent.down.at[-1].set(0)))


def latent_out_short():
    return _on_latent(lambda latent: dataclasses.replace(latent, up=latent.up.at[:, -1].set(0)))


def double_reduction():
    original = layer.reduce_partial

    def reduce_partial(value, axes):
        once = original(value, axes)
        return original(once, axes) if jnp.issubdtype(value.dtype, jnp.floating) else once

    return [(layer, "reduce_partial", reduce_partial)]


def reduction_skipped():
    original = layer.reduce_partial

    def reduce_partial(value, axes):
        return value if jnp.issubdtype(value.dtype, jnp.floating) else original(value, axes)

    return [(layer, "reduce_partial", reduce_partial)]


def renorm_skipped():
    original = router.route

    def route(logits, bias, *, router, **options):
        return original(logits, bias, router=dataclasses.replace(router, renormalize=False), **options)

    return [(router, "route", route)]


def gate_up_swapped():
    original = experts.activate

    def activate(gate_up_RM, activation):
        return original(jnp.roll(gate_up_RM, gate_up_RM.shape[1] // 2, axis=1), activation)

    return [(experts, "activate", activate)]


def sp_trimmed():
    original = layer.gather_sequence
    return [(layer, "gather_sequence", lambda y_cD, rows: original(y_cD, rows)[: y_cD.shape[0]])]


def shared_times_n():
    original = layer.shared_expert

    def shared_expert(*args, **options):
        return original(*args, **options) * jax.lax.axis_size(("dp", "tp"))

    return [(layer, "shared_expert", shared_expert)]


def bf16_accumulation():
    original = experts.down

    def down(h_RF, params, group_sizes_e, **options):
        steps = h_RF.shape[1] // ACCUMULATION_STEP
        h_sRf = jnp.moveaxis(h_RF.reshape(h_RF.shape[0], steps, -1), 1, 0)
        w_seWf = jnp.moveaxis(params.down.reshape(*params.down.shape[:2], steps, -1), 2, 0)

        def add(total, parts):
            part = original(parts[0], dataclasses.replace(params, down=parts[1]), group_sizes_e, **options)
            total = total.astype(jnp.float32) + part.astype(jnp.float32)
            return total.astype(jnp.bfloat16), None

        start = jnp.zeros((h_RF.shape[0], params.down.shape[1]), jnp.bfloat16)
        return jax.lax.scan(add, start, (h_sRf, w_seWf))[0].astype(h_RF.dtype)

    return [(experts, "down", down)]


def floor_for_round():
    original = experts.activate

    def activate(gate_up_RM, activation):
        bits = jax.lax.bitcast_convert_type(original(gate_up_RM, activation), jnp.uint32)
        return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)

    return [(experts, "activate", activate)]


def router_in_bf16():
    original = router.compute_logits
    return [(router, "compute_logits", lambda x, gate: original(x, gate).astype(jnp.bfloat16).astype(jnp.float32))]


def bias_weighs():
    original = router.route

    def route(logits, bias, **options):
        ids, weights = original(logits, bias, **options)
        return ids, weights + bias[ids]

    return [(router, "route", route)]


def group_by_best():
    original = reference.keep_groups

    def keep_groups(selection, num_groups, groups_kept, *, top_two):
        return original(selection, num_groups, groups_kept, top_two=False)

    choose = kernels.choose_experts

    def choose_experts(*operands, implementation=None, **options):
        return choose(*operands, **options, implementation="reference")  # a kernel would not go by it

    return [(reference, "keep_groups", keep_groups), (kernels, "choose_experts", choose_experts)]


def tie_rule_swapped():
    original = router.route

    def route(logits, bias, **options):
        ids, weights = original(logits[:, ::-1], None if bias is None else bias[::-1], **options)
        return logits.shape[1] - 1 - ids, weights

    return [(router, "route", route)]


BUGS = {
    bug.__name__: bug
    for bug in (
        zero_output,
        zeroed_rows,
        dropped_slot,
        dropped_expert,
        lost_rank,
        swapped_experts,
        rows_shifted,
        double_reduction,
        reduction_skipped,
        renorm_skipped,
        gate_up_swapped,
        bias_skipped,
        latent_in_short,
        latent_out_short,
        sp_trimmed,
        shared_times_n,
        nan_padding,
        stale_padding,
        padding_routed,
        bf16_accumulation,
        floor_for_round,
        router_in_bf16,
        bias_weighs,
        group_by_best,
        tie_rule_swapped,
    )
}
