"""What a network keeps for its backward pass, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

from normjax import _checks
from normjax.statistics.reduction import INPUT, OUTPUT, STATISTICS


def remat_policy(
    *, recompute: Callable[[jax.ShapeDtypeStruct], bool] | None = None
) -> Callable[..., bool]:
    """Returns a policy for `jax.checkpoint` that keeps what linear layers and statistics cost, and little else.

    Kept are the outputs of linear layers (convolutions, and products without batch dimensions), the
    inputs of normalizations, and their statistics. Normalization and activation, which are cheap
    where memory is what they wait for, are computed again in the backward pass; no linear layer and
    no statistic is, so under `axis_name` there are no more collectives than before. Checkpoint the
    network as a whole: `jax.checkpoint(network, policy=...)`, `flax.linen.remat`, `flax.nnx.remat`.
      Leave `prevent_cse` as it is: without it, XLA finds that what is computed
    again has been computed before, and keeps it after all.

    Args:
      recompute: says of an array that would be kept, by its shape and dtype, whether to compute it
        again all the same. Worth it for a large output of a small input, such as that of a
        network's first convolution. The policy of a
        ResNet on images of 224 x 224: `nj.remat_policy(recompute=lambda x: x.shape[1:3] == (112,
          112))`. Inputs of
        networks that are kept anyway are not asked about.

    Returns:
      The policy.

    Raises:
      TypeError: for a `recompute` that is not a function.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> def network(kernel, x):
      ...     y, _ = nj.batch_norm(params, batch_stats, x @ kernel, train=True)
      ...     return jax.nn.relu(y)
      >>> lean = jax.checkpoint(network, policy=nj.remat_policy())
      >>> _, backward = jax.vjp(lean, jnp.ones((3, 4)), jnp.ones((8, 3)))
      >>> print(sorted(kept.shape for kept in jax.tree.leaves(backward) if kept.shape[0] > 1 and kept.ndim > 1))
      [(3, 4), (8, 3), (8, 4)]

    References:
      Chen, Xu, Zhang & Guestrin, "Training Deep Nets with Sublinear Memory Cost" (2016), section 4:
      drop the results of low cost operations.
    """
    if recompute is not None and not callable(recompute):
        _checks.raise_error(
            "remat_policy",
            "recompute is not a function",
            expected="a function of an array's shape and dtype, or None",
            got=f"recompute={recompute!r}",
            fix="Pass for example recompute=lambda x: x.shape[1] == 112",
            kind=TypeError,
        )
    return partial(_keep, recompute)


_STATISTICS = jax.checkpoint_policies.save_only_these_names(STATISTICS)
_ARRAYS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(INPUT, OUTPUT),
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
)


def _keep(
    recompute: Callable[[jax.ShapeDtypeStruct], bool] | None,
    primitive: Any,
    *operands: Any,
    **how: Any,
) -> bool:
    if _STATISTICS(primitive, *operands, **how):
        return True
    if primitive is not lax.conv_general_dilated_p and not _ARRAYS(primitive, *operands, **how):
        return False
    return recompute is None or not recompute(
        jax.eval_shape(partial(primitive.bind, **how), *operands)
    )
