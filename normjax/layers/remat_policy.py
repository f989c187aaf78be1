"""A policy of what a network stores for its backward pass, and what it recomputes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import lax

from normjax import _checks
from normjax.statistics.elements import INPUT, OUTPUT, STATISTICS


def remat_policy(
    *, recompute: Callable[[jax.ShapeDtypeStruct], bool] | None = None
) -> Callable[..., bool]:
    """Returns a policy for `jax.checkpoint` that recomputes normalizations and activations.

    The policy stores the outputs of linear layers (convolutions, and matrix products without batch
    dimensions), and the inputs and statistics of normalizations. Normalizations and activations are
    bandwidth-bound, so they are cheap to recompute in the backward pass. Linear layers and
    statistics are not recomputed, so recomputation adds no collectives for `axis_name`. Apply the
    checkpoint to the network as a whole: `jax.checkpoint(network, policy=...)`, `flax.linen.remat`,
    `flax.nnx.remat`. Do not set `prevent_cse=False`: XLA would then find that the recomputed values
    are already known, and store them after all.

    Args:
      recompute: a function that receives the shape and dtype of an array that would be stored, and
        returns whether to recompute it instead. Recompute a large output of a small input, such as
        the output of the first convolution. For a ResNet on images of 224 x 224:
        `nj.remat_policy(recompute=lambda x: x.shape[1:3] == (112, 112))`. It is not called for the
        network's inputs, which are stored anyway.

    Returns:
      The policy.

    Raises:
      TypeError: if `recompute` is not a function.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> params, batch_stats = nj.batch_norm_init(4)
      >>> def network(kernel, x):
      ...     y, _ = nj.batch_norm(params, batch_stats, x @ kernel, train=True)
      ...     return jax.nn.relu(y)
      >>> lean = jax.checkpoint(network, policy=nj.remat_policy())
      >>> _, backward = jax.vjp(lean, jnp.ones((3, 4)), jnp.ones((8, 3)))
      >>> stored = [leaf.shape for leaf in jax.tree.leaves(backward)]
      >>> print(sorted(shape for shape in stored if shape[0] > 1 and len(shape) > 1))
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
