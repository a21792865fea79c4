"""The layer's parameters: their names and shapes in a checkpoint, each rank's part, and the modules that hold it.

Shapes: `E` experts, `e` on this rank, `D` hidden size, `W` the routed experts' width (D or the latent's L), `F`
intermediate size, `S` the shared expert's; gate_up has 2F rows when gated and F otherwise.

    experts.gate_up       (E, 2F, W)     experts.gate_up_bias  (E, 2F)
    experts.down          (E, W, F)      experts.down_bias     (E, W)
    router.gate           (E, D)         router.bias           (E,) float32, score correction
    shared.gate_up        (2S, D)        shared.down           (D, S)          shared.gate  (1, D)
    latent.down           (L, D)         latent.up             (D, L)
"""

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import nn

from torch_moe._typing import Tensor
from torch_moe.config import MoEConfig, ParallelConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParamSpec:
    """One parameter as a checkpoint holds it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def specs(config: MoEConfig) -> dict[str, ParamSpec]:
    """Every parameter of a layer with this configuration, by name."""
    experts, hidden, width = config.num_experts, config.hidden_size, config.expert_width
    inner, shared, latent = config.intermediate_size, config.shared_width, config.latent_size
    halves = 2 if config.gated else 1
    shapes: dict[str, tuple[int, ...]] = {
        "experts.gate_up": (experts, halves * inner, width),
        "experts.down": (experts, width, inner),
    }
    if config.expert_bias:
        shapes |= {"experts.gate_up_bias": (experts, halves * inner), "experts.down_bias": (experts, width)}
    if config.router.source == "gate":
        shapes["router.gate"] = (experts, hidden)
    if shared:
        shapes |= {"shared.gate_up": (halves * shared, hidden), "shared.down": (hidden, shared)}
    if config.shared_gate:
        shapes["shared.gate"] = (1, hidden)
    if latent is not None:
        shapes |= {"latent.down": (latent, hidden), "latent.up": (hidden, latent)}
    found = {name: ParamSpec(shape=shape, dtype=DTYPES[config.dtype]) for name, shape in shapes.items()}
    if config.router.score_correction_bias and config.router.source != "ids":
        found["router.bias"] = ParamSpec(shape=(experts,), dtype=torch.float32)
    return found


def init(config: MoEConfig, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Random parameters in checkpoint layout, on the CPU.

    Weights are normal with standard deviation 1/sqrt(columns), so that a product keeps the scale of its input; biases
    are zeros.

    Args:
        config: the layer.
        generator: source of randomness; None is torch's default.
    """

    def make(name: str, spec: ParamSpec) -> Tensor:
        if name.endswith("bias"):
            return torch.zeros(spec.shape, dtype=spec.dtype)
        normal = torch.empty(spec.shape, dtype=torch.float32).normal_(generator=generator)
        return normal.mul_(1 / math.sqrt(spec.shape[-1])).to(spec.dtype)

    return {name: make(name, spec) for name, spec in specs(config).items()}


def local_part(
    name: str, full: Tensor, config: MoEConfig, parallel: ParallelConfig, *, dp_index: int, tp_index: int
) -> Tensor:
    """One rank's part of a parameter in checkpoint layout. Nothing but that part is read."""
    group, _, leaf = name.partition(".")
    if group == "experts" and parallel.expert_parallel:
        local = config.num_experts // parallel.ep
        return full.narrow(0, (dp_index * parallel.tp + tp_index) * local, local)
    split = {"experts": parallel.splits_intermediate, "shared": parallel.splits_shared}.get(group, False)
    if not split:
        return full
    if leaf == "down":
        part = full.shape[-1] // parallel.tp
        return full.narrow(-1, tp_index * part, part)
    if leaf in ("gate_up", "gate_up_bias"):
        return split_gate_up(full, config, parallel.tp, tp_index, dim=1 if group == "experts" else 0)
    return full  # The down bias and the shared expert's gate act on whole outputs.


def split_gate_up(full: Tensor, config: MoEConfig, tp: int, index: int, *, dim: int) -> Tensor:
    """Rows of one tp rank: its own gate rows and its own up rows, in the layout of the whole."""
    if not config.gated or config.gate_up_layout == "interleaved":
        part = full.shape[dim] // tp
        return full.narrow(dim, index * part, part)
    halves = full.unflatten(dim, (2, full.shape[dim] // 2))
    part = halves.shape[dim + 1] // tp
    return halves.narrow(dim + 1, index * part, part).flatten(dim, dim + 1)


def check_full(full: Mapping[str, Tensor], config: MoEConfig) -> None:
    """Raises `ValueError` unless the mapping holds exactly the layer's parameters, in their shapes and dtypes."""
    expected = specs(config)
    missing, extra = sorted(expected.keys() - full.keys()), sorted(full.keys() - expected.keys())
    if missing or extra:
        raise ValueError(f"parameters missing: {missing}, not expected: {extra}; allowed are {sorted(expected)}")
    for name, spec in expected.items():
        tensor = full[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} {tensor.dtype}: allowed is {spec.shape} {spec.dtype}, the whole "
                "parameter in checkpoint layout"
            )


class ExpertParams(nn.Module):
    """The routed experts on this rank."""

    gate_up: nn.Parameter
    down: nn.Parameter
    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        for leaf in ("gate_up", "down", "gate_up_bias", "down_bias"):
            _register(self, leaf, parts.get(f"experts.{leaf}"))


class RouterParams(nn.Module):
    """The gate, and the score correction, which no gradient reaches and which is therefore a buffer."""

    gate: nn.Parameter | None
    bias: Tensor | None

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        _register(self, "gate", parts.get("router.gate"))
        self.register_buffer("bias", parts.get("router.bias"))


class SharedParams(nn.Module):
    """The shared expert."""

    gate_up: nn.Parameter
    down: nn.Parameter
    gate: nn.Parameter | None

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        for leaf in ("gate_up", "down", "gate"):
            _register(self, leaf, parts.get(f"shared.{leaf}"))


class LatentParams(nn.Module):
    """Projections into and out of the routed experts' width."""

    down: nn.Parameter
    up: nn.Parameter

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        super().__init__()
        for leaf in ("down", "up"):
            _register(self, leaf, parts.get(f"latent.{leaf}"))


def _register(module: nn.Module, leaf: str, part: Tensor | None) -> None:
    module.register_parameter(leaf, None if part is None else nn.Parameter(part))


def allocate(
    config: MoEConfig, parallel: ParallelConfig, *, dp_index: int, tp_index: int, device: torch.device | str | None
) -> dict[str, Tensor]:
    """This rank's parameters by name, all NaN, so that a parameter that was never loaded cannot go unnoticed."""
    parts = {}
    for name, spec in specs(config).items():
        whole = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        part = local_part(name, whole, config, parallel, dp_index=dp_index, tp_index=tp_index)
        parts[name] = torch.full(part.shape, math.nan, dtype=spec.dtype, device=device)
    return parts
