"""Each token goes once to each rank that holds any of its experts, stored there by the rank it comes from.

Slots, order and drops are those of `padded`: only the lane differs. A kernel of the sender stores a block of slots into
each peer's memory, rows and routing together, and another brings the sums back. It takes one process over the GPUs of
one host, which address each other's memory.
"""

import functools

from jax_moe.transport import lanes, padded
from jax_moe.transport.padded import combine as combine

dispatch = functools.partial(padded.dispatch, lane=lanes.Puts)
