"""Finds the sharpest direction of the loss by Lanczos' iteration.

The iteration is written out, since each library that we tried falls short of what the docstring
promises, and all three return NaN for a Hessian of zeros. `matfree.eig.eigh_partial` makes one
vector of the parameters, which gathers sharded ones on every device, and takes all `iterations`
even if fewer suffice. `jax.experimental.sparse.linalg.lobpcg_standard` takes one vector, too, needs
at least 6 parameters and converges more slowly: on the eigenvalues `linspace(0, 1, 200) ** 2` its
error is 4e-4 after 50 iterations, and 2e-6 here after 27. `optax.power_iteration` finds the
eigenvalue of the largest magnitude, whatever its sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from normjax import _checks
from normjax._typing import PRNGKey
from normjax.diagnostics.instruments._losses import Loss, Scalar, checked, inner, norm, total

_FUNCTION = "hessian_eigenvalue"
Product = Callable[[Any], Any]  # maps a vector to the Hessian times the vector


class Eigenvalue(NamedTuple):
    """An eigenvalue of the Hessian, and its accuracy.

    Attributes:
      value: the eigenvalue.
      vector: its eigenvector of length 1, a tree like the parameters.
      residual: the measured length of `H vector - value vector`: some eigenvalue differs from
        `value` by at most that.
      iterations: the number of products with the Hessian.
      converged: whether the residual is within the tolerance.
    """

    value: Float[Array, ""]
    vector: PyTree[Float[Array, "..."]]
    residual: Float[Array, ""]
    iterations: Int[Array, ""]
    converged: Bool[Array, ""]


def hessian_eigenvalue(
    loss: Loss,
    params: PyTree,
    *,
    which: Literal["largest", "smallest"] = "largest",
    iterations: int = 50,
    tolerance: float = 1e-3,
    key: PRNGKey | None = None,
) -> Eigenvalue:
    r"""Finds the largest eigenvalue of the loss's Hessian, which bounds the learning rate.

    Lanczos' iteration projects the Hessian H onto the Krylov space of a random vector. The result
    is an eigenvalue of the small tridiagonal matrix T:

    .. math:: Q^\top H Q = T, \qquad T s = \theta s, \qquad
              \lVert H Q s - \theta Q s \rVert = \beta_k \lvert s_k \rvert

    H is never stored: its product with a vector is the derivative of the gradient along the vector
    (Pearlmutter 1994). On a quadratic loss, gradient descent with learning rate lr is stable if
    `lr < 2 / value`.

    *Largest* is meant with the sign: `"smallest"` finds the most negative curvature, and the larger
    magnitude of the two is the norm of H. Each new vector is made orthogonal to all earlier ones,
    twice, so that rounding errors do not duplicate eigenvalues. That needs memory for `iterations`
    copies of the parameters. It compiles at each call; in a loop, compile it once, as in the
    example.

    Args:
      loss: maps parameters (or the module) to the loss, a scalar, twice differentiable. ReLUs are
        linear on either side of 0. With batch norm: in training mode, on a batch as in training,
        without new statistics.
      params: any tree of arrays, or an nnx module: its `nnx.Param`s. They are read in at least
        float32.
      which: which end of the spectrum to find.
      iterations: the largest number of products with H; there are never more than parameters.
      tolerance: the residual to stop at, relative to the largest |eigenvalue| found. The error of
        the value is at most the residual, and usually about its square divided by the distance to
        the next eigenvalue.
      key: the random key of the vector to start from; None for `jax.random.key(0)`.

    Returns:
      An `Eigenvalue`, in at least float32. Check `converged`: if it is False, the value is only a
      lower bound of the largest eigenvalue (an upper bound of the smallest).

    Raises:
      ValueError: for iterations below 1, a tolerance that is not from 0 to 1, or an unknown
        `which`.
      TypeError: for parameters that are not real floating-point, or a loss that is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> curvature = jnp.array([-4.0, 1.0, 3.0])
      >>> loss = lambda params: 0.5 * jnp.sum(curvature * params["w"] ** 2)
      >>> sharpness = jax.jit(lambda params: nj.diagnostics.hessian_eigenvalue(loss, params))
      >>> found = sharpness({"w": jnp.ones(3)})
      >>> print(round(float(found.value), 4), jnp.abs(found.vector["w"]).round(3), found.converged)
      3.0 [0. 0. 1.] True

    References:
      Lanczos, "An Iteration Method for the Solution of the Eigenvalue Problem of Linear
      Differential and Integral Operators" (1950). Parlett, "The Symmetric Eigenvalue Problem"
      (1980), chapter 13. Pearlmutter, "Fast Exact Multiplication by the Hessian" (Neural
      Computation 1994).
    """
    _check_settings(which, iterations, tolerance)
    loss, params = checked(_FUNCTION, loss, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))

    @jax.jit
    def find(params: PyTree, key: PRNGKey) -> Eigenvalue:
        _, product = jax.linearize(jax.grad(loss), params)
        start, rows = _random(key, params), min(iterations, size)
        krylov, ritz = _lanczos(product, start, rows, tolerance, which)
        vector = _combined(ritz.weights, krylov.basis)
        vector = _scaled(1 / norm(vector), vector)
        image = product(vector)
        value = inner(vector, image)
        residual = norm(jax.tree.map(lambda a, b: a - value.astype(a.dtype) * b, image, vector))
        converged = residual <= _bound(tolerance, ritz.largest)
        return Eigenvalue(value, vector, residual, krylov.used, converged)

    return find(params, jax.random.key(0) if key is None else key)


def _check_settings(which: str, iterations: int, tolerance: float) -> None:
    _checks.choice(_FUNCTION, "which", which, ("largest", "smallest"))
    _checks.between(_FUNCTION, "tolerance", tolerance, 0.0, 1.0)
    if _checks.positive_int(iterations) is None:
        _checks.raise_error(
            _FUNCTION,
            "iterations is not a count",
            expected="a positive int",
            got=f"iterations={iterations!r}",
            fix="Pass about 50",
        )


class _Krylov(NamedTuple):
    """An orthonormal basis, row by row, and T as its diagonal and the elements beside it."""

    basis: PyTree[Float[Array, "rows ..."]]
    diagonal: Float[Array, " rows"]
    beside: Float[Array, " rows"]  # at k: the element between rows k and k + 1
    used: Int[Array, ""]


class _Ritz(NamedTuple):
    """An eigenvector in the basis, its residual, and the largest |eigenvalue| of T."""

    weights: Float[Array, " rows"]
    residual: Scalar
    largest: Scalar


def _lanczos(
    product: Product, start: PyTree, rows: int, tolerance: float, which: str
) -> tuple[_Krylov, _Ritz]:
    def further(state: tuple[_Krylov, _Ritz]) -> Array:
        # Half the tolerance, since the residual that is measured last may be a little larger by
        # rounding errors.
        krylov, ritz = state
        return (krylov.used < rows) & ~(ritz.residual <= _bound(tolerance / 2, ritz.largest))

    def step(state: tuple[_Krylov, _Ritz]) -> tuple[_Krylov, _Ritz]:
        krylov = _extended(product, state[0])
        return krylov, _ritz(krylov, which)

    def first_row(leaf: Array) -> Array:
        return jnp.zeros((rows, *leaf.shape), leaf.dtype).at[0].set(leaf)

    empty = jnp.zeros(rows, norm(start).dtype)
    krylov = _Krylov(jax.tree.map(first_row, start), empty, empty, jnp.int32(0))
    nothing = _Ritz(empty, jnp.full((), jnp.inf, empty.dtype), jnp.zeros((), empty.dtype))
    return lax.while_loop(further, step, (krylov, nothing))


def _extended(product: Product, krylov: _Krylov) -> _Krylov:
    """Multiplies the last row by the Hessian, and adds the new direction as the next row."""
    basis, diagonal, beside, k = krylov
    last = jax.tree.map(lambda rows: rows[k], basis)
    image = product(last)
    diagonal = diagonal.at[k].set(inner(last, image))
    for _ in range(2):  # rows that are not used yet are zeros, which change nothing
        along = _products(basis, image)
        image = jax.tree.map(jnp.subtract, image, _combined(along, basis))
    length = norm(image)
    following = _scaled(1 / jnp.where(length > 0, length, 1), image)
    basis = jax.tree.map(lambda rows, row: rows.at[k + 1].set(row, mode="drop"), basis, following)
    return _Krylov(basis, diagonal, beside.at[k].set(length), k + 1)


def _ritz(krylov: _Krylov, which: str) -> _Ritz:
    """Returns an eigenvalue of T; unused rows get eigenvalues below those of T."""
    _, diagonal, beside, used = krylov
    rows = len(diagonal)
    index = jnp.arange(rows, dtype=jnp.int32)
    coupling = jnp.where(index < used - 1, beside, 0)
    bound = jnp.abs(diagonal).max() + 2 * coupling.max()
    outside = jnp.where(bound > 0, -2 * bound, -1)
    matrix = jnp.diag(jnp.where(index < used, diagonal, outside))
    matrix += jnp.diag(coupling[:-1], 1) + jnp.diag(coupling[:-1], -1)
    values, vectors = jnp.linalg.eigh(matrix)
    weights = vectors[:, rows - 1 if which == "largest" else rows - used]
    largest = jnp.maximum(jnp.abs(values[-1]), jnp.abs(values[rows - used]))
    return _Ritz(weights, beside[used - 1] * jnp.abs(weights[used - 1]), largest)


def _bound(tolerance: float, largest: Scalar) -> Scalar:
    """Returns the residual to stop at; never below 10 rounding errors."""
    return max(tolerance, 10 * float(jnp.finfo(largest.dtype).eps)) * largest


def _random(key: PRNGKey, params: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    pairs = zip(keys, leaves, strict=True)
    start = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in pairs]
    return _scaled(1 / norm(start), jax.tree.unflatten(structure, start))


def _scaled(factor: Scalar, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, tree)


def _products(basis: PyTree, vector: PyTree) -> Float[Array, " rows"]:
    """Returns the inner product of each row with a vector."""

    def product(rows: Array, leaf: Array) -> Array:
        return jnp.tensordot(rows, leaf, leaf.ndim, precision="highest")

    return total(jax.tree.leaves(jax.tree.map(product, basis, vector)))


def _combined(weights: Float[Array, " rows"], basis: PyTree) -> PyTree:
    """Returns the weighted sum of the rows."""

    def combine(rows: Array) -> Array:
        return jnp.tensordot(weights.astype(rows.dtype), rows, 1, precision="highest")

    return jax.tree.map(combine, basis)
