"""A mixture-of-experts layer in PyTorch, over a (dp, tp) mesh of ranks."""

from torch_moe.capabilities import ACROSS_NODES as ACROSS_NODES
from torch_moe.capabilities import CAPABILITIES as CAPABILITIES
from torch_moe.capabilities import TRANSPORT_DTYPES as TRANSPORT_DTYPES
from torch_moe.config import MoEConfig as MoEConfig
from torch_moe.config import ParallelConfig as ParallelConfig
from torch_moe.config import RouterConfig as RouterConfig
from torch_moe.config import check as check
from torch_moe.cost import Estimate as Estimate
from torch_moe.cost import estimate as estimate
from torch_moe.layer import MoE as MoE
from torch_moe.mesh import make_mesh as make_mesh
from torch_moe.params import init as init
from torch_moe.stages import Lessons as Lessons
from torch_moe.stages import Stages as Stages
from torch_moe.trace import Trace as Trace
