"""Every parallel mode of four ranks, and one forward or backward of the layer on them."""

import dataclasses
import functools

import numpy as np
import torch
import torch.distributed as dist
import torch_dense as dense

from torch_moe import ACROSS_NODES, MoE, ParallelConfig, make_mesh

MODES = {
    "dp4": ParallelConfig(dp=4),
    "dp2.tp2": ParallelConfig(dp=2, tp=2),
    "tp4": ParallelConfig(tp=4),
    "dp4.ep": ParallelConfig(dp=4, expert_parallel=True),
    "dp2.tp2.ep": ParallelConfig(dp=2, tp=2, expert_parallel=True),
    "dp2.tp2.ep.nosp": ParallelConfig(dp=2, tp=2, expert_parallel=True, sequence_parallel=False),
    "dp2.tp2.ep.native": ParallelConfig(dp=2, tp=2, expert_parallel=True, token_layout="dp_tp"),
    "tp4.ep.nosp": ParallelConfig(tp=4, expert_parallel=True),
    "tp4.ep.sp": ParallelConfig(tp=4, expert_parallel=True, sequence_parallel=True),
    "tp4.ep.native": ParallelConfig(tp=4, expert_parallel=True, sequence_parallel=True, token_layout="dp_tp"),
}

TRANSPORTS = {
    f"{mode}{across}/{transport}": dataclasses.replace(MODES[mode], transport=transport, nodes=nodes)
    for mode in ("dp4.ep", "dp2.tp2.ep", "dp2.tp2.ep.native", "tp4.ep.sp")
    for transport in ("ragged", "padded", "one_sided")
    for across, nodes in (("", 1), (".nodes2", 2))
    if MODES[mode].dp % nodes == 0 and (nodes == 1 or transport in ACROSS_NODES)
}
"""Every mode that transports of copies serve, on one node and on two."""


def holders(parallel: ParallelConfig) -> int:
    """How many sets of tokens there are; tp ranks share one, except in the native layout."""
    return parallel.world if parallel.token_layout == "dp_tp" else parallel.dp


def holder(rank: int, parallel: ParallelConfig) -> int:
    """Whose tokens a rank has."""
    return rank if parallel.token_layout == "dp_tp" else rank // parallel.tp


def device_type() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def mesh_of(parallel: ParallelConfig):
    return _mesh_of_shape(parallel.dp, parallel.tp, parallel.nodes)


@functools.cache
def _mesh_of_shape(dp: int, tp: int, nodes: int):
    """One mesh for all tests of a shape: its groups would otherwise pile up in a rank that serves many tests."""
    transport = "ragged" if nodes > 1 else None
    parallel = ParallelConfig(dp=dp, tp=tp, nodes=nodes, expert_parallel=nodes > 1, transport=transport)
    return make_mesh(parallel, device_type())


def build(config, parallel):
    moe = MoE(config, parallel, mesh_of(parallel))
    moe.load_params(dense.random_params(config))
    return moe


def inputs_of(rank, config, parallel, arrays, given):
    own = holder(rank, parallel)
    x = torch.from_numpy(arrays[own]).to(device_type(), getattr(torch, config.dtype))
    return x, {name: torch.from_numpy(values[own]).to(device_type()) for name, values in given.items()}


def forward_on_rank(rank, config, parallel, arrays, counts, given):
    """One rank's output and trace. Run twice and with a trace, all of which must agree bit by bit."""
    moe = build(config, parallel)
    x, given = inputs_of(rank, config, parallel, arrays, given)
    with torch.no_grad():
        y = moe(x, counts=counts, **given)
        again = moe(x, counts=counts, **given)
        traced, trace = moe(x, counts=counts, trace=True, **given)
    assert torch.equal(y, again), "a repeated run differs"
    assert torch.equal(y, traced), "the trace changes the result"
    return y.float().cpu().numpy(), arrays_of(trace)


def arrays_of(traced):
    """The tensors of a trace by name, or of its stages, as NumPy arrays; None where there is none."""
    fields = ((field.name, getattr(traced, field.name)) for field in dataclasses.fields(traced))
    return {
        name: None if value is None else arrays_of(value) if dataclasses.is_dataclass(value) else to_numpy(value)
        for name, value in fields
    }


def to_numpy(tensor):
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def backward_on_rank(rank, config, parallel, arrays, counts, given, seeds):
    """One rank's gradients of x and of its parameters for the loss sum(y * seed)."""
    moe = build(config, parallel)
    x, given = inputs_of(rank, config, parallel, arrays, given)
    x.requires_grad_()
    for value in given.values():
        if value.is_floating_point():
            value.requires_grad_()
    y = moe(x, counts=counts, **given)
    (y * torch.from_numpy(seeds[holder(rank, parallel)]).to(device_type())).sum().backward()
    inputs = {"x": x, **{name: value for name, value in given.items() if value.requires_grad}}
    found = {**inputs, **dict(moe.named_parameters())}
    return {name: value.grad.float().cpu().numpy() for name, value in found.items()}


def random_tokens(config, sizes, seed=1):
    """x of each holder, float32 values that the configuration's dtype holds exactly."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((size, config.hidden_size)).astype(np.float32) for size in sizes]
    if config.dtype == "bfloat16":
        arrays = [torch.from_numpy(x).bfloat16().float().numpy() for x in arrays]
    return arrays
