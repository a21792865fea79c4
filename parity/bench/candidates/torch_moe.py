"""The PyTorch layer, and its operations, as they are: nothing here compiles them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import torch_moe as tm
from parity.bench.candidates.base import Candidate
from parity.bench.shapes import Shape
from torch_moe import experts, matmul, plan, router, rows
from torch_moe.activation import Activation

ROUTER = tm.RouterConfig(source="gate", renormalize=True)
SILU = Activation(name="silu", gated=True, layout="concatenated", alpha=1.702, limit=7.0)


class TorchMoe(Candidate):
    def operation(self, what: str, shape: Shape) -> Callable[..., Any]:
        return getattr(self, f"_{what}")(shape)

    def _layer(self, shape: Shape) -> Callable[..., Any]:
        config = tm.MoEConfig(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            router=ROUTER,
        )
        # the weights exist already: the module allocates none of its own
        module = tm.MoE(config, device="meta")

        def layer(x: torch.Tensor, gate: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            if module.experts.gate_up is not gate_up:
                for part, name, value in (
                    (module.experts, "gate_up", gate_up),
                    (module.experts, "down", down),
                    (module.router, "gate", gate),
                ):
                    delattr(part, name)
                    setattr(part, name, value)
            return module(x)

        return layer

    def _gate_up(self, shape: Shape) -> Callable[..., Any]:
        def gate_up(rows_RW: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            return experts.gate_up(rows_RW, weights, sizes, activation=SILU, num_rows=shape.rows)

        return gate_up

    def _grouped_matmul(self, shape: Shape) -> Callable[..., Any]:
        def product(rows_RW: torch.Tensor, weights: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            return matmul.grouped_linear(rows_RW, weights, sizes, num_rows=shape.rows)

        return product

    _down = _grouped_matmul

    def _gather(self, shape: Shape) -> Callable[..., Any]:
        return lambda x, row_token, position, sizes: rows.gather_rows(x, row_token, position)

    def _combine(self, shape: Shape) -> Callable[..., Any]:
        def combine(
            y: torch.Tensor, weights: torch.Tensor, position: torch.Tensor, row_token: torch.Tensor, slot: torch.Tensor
        ) -> torch.Tensor:
            return rows.combine_rows(y, weights, row_token, slot, position).bfloat16()

        return combine

    def _routing(self, shape: Shape) -> Callable[..., Any]:
        def routing(x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, ...]:
            ids, weights = router.route(router.compute_logits(x, gate), None, router=ROUTER, top_k=shape.top_k)
            sort = plan.make_plan(ids, num_experts=shape.experts, first_expert=0, local_experts=shape.experts)
            return ids, weights, sort.position, sort.group_sizes, sort.row_token

        return routing


CANDIDATE = TorchMoe
