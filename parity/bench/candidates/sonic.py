"""SonicMoE's layer. Its gate and up rows come by turns, and its weights are a softmax over the chosen experts alone,
which is the renormalized softmax over all."""

# Neither Triton nor the peers are installed where types are checked.
# pyright: reportMissingImports=false, reportIndexIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sonicmoe
import torch
from sonicmoe.enums import ActivationType

from parity.bench.candidates.base import Candidate
from parity.bench.shapes import Shape


class Sonic(Candidate):
    layout = "interleaved"

    def operation(self, what: str, shape: Shape) -> Callable[..., Any]:
        with torch.device("meta"):
            module = sonicmoe.MoE(
                num_experts=shape.experts,
                num_experts_per_tok=shape.top_k,
                hidden_size=shape.hidden,
                intermediate_size=shape.intermediate,
                activation_function=ActivationType.SWIGLU,
                add_bias=False,
                std=0.02,
            )
        module.requires_grad_(False).eval()

        def layer(x: torch.Tensor, gate: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
            for part, value in ((module.router, gate), (module.c_fc, gate_up), (module.c_proj, down)):
                if part.weight is not value:
                    del part.weight
                    part.weight = value
            # the stream that graphs are captured on is another than the one the module was made on
            module.stream_id = torch.cuda.current_stream().cuda_stream
            return module(x, kernel_backend_moe=sonicmoe.KernelBackendMoE.sonicmoe)[0]

        return layer


CANDIDATE = Sonic
