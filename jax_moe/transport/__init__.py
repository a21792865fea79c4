"""Ways to bring rows to the ranks that hold their experts, and results back."""

from jax_moe.transport import allgather as allgather
from jax_moe.transport import hops as hops
from jax_moe.transport import local as local
from jax_moe.transport import one_sided as one_sided
from jax_moe.transport import padded as padded
from jax_moe.transport import ragged as ragged
from jax_moe.transport.base import Handle as Handle
from jax_moe.transport.base import Transport as Transport
from jax_moe.transport.hops import HopsHandle as HopsHandle
