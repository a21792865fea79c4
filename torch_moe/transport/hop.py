"""One exchange of tokens along one level of ranks, and the way back: what `ragged` and `padded` are made of.

A token goes once to each rank that owns any of its experts, with its ids and weights. Copies lie by destination rank
and then in the sender's order; they arrive by source rank and then in the sender's order. On the way back each token's
partial sums are added in destination order, in float32. Each direction's gradient is the other direction.

Shapes: `n` tokens held before the hop, `M` copies of them to send, `m` copies received, `K` slots, `N` ranks of the
level, `C` slots of a pair of ranks.

Worked example, n=3, N=2, ids with owners [[0, 1], [1, 1], [0, 0]]:

    exact:       copy_token  0 2 | 0 1               position  token 0: [0, 2]   token 1: [-1, 3]   token 2: [1, -1]
    C=3 slots:   copy_token  0 2 -1 | 0 1 -1         position  token 0: [0, 3]   token 1: [-1, 4]   token 2: [1, -1]
    C=1 slots:   copy_token  0 | 0                   position  token 0: [0, 1]   the others: none; dropped 2
"""

import dataclasses
from collections.abc import Mapping

import torch

from torch_moe import collectives
from torch_moe import rows as row_ops
from torch_moe._typing import Float32, Int, Int32, Tensor
from torch_moe.mesh import Axis

Payload = Mapping[str, Tensor]
"""What travels for each token, by name: (n, ...) each, the values and with a format their scales."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hop:
    """What the way back needs to know of the way there.

    Attributes:
        axis: the ranks.
        copy_token: (M,) int32, the token behind each copy sent, -1 for an empty slot.
        position: (n, N) int32, the copy of each token for each rank, -1 for none.
        send: copies for each rank, None where all have C slots.
        receive: copies from each rank, likewise.
        dropped: () int32, copies this rank did not send for want of slots, or did not accept.
    """

    axis: Axis
    copy_token: Int32[Tensor, " M"]
    position: Int32[Tensor, "n N"]
    send: tuple[int, ...] | None
    receive: tuple[int, ...] | None
    dropped: Int32[Tensor, ""]


def owner_of(ids_nK: Tensor, *, num_experts: int, block: int, ranks: int) -> Tensor:
    """(n, K) the rank of the level that owns each expert, -1 for what is no expert."""
    valid_nK = (ids_nK >= 0) & (ids_nK < num_experts)
    return torch.where(valid_nK, ids_nK // block % ranks, -1)


def _wanted(owner_nK: Tensor, ranks: int) -> Tensor:
    """(n, N) bool: whether a rank owns any of a token's experts."""
    rank_N = torch.arange(ranks, device=owner_nK.device)
    wanted_nN = torch.zeros(owner_nK.shape[0], ranks, dtype=torch.bool, device=owner_nK.device)
    for slot in range(owner_nK.shape[1]):
        wanted_nN |= owner_nK[:, slot, None] == rank_N
    return wanted_nN


def _in_slots(wanted_nN: Tensor, axis: Axis, slots: int) -> Hop:
    """Fixed slots for each pair of ranks. No size leaves the device."""
    device = wanted_nN.device
    count_nN = wanted_nN.cumsum(0)
    kept_nN = wanted_nN & (count_nN <= slots)
    first_N = slots * torch.arange(axis.ranks, device=device)
    # Slot c of a rank holds the token at which the count reaches c + 1; past the last there is none.
    slot_NC = torch.arange(1, slots + 1, device=device).expand(axis.ranks, slots).contiguous()
    token_NC = torch.searchsorted(count_nN.T.contiguous(), slot_NC)
    return Hop(
        axis=axis,
        copy_token=torch.where(token_NC < len(wanted_nN), token_NC, -1).flatten().int(),
        position=torch.where(kept_nN, first_N + count_nN - 1, -1).int(),
        send=None,
        receive=None,
        dropped=(wanted_nN & ~kept_nN).sum(dtype=torch.int32),
    )


def _exact(wanted_nN: Tensor, axis: Axis, max_rows: int | None) -> Hop:
    """Just the copies there are. Ranks tell each other how many, and with `max_rows` how many of them they accept."""
    asked_N = wanted_nN.sum(0)
    offered_N = collectives.exchange_integers(asked_N, axis.group)
    accepted_N, kept_nN = offered_N, wanted_nN
    if max_rows is not None:
        # By source rank: each gets what the ones before it leave.
        accepted_N = (max_rows - (offered_N.cumsum(0) - offered_N)).clamp(min=0).minimum(offered_N)
        asked_N = collectives.exchange_integers(accepted_N, axis.group)
        kept_nN = wanted_nN & (wanted_nN.cumsum(0) <= asked_N)
    sent, received = torch.stack([asked_N, accepted_N]).tolist()
    first_N = asked_N.cumsum(0) - asked_N
    return Hop(
        axis=axis,
        copy_token=kept_nN.T.nonzero()[:, 1].int(),
        position=torch.where(kept_nN, first_N + kept_nN.cumsum(0) - 1, -1).int(),
        send=tuple(sent),
        receive=tuple(received),
        dropped=(offered_N - accepted_N).sum(dtype=torch.int32),
    )


def carry(values_n: Tensor, hop: Hop) -> Tensor:
    """Moves one value per token, (n, ...) of any dtype, as the hop moves tokens: (m, ...), zeros in empty slots."""
    if values_n.dtype.itemsize == 1 and values_n.is_floating_point():
        # Not every backend gathers or sends eight-bit floats; all take bytes.
        return carry(values_n.view(torch.uint8), hop).view(values_n.dtype)
    copies_M = row_ops.gather_rows(values_n, hop.copy_token, hop.position)
    return collectives.all_to_all_rows(copies_M, hop.send, hop.receive, hop.axis.group)


def send(
    payload: Payload,
    topk_ids_nK: Int[Tensor, "n K"],
    topk_weights_nK: Float32[Tensor, "n K"],
    *,
    axis: Axis,
    num_experts: int,
    block: int,
    slots: int | None = None,
    max_rows: int | None = None,
) -> tuple[dict[str, Tensor], Tensor, Tensor, Hop]:
    """Sends each token once to each rank of the level that owns any of its experts.

    Args:
        payload: (n, ...) tensors by name, which arrive as they are; may be empty.
        topk_ids_nK: (n, K); ids outside [0, num_experts) go nowhere.
        topk_weights_nK: (n, K) float32.
        axis: the level.
        num_experts: E.
        block: experts per rank of this level, on all its ranks below; rank i owns id // block % N == i.
        slots: C, fixed slots of each pair of ranks: later copies are dropped, counted by the sender. None: exact sizes.
        max_rows: with exact sizes, copies this rank accepts: later ones are dropped before they are sent, counted by
            the receiver. None: all.

    Returns:
        the received payload, (m, ...) each; ids (m, K), `num_experts` for experts not owned here and in empty slots;
        weights (m, K); and the hop, for `back` and `carry`.
    """
    ids_nK = topk_ids_nK.to(torch.int32)
    owner_nK = owner_of(ids_nK, num_experts=num_experts, block=block, ranks=axis.ranks)
    wanted_nN = _wanted(owner_nK, axis.ranks)
    hop = _exact(wanted_nN, axis, max_rows) if slots is None else _in_slots(wanted_nN, axis, slots)
    received = {name: carry(values, hop) for name, values in payload.items()}
    # Ids travel less E, so that the zeros of an empty slot arrive as the sentinel.
    ids_mK = carry(ids_nK - num_experts, hop) + num_experts
    here_mK = owner_of(ids_mK, num_experts=num_experts, block=block, ranks=axis.ranks) == axis.index
    return received, torch.where(here_mK, ids_mK, num_experts), carry(topk_weights_nK, hop), hop


def back(y_mW: Float32[Tensor, "m W"], hop: Hop) -> Float32[Tensor, "n W"]:
    """Returns one row a copy to the tokens' senders, who add up each token's in destination order, in float32."""
    partial_MW = collectives.all_to_all_rows(y_mW, hop.receive, hop.send, hop.axis.group)
    return row_ops.sum_rows(partial_MW, hop.copy_token, hop.position)
