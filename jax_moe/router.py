"""Which experts a token goes to and how much each counts. Knows nothing of the mesh.

Shape suffixes: t tokens on this shard, D hidden size, E experts, K experts per token, G groups of experts.

Everything is float32. Equal scores go to the lower index: `jax.lax.top_k` documents it.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jax_moe import kernels
from jax_moe._typing import Array, Float, Float32, Int32
from jax_moe.config import RouterConfig
from jax_moe.linear import linear


def compute_logits(x_tD: Float[Array, "t D"], gate_ED: Float[Array, "E D"]) -> Float32[Array, "t E"]:
    """Router logits, x @ gate.T.

    Args:
      x_tD: (t, D) float32, bfloat16 or float16.
      gate_ED: (E, D), same dtype.

    Returns:
      (t, E) float32.
    """
    # Exact: a logit that is off by a rounding of TF32 may choose another expert.
    return linear(x_tD, gate_ED, exact=True)


def route(
    logits_tE: Float[Array, "t E"],
    bias_E: Float32[Array, " E"] | None,
    *,
    router: RouterConfig,
    top_k: int,
    implementation: str | None = None,
) -> tuple[Int32[Array, "t K"], Float32[Array, "t K"]]:
    """Chooses experts and weighs them.

    Scores are a softmax over all experts or a sigmoid of each. Choice is by score plus bias; with groups, first the
    best groups are kept, a group's score being its best selection score, or with a bias the sum of its best two (as in
    DeepSeek-V3). Weights are the chosen experts' scores without the bias, renormalized if asked, then scaled.

    Args:
      logits_tE: (t, E), cast to float32.
      bias_E: (E,) float32 score correction, or None.
      router: see `RouterConfig`.
      top_k: K.
      implementation: of the kernels.

    Returns:
      ids (t, K) int32, best first, and weights (t, K) float32. No gradient flows through the choice.

    Example:
      >>> import jax.numpy as jnp
      >>> ids, weights = route(jnp.array([[0.0, 2.0, 2.0, 1.0]]), None, router=RouterConfig(scoring="sigmoid"), top_k=2)
      >>> ids.tolist()
      [[1, 2]]
    """
    logits_tE = logits_tE.astype(jnp.float32)
    options = dataclasses.asdict(rule(router, top_k))
    return kernels.choose_experts(logits_tE, bias_E, **options, implementation=implementation)


def rule(router: RouterConfig, top_k: int) -> kernels.Rule:
    """What the kernels need to know of a router."""
    return kernels.Rule(
        top_k=top_k,
        scoring=router.scoring,
        renormalize=router.renormalize,
        scaling=router.scaling_factor,
        num_groups=router.num_groups,
        groups_kept=router.groups_kept,
    )
