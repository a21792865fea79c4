"""Operations on rows sorted by expert, each with one or more implementations."""

from jax_moe.kernels.choice import IMPLEMENTATIONS as IMPLEMENTATIONS
from jax_moe.kernels.choice import for_platform as for_platform
from jax_moe.kernels.hopper import FEW_TOKENS as FEW_TOKENS
from jax_moe.kernels.ops import FUSED as FUSED
from jax_moe.kernels.ops import OPERATIONS as OPERATIONS
from jax_moe.kernels.ops import choose_experts as choose_experts
from jax_moe.kernels.ops import chosen as chosen
from jax_moe.kernels.ops import clip_sizes as clip_sizes
from jax_moe.kernels.ops import combine_rows as combine_rows
from jax_moe.kernels.ops import few_tokens as few_tokens
from jax_moe.kernels.ops import for_rows as for_rows
from jax_moe.kernels.ops import gate_up as gate_up
from jax_moe.kernels.ops import gather_gate_up as gather_gate_up
from jax_moe.kernels.ops import gather_rows as gather_rows
from jax_moe.kernels.ops import grouped_matmul as grouped_matmul
from jax_moe.kernels.ops import plan_rows as plan_rows
from jax_moe.kernels.ops import tile_of as tile_of
from jax_moe.kernels.reference import Rule as Rule
