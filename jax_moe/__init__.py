"""A mixture-of-experts layer in JAX, over any mix of data, tensor, expert and sequence parallelism."""

from jax_moe.activation import Activation as Activation
from jax_moe.config import MoEConfig as MoEConfig
from jax_moe.config import ParallelConfig as ParallelConfig
from jax_moe.config import RouterConfig as RouterConfig
from jax_moe.config import check as check
from jax_moe.explain import Explanation as Explanation
from jax_moe.explain import explain as explain
from jax_moe.layer import moe as moe
from jax_moe.layer import moe_local as moe_local
from jax_moe.params import ExpertParams as ExpertParams
from jax_moe.params import LatentParams as LatentParams
from jax_moe.params import MoEParams as MoEParams
from jax_moe.params import RouterParams as RouterParams
from jax_moe.params import SharedParams as SharedParams
from jax_moe.params import from_mapping as from_mapping
from jax_moe.params import init as init
from jax_moe.params import to_mapping as to_mapping
from jax_moe.sharding import make_mesh as make_mesh
from jax_moe.sharding import param_specs as param_specs
from jax_moe.sharding import shard as shard
from jax_moe.sharding import unshard as unshard
from jax_moe.trace import Trace as Trace
