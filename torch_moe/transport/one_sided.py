"""What `jax_moe`'s `one_sided` delivers: the slots of `padded`, to the same ranks in the same order.

There a kernel of the sender stores slots into the receiver's memory. Here they travel by `all_to_all_single`: the name
stands for the delivery, and a kernel of PyTorch's own is not written.
"""

from torch_moe.transport.padded import carry as carry
from torch_moe.transport.padded import combine as combine
from torch_moe.transport.padded import dispatch as dispatch
