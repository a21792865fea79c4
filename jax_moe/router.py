"""Which experts a token goes to and how much each counts. Knows nothing of the mesh.

Shape suffixes: t tokens on this shard, D hidden size, E experts, K experts per token, G groups of experts.

Everything is float32. Equal scores go to the lower index: `jax.lax.top_k` documents it.
"""

from __future__ import annotations

import jax
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
      implementation: of the kernels; with groups there is one in plain JAX alone.

    Returns:
      ids (t, K) int32, best first, and weights (t, K) float32. No gradient flows through the choice.

    Example:
      >>> import jax.numpy as jnp
      >>> ids, weights = route(jnp.array([[0.0, 2.0, 2.0, 1.0]]), None, router=RouterConfig(scoring="sigmoid"), top_k=2)
      >>> ids.tolist()
      [[1, 2]]
    """
    logits_tE = logits_tE.astype(jnp.float32)
    if router.num_groups == 1:
        return kernels.choose_experts(
            logits_tE,
            bias_E,
            top_k=top_k,
            scoring=router.scoring,
            renormalize=router.renormalize,
            scaling=router.scaling_factor,
            implementation=implementation,
        )
    scores_tE = jax.nn.softmax(logits_tE, axis=-1) if router.scoring == "softmax" else jax.nn.sigmoid(logits_tE)
    selection_tE = jax.lax.stop_gradient(scores_tE)
    if bias_E is not None:
        selection_tE = selection_tE + jax.lax.stop_gradient(bias_E.astype(jnp.float32))
    selection_tE = keep_groups(selection_tE, router.num_groups, router.groups_kept, top_two=bias_E is not None)
    ids_tK = jax.lax.top_k(selection_tE, top_k)[1].astype(jnp.int32)
    weights_tK = jnp.take_along_axis(scores_tE, ids_tK, axis=-1)
    if router.renormalize:
        weights_tK = weights_tK / (jnp.sum(weights_tK, axis=-1, keepdims=True) + 1e-20)
    return ids_tK, weights_tK * router.scaling_factor


def keep_groups(
    selection_tE: Float32[Array, "t E"], num_groups: int, groups_kept: int, *, top_two: bool
) -> Float32[Array, "t E"]:
    """Sets the selection scores of all but the best groups to -inf.

    Args:
      selection_tE: (t, E) float32.
      num_groups: G, a divisor of E; groups are contiguous.
      groups_kept: how many stay.
      top_two: a group's score is the sum of its best two, else its best one. A group of one expert has only that one.

    Returns:
      (t, E) float32.
    """
    t, num_experts = selection_tE.shape
    size = num_experts // num_groups
    grouped = selection_tE.reshape(t, num_groups, size)
    score_tG = jnp.sum(jax.lax.top_k(grouped, min(2, size) if top_two else 1)[0], axis=-1)
    kept = jax.lax.top_k(score_tG, groups_kept)[1]
    keep_tG = jnp.any(kept[:, :, None] == jnp.arange(num_groups), axis=1)
    return jnp.where(keep_tG[:, :, None], grouped, -jnp.inf).reshape(t, num_experts)
