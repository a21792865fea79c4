"""How rows reach the ranks that hold their experts, and how results come back."""

from torch_moe.transport import allgather as allgather
from torch_moe.transport import base as base
from torch_moe.transport import bounds as bounds
from torch_moe.transport import hop as hop
from torch_moe.transport import local as local
from torch_moe.transport import one_sided as one_sided
from torch_moe.transport import padded as padded
from torch_moe.transport import ragged as ragged
