"""The planted bugs, in the PyTorch layer. Imported in its workers only."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager

import torch
import torch.distributed as dist

from parity.mutations.plant import find, replaced
from torch_moe import experts, layer, router
from torch_moe.transport import allgather

ACCUMULATION_STEP = 8


def plant(name: str) -> AbstractContextManager[None]:
    """Hold a bug in place."""
    return replaced(find(BUGS, name)())


def _on_output(change):
    """Replace what the layer returns: `change(y, x, real)` with the rank's number of real rows."""
    original = layer.MoE.forward

    def forward(self, x, *, counts=None, trace=False, **options):
        y, traced = original(self, x, counts=counts, trace=True, **options)
        real = len(x) if counts is None else counts[self.ranks.dp_index]
        y = change(y.clone(), x, real)
        return (y, traced) if trace else y

    return [(layer.MoE, "forward", forward)]


def _rows(y, rows, value):
    y[rows] = value
    return y


def zero_output():
    return _on_output(lambda y, x, real: torch.zeros_like(y))


def zeroed_rows():
    return _on_output(lambda y, x, real: _rows(y, slice(None, None, 20), 0))


def nan_padding():
    return _on_output(lambda y, x, real: _rows(y, slice(real, None), x[real:]))


def stale_padding():
    return _on_output(lambda y, x, real: _rows(y, slice(real, None), 1))


def padding_routed():
    original = layer.MoE.forward
    return [(layer.MoE, "forward", lambda self, x, *, counts=None, **options: original(self, x, **options))]


def dropped_slot():
    original = allgather.combine

    def combine(y_RW, handle):
        return original(y_RW, dataclasses.replace(handle, weights=_rows(handle.weights.clone().T, -1, 0).T))

    return [(allgather, "combine", combine)]


def dropped_expert():
    original = experts.down

    def down(h_RF, down_eWF, group_sizes_e, **options):
        y_RW = original(h_RF, down_eWF, group_sizes_e, **options)
        return _rows(y_RW.clone(), slice(0, int(group_sizes_e[0])), 0) if dist.get_rank() == 0 else y_RW

    return [(experts, "down", down)]


def lost_rank():
    original = allgather.combine

    def combine(y_RW, handle):
        y_nW = original(y_RW, handle)
        return torch.zeros_like(y_nW) if dist.get_rank() == 1 else y_nW

    return [(allgather, "combine", combine)]


def swapped_experts():
    originals = experts.gate_up, experts.down

    def swap(w):
        return torch.cat([w[:2].flip(0), w[2:]]) if dist.get_rank() == 0 else w

    def gate_up(rows_RW, gate_up_eMW, group_sizes_e, **options):
        return originals[0](rows_RW, swap(gate_up_eMW), group_sizes_e, **options)

    def down(h_RF, down_eWF, group_sizes_e, **options):
        return originals[1](h_RF, swap(down_eWF), group_sizes_e, **options)

    return [(experts, "gate_up", gate_up), (experts, "down", down)]


def rows_shifted():
    original = allgather.dispatch

    def dispatch(*args, **options):
        rows, handle = original(*args, **options)
        return {name: values.roll(1, dims=0) for name, values in rows.items()}, handle

    return [(allgather, "dispatch", dispatch)]


def bias_skipped():
    original = experts.gate_up
    return [(experts, "gate_up", lambda *args, bias_eM=None, **options: original(*args, bias_eM=None, **options))]


def _on_latent(change):
    """Run the routed experts with a parameter of the latent changed in place: `change(latent)`, then put back."""
    original = layer.MoE._routed_branch

    def routed_branch(self, *args, **options):
        before = {name: value.clone() for name, value in self.latent.named_parameters()}
        with torch.no_grad():
            change(self.latent)
        try:
            return original(self, *args, **options)
        finally:
            with torch.no_grad():
                for name, value in self.latent.named_parameters():
                    value.copy_(before[name])

    return [(layer.MoE, "_routed_branch", routed_branch)]


def latent_in_short():
    return _on_latent(lambda latent: latent.down[-1].zero_())


def latent_out_short():
    return _on_latent(lambda latent: latent.up[:, -1].zero_())


def double_reduction():
    original = layer.reduce_partial

    def reduce_partial(value, **options):
        return original(original(value, **options), **options)

    return [(layer, "reduce_partial", reduce_partial)]


def reduction_skipped():
    return [(layer, "reduce_partial", lambda value, **options: value)]


def renorm_skipped():
    original = router.route

    def route(logits, bias, *, router, top_k):
        return original(logits, bias, router=dataclasses.replace(router, renormalize=False), top_k=top_k)

    return [(router, "route", route)]


def gate_up_swapped():
    original = experts.activate

    def activate(gate_up_RM, **options):
        return original(gate_up_RM.roll(gate_up_RM.shape[1] // 2, dims=1), **options)

    return [(experts, "activate", activate)]


def sp_trimmed():
    original = layer.gather_sequence
    return [(layer, "gather_sequence", lambda y_cD, **options: original(y_cD, **options)[: y_cD.shape[0]])]


def shared_times_n():
    original = layer.shared_expert
    return [(layer, "shared_expert", lambda *args, **options: original(*args, **options) * dist.get_world_size())]


def bf16_accumulation():
    original = experts.down

    def down(h_RF, down_eWF, group_sizes_e, **options):
        total = torch.zeros(len(h_RF), down_eWF.shape[1], dtype=torch.bfloat16)
        for start in range(0, h_RF.shape[1], ACCUMULATION_STEP):
            columns = slice(start, start + ACCUMULATION_STEP)
            part = original(h_RF[:, columns], down_eWF[..., columns], group_sizes_e, **options)
            total = (total.float() + part.float()).bfloat16()
        return total.float()

    return [(experts, "down", down)]


def floor_for_round():
    original = experts.activate

    def activate(gate_up_RM, **options):
        return (original(gate_up_RM, **options).view(torch.int32) & -0x10000).view(torch.float32)

    return [(experts, "activate", activate)]


def router_in_bf16():
    original = router.compute_logits
    return [(router, "compute_logits", lambda x, gate: original(x, gate).bfloat16().float())]


def bias_weighs():
    original = router.route

    def route(logits, bias, *, router, top_k):
        ids, weights = original(logits, bias, router=router, top_k=top_k)
        return ids, weights + bias[ids.long()]

    return [(router, "route", route)]


def group_by_best():
    original = router._mask_groups

    def mask_groups(selection, config, *, best):
        return original(selection, config, best=1)

    return [(router, "_mask_groups", mask_groups)]


def tie_rule_swapped():
    original = router.route

    def route(logits, bias, **options):
        ids, weights = original(logits.flip(1), None if bias is None else bias.flip(0), **options)
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
