"""`flax.nnx.SpectralNorm`, computed by normjax."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype

from normjax._typing import DTypeLike, admissible
from normjax.nnx._weights import Path, known, with_weights
from normjax.weights.spectral_norm import forget_kernels_of_zeros, spectral_norm


class SpectralNorm(nnx.SpectralNorm):
    """Wraps a layer with spectral normalization: `flax.nnx.SpectralNorm` in float32.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`batch_stats`: `nnx.BatchStat`), shapes and dtypes, so checkpoints can be
    exchanged in both directions. See `normjax.weights.spectral_norm` for the equations.

    Differences from Flax:
      - The weights of the layer are never overwritten (google/flax#5576): the unnormalized weights
        are trained, and with `update_stats=False` a call under a transformation of JAX may close
        over the module. The call goes to a copy of the layer, which shares all other variables.
        Attributes that the call adds to the layer, as `sow` does outside `nnx.capture`, are lost.
      - Power iteration runs in float32 or wider, on accelerators too.

    Args:
      layer_instance: the layer to wrap.
      n_steps: power iteration steps in each call. One step is enough in training, since weights
        change little from step to step. With 0, weights are not divided.
      epsilon: added to the squared norms.
      dtype: dtype of the normalized weights. None means the dtype that weights and statistics
        promote to.
      param_dtype: dtype of the statistics `u` and `sigma`.
      error_on_non_matrix: whether weights of more than two axes raise an error. Otherwise their
        leading axes are flattened.
      update_stats: whether to store the new singular vectors and values. `model.train()`,
        `model.eval()` and the call override it.
      bound: upper bound of the largest singular value of a weight: only weights above it are
        divided, by `sigma / bound` (SNGP). With None, all weights are divided by sigma.
      rngs: random keys for the first singular vectors.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax.nnx import SpectralNorm
      >>> layer = nnx.Linear(4, 4, kernel_init=nnx.initializers.orthogonal(5.0), rngs=nnx.Rngs(0))
      >>> norm = SpectralNorm(layer, n_steps=5, rngs=nnx.Rngs(1))
      >>> weights, stored = norm(jnp.eye(4)), layer.kernel[...]  # the bias is 0
      >>> print(jnp.linalg.norm(weights, 2).round(3), jnp.linalg.norm(stored, 2).round(3))
      1.0 5.0
    """

    def __init__(
        self,
        layer_instance: nnx.Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        bound: float | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            layer_instance,
            n_steps=n_steps,
            epsilon=epsilon,
            dtype=dtype,
            param_dtype=param_dtype,
            error_on_non_matrix=error_on_non_matrix,
            update_stats=update_stats,
            rngs=rngs,
        )
        self.bound = bound

    def __call__(self, x: jax.Array, update_stats: bool | None = None) -> Any:
        """Calls the wrapped layer with its weights divided by their largest singular values.

        Args:
          x: the layer's input.
          update_stats: overrides the constructor, `model.train()` and `model.eval()`.

        Returns:
          What the layer returns.
        """
        update = nnx.module.first_from(
            update_stats,
            not self.use_running_average,
            error_msg="SpectralNorm: update_stats is not set. "
            "Expected it in the constructor or the call; got None.",
        )
        return with_weights(self.layer_instance, partial(_spectral_normed, self, update), x)


def _spectral_normed(
    norm: SpectralNorm, update: bool, path: Path, weight: nnx.Param
) -> jax.Array | None:
    if weight.ndim < 2 or norm.n_steps < 1:
        return None
    if weight.ndim > 2 and norm.error_on_non_matrix:
        # the wording of Flax's error
        raise ValueError(
            f"Layer instance parameter is {weight.ndim}D but error_on_non_matrix is True"
        )
    variables = {leaf: known(norm, norm.batch_stats, (*path, leaf)) for leaf in ("u", "sigma")}
    state = {leaf: variable[...] for leaf, variable in variables.items()}
    dtype = canonicalize_dtype(weight[...], *state.values(), dtype=norm.dtype)
    kernel = admissible(weight[...], dtype)
    kernel, state = spectral_norm(
        {},
        state,
        kernel,
        update,
        n_steps=norm.n_steps,
        bound=norm.bound,
        epsilon=norm.epsilon,
        dtype=dtype,
    )
    if update:
        state = forget_kernels_of_zeros(state)
        for leaf, variable in variables.items():
            variable[...] = state[leaf]
    return kernel
