"""`flax.linen.SpectralNorm`, computed by normjax."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from normjax.linen._shared import promoted
from normjax.linen._weights import with_weights
from normjax.weights.spectral_norm import forget_kernels_of_zeros, spectral_norm


class SpectralNorm(nn.SpectralNorm):
    """Wraps a layer with spectral normalization: `flax.linen.SpectralNorm` in float32.

    Drop-in replacement: the constructor and the call take the same arguments, and the variables
    have the same names (`batch_stats`: `Dense_0/kernel/u`, `Dense_0/kernel/sigma` and so on),
    shapes and dtypes, so checkpoints can be exchanged in both directions. See
    `normjax.weights.spectral_norm` for the equations.

    Differences from Flax:
      - Power iteration runs in float32 or wider, on accelerators too, and the state keeps its
        dtype.
      - Only parameters are normalized. Flax also normalizes running statistics of two or more axes.
      - `apply` never overwrites the weights of the layer. (With `mutable=True`, Flax returns the
        normalized weights among the updates.)

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
      collection_name: collection of the variables `u` and `sigma`.
      bound: upper bound of the largest singular value of a weight: only weights above it are
        divided, by `sigma / bound` (SNGP). With None, all weights are divided by sigma.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from normjax.linen import SpectralNorm
      >>> norm = SpectralNorm(nn.Dense(4, kernel_init=nn.initializers.orthogonal(5.0)), n_steps=5)
      >>> variables = norm.init(jax.random.key(0), jnp.eye(4), update_stats=True)
      >>> print(variables["batch_stats"]["layer_instance/kernel/sigma"].round(3))
      5.0
    """

    bound: float | None = None

    @nn.compact
    def __call__(self, *args: Any, update_stats: bool, **kwargs: Any) -> Any:
        """Calls the wrapped layer with its weights divided by their largest singular values.

        Args:
          *args: passed to the layer.
          update_stats: whether to store the new singular vectors and values, which needs
            `mutable=["batch_stats"]`.
          **kwargs: passed to the layer.

        Returns:
          What the layer returns.
        """
        return with_weights(self, partial(_spectral_normed, self, update_stats), *args, **kwargs)


def _spectral_normed(
    module: SpectralNorm, update_stats: bool, path: str, kernel: jax.Array
) -> jax.Array:
    if kernel.ndim < 2 or module.n_steps < 1:
        return kernel
    if kernel.ndim > 2 and module.error_on_non_matrix:
        # the wording of Flax's error
        raise ValueError(f"Input is {kernel.ndim}D but error_on_non_matrix is True")
    shape, dtype = (1, kernel.shape[-1]), module.param_dtype
    u = module.variable(
        module.collection_name,
        f"{path}/u",
        lambda: jax.random.normal(module.make_rng("params"), shape, dtype),
    )
    sigma = module.variable(module.collection_name, f"{path}/sigma", jnp.ones, (), dtype)
    state = {"u": u.value, "sigma": sigma.value}
    kernel, dtype = promoted(module, kernel, *state.values())
    kernel, state = spectral_norm(
        {},
        state,
        kernel,
        update_stats,
        n_steps=module.n_steps,
        bound=module.bound,
        epsilon=module.epsilon,
        dtype=dtype,
    )
    if update_stats:
        state = forget_kernels_of_zeros(state)
        u.value, sigma.value = state["u"], state["sigma"]
    return kernel
