"""The MoE blocks of Hugging Face `transformers` as backends: implementations that nobody here wrote.

One class a block, each with weights built from the case; nothing is ever downloaded. A block knows no mesh: one process
computes all tokens and hands each rank the rows of its own, so that a case on any mesh can be held against it. Each
block shows its router's logits, weights and ids; how rows lie on ranks it does not know.

    T tokens   D hidden   E experts   F intermediate   S width of the shared expert
"""

from __future__ import annotations

import importlib
import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from parity.arrays import ArrayRef
from parity.backends.base import Backend, Capabilities, Member, cores
from parity.backends.layout import hand_out
from parity.backends.torch import LazyTensors
from parity.case import Case
from parity.results import RankResult

if TYPE_CHECKING:
    import torch

EXPERTS = "eager"
"""A loop over experts: of the implementations that a block can be given, its own and the plainest."""
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""Ours -> the name in transformers."""
LEAST: Mapping[str, int | None] = {
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
"""What a configuration wants to know of the model around the block."""


class HuggingFace(Backend):
    """One block of `transformers`."""

    packages = ("torch", "transformers")
    install = "pip install 'moe-parity[transformers]'"
    module: ClassVar[str]
    """Where it lies, under transformers.models."""
    config_class: ClassVar[str]
    block_class: ClassVar[str]
    router: ClassVar[str] = "gate"
    """The block's attribute that returns (logits (T, E), weights (T, K), ids (T, K))."""

    def unsupported(self, case: Case) -> str | None:
        if case.flags.ties:
            return "it has no rule for equal scores: torch.topk picks any of them"
        return super().unsupported(case)

    def processes(self, case: Case) -> int:
        return 1

    def environment(self, case: Case) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": str(cores()),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def setup(self, member: Member) -> dict[str, str]:
        import torch

        transformers = importlib.import_module("transformers")
        self.modeling = importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")
        self.configuration = getattr(transformers, self.config_class)
        return {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        }

    def run(
        self, case: Case, arrays: Mapping[str, ArrayRef], lessons: Mapping[str, ArrayRef] | None = None
    ) -> dict[int, RankResult]:
        import torch

        tensors = LazyTensors(arrays)
        block = self.block(case, tensors)
        routed: list[tuple[torch.Tensor, ...]] = []
        getattr(block, self.router).register_forward_hook(lambda module, inputs, outputs: routed.append(outputs))
        x = tensors["x"][None]
        with torch.inference_mode():
            y, *again = (_output(block(x)) for _ in range(self.options.repeat))
        logits, weights, ids = routed[0]
        return hand_out(
            case,
            y.float().numpy(),
            str(y.dtype).removeprefix("torch."),
            topk_ids=ids.numpy(),
            topk_weights=weights.float().numpy(),
            router_logits=logits.float().numpy(),
            repeat_equal=all(torch.equal(y, other) for other in again) if again else None,
        )

    def block(self, case: Case, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """The block with the case's weights; every one of its parameters and buffers is one of `state`."""
        import torch

        config = self.configuration(**LEAST, **self.config(case))
        config._experts_implementation = EXPERTS
        with torch.device("meta"):
            block = getattr(self.modeling, self.block_class)(config)
        block.load_state_dict(self.state(case, tensors), strict=True, assign=True)
        return block.eval()

    @abstractmethod
    def config(self, case: Case) -> dict[str, Any]:
        """Keyword arguments of the configuration."""

    @abstractmethod
    def state(self, case: Case, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The block's parameters and buffers by its own names."""


def _output(returned: Any) -> torch.Tensor:
    """(T, D): some blocks return their router's scores beside it."""
    return (returned[0] if isinstance(returned, tuple) else returned)[0]


def _gated(case: Case) -> dict[str, Any]:
    return {
        "hidden_size": case.hidden,
        "hidden_act": ACTIVATIONS[case.flags.activation],
        "num_experts_per_tok": case.top_k,
    }


def _gated_state(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        "gate.weight": tensors["router.gate"],
        "experts.gate_up_proj": tensors["experts.gate_up"],
        "experts.down_proj": tensors["experts.down"],
    }


class Mixtral(HuggingFace):
    """`MixtralSparseMoeBlock`: softmax over all experts, top-k, renormalized."""

    name = "hf-mixtral"
    module, config_class, block_class = "mixtral", "MixtralConfig", "MixtralSparseMoeBlock"
    capabilities = Capabilities(
        formats=("f32",),
        options=frozenset({"gate", "renorm", "gelu", "gelu_tanh"}),
        needs=frozenset({"gate", "renorm"}),
    )

    def config(self, case: Case) -> dict[str, Any]:
        return _gated(case) | {"intermediate_size": case.intermediate, "num_local_experts": case.experts}

    def state(self, case: Case, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return _gated_state(tensors)


class Qwen3(HuggingFace):
    """`Qwen3MoeSparseMoeBlock`: softmax over all experts, top-k, renormalized or not."""

    name = "hf-qwen3"
    module, config_class, block_class = "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock"
    capabilities = Capabilities(
        formats=("f32",), options=frozenset({"gate", "renorm", "gelu", "gelu_tanh"}), needs=frozenset({"gate"})
    )

    def config(self, case: Case) -> dict[str, Any]:
        return _gated(case) | {
            "moe_intermediate_size": case.intermediate,
            "num_experts": case.experts,
            "norm_topk_prob": case.flags.renorm,
        }

    def state(self, case: Case, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return _gated_state(tensors)


class DeepseekV3(HuggingFace):
    """`DeepseekV3MoE`: sigmoid scores, groups by their best two biased scores, scaling, a shared expert.

    Without a bias its buffer is zeros; without a shared expert that expert's weights are.
    """

    name = "hf-deepseek-v3"
    module, config_class, block_class = "deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE"
    capabilities = Capabilities(
        formats=("f32",),
        options=frozenset({"gate", "sigmoid", "renorm", "groups", "bias", "scale", "shared", "gelu", "gelu_tanh"}),
        needs=frozenset({"gate", "sigmoid"}),
    )

    def unsupported(self, case: Case) -> str | None:
        groups = case.flags.groups[0]
        if case.experts // groups < 2:
            return f"it scores a group by its best two experts; the case has {case.experts // groups} in a group"
        if groups > 1 and not case.flags.bias:
            return "it scores a group by its best two experts; without 'bias' a case takes the best one"
        return super().unsupported(case)

    def config(self, case: Case) -> dict[str, Any]:
        groups, kept = case.flags.groups
        return _gated(case) | {
            "moe_intermediate_size": case.intermediate,
            "n_routed_experts": case.experts,
            "n_shared_experts": max(case.flags.shared, 1),
            "n_group": groups,
            "topk_group": kept,
            "norm_topk_prob": case.flags.renorm,
            "routed_scaling_factor": case.flags.scale,
        }

    def state(self, case: Case, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        if case.flags.shared:
            (gate, up), down = tensors["shared.gate_up"].chunk(2), tensors["shared.down"]
        else:
            none = tensors["experts.gate_up"].new_zeros(case.intermediate, case.hidden)
            gate, up, down = none, none, none.T
        return _gated_state(tensors) | {
            "gate.e_score_correction_bias": tensors["router.bias"] if case.flags.bias else torch.zeros(case.experts),
            "shared_experts.gate_proj.weight": gate,
            "shared_experts.up_proj.weight": up,
            "shared_experts.down_proj.weight": down,
        }


class GptOss(HuggingFace):
    """`GptOssMLP`: softmax over the top-k logits, which is softmax renormalized; clamped swiglu, interleaved, biases.

    Its router has a bias, which no case has: zeros. So are the experts' where a case has none.
    """

    name = "hf-gpt-oss"
    module, config_class, block_class = "gpt_oss", "GptOssConfig", "GptOssMLP"
    router = "router"
    capabilities = Capabilities(
        formats=("f32",),
        options=frozenset({"gate", "renorm", "swigluoai", "alpha", "limit", "interleaved", "expertbias"}),
        needs=frozenset({"gate", "renorm", "swigluoai", "interleaved"}),
    )

    def config(self, case: Case) -> dict[str, Any]:
        return {
            "hidden_size": case.hidden,
            "intermediate_size": case.intermediate,
            "num_local_experts": case.experts,
            "num_experts_per_tok": case.top_k,
            "swiglu_alpha": case.flags.alpha,
            "swiglu_limit": case.flags.limit,
        }

    def state(self, case: Case, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        gate, gate_up, down = tensors["router.gate"], tensors["experts.gate_up"], tensors["experts.down"]
        biased = case.flags.expertbias
        return {
            "router.weight": gate,
            "router.bias": gate.new_zeros(case.experts),
            # (E, D, 2F) and (E, F, D): transposed to what a checkpoint here holds
            "experts.gate_up_proj": gate_up.transpose(1, 2),
            "experts.gate_up_proj_bias": tensors["experts.gate_up_bias"]
            if biased
            else gate_up.new_zeros(gate_up.shape[:2]),
            "experts.down_proj": down.transpose(1, 2),
            "experts.down_proj_bias": tensors["experts.down_bias"] if biased else down.new_zeros(down.shape[:2]),
        }
