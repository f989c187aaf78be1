"""Measures how far a device's statistics give away the key of a query in contrastive training."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from normjax import _checks
from normjax._trees import check_finite
from normjax._typing import PRNGKey, widen
from normjax.diagnostics.instruments._batches import check_examples, check_rows, compiled


class Leakage(NamedTuple):
    """How well queries find their keys, with the keys on the same device or on others.

    Attributes:
      leak: `together - apart`, the share of keys that is found by means of the statistics. It is 0
        for a network without batch statistics.
      standard_error: the standard error of `leak`, over queries.
      together: the share of queries whose most similar key is their own, with each key on its
        query's device.
      apart: the same share, with the keys assigned to devices at random.
      same_device: with each key on its query's device, the share of queries whose most similar
        *other* key is on their device.
      chance: what `same_device` is if devices leave no trace: `(n - 1) / (batch - 1)` for n queries
        per device.
    """

    leak: Float[Array, ""]
    standard_error: Float[Array, ""]
    together: Float[Array, ""]
    apart: Float[Array, ""]
    same_device: Float[Array, ""]
    chance: Float[Array, ""]


def leakage(
    function: Callable[[Array, Array], tuple[Array, Array]],
    queries: Float[Array, "batch ..."],
    keys: Float[Array, "batch ..."],
    *,
    devices: int,
    key: PRNGKey,
    shuffles: int = 4,
    axis_name: Hashable = "devices",
) -> Leakage:
    r"""Measures what batch norm leaks in contrastive training with queries and keys on one device.

    The task is to find the second view of an image, given the first, among all keys of the batch.
    If each device normalizes by its own statistics, and both views are on one device, the
    statistics are a signature: the network finds the key without looking at the image. So MoCo
    shuffles the keys over devices, and SimCLR shares statistics among all devices. This function
    measures the accuracy with and without a shuffle, with the same weights:

    .. math:: \text{leak} = \Pr\Bigl[\arg\max_j \cos(q_i, k_j) = i \Bigr]_\text{together}
                          - \Pr\Bigl[\arg\max_j \cos(q_i, k_j) = i \Bigr]_\text{keys shuffled over
                            devices}

    The leak is positive if statistics help to find the key. In small batches they may help an
    untrained network, too, since a query and its key are distorted alike; what costs accuracy is
    the leak that training adds, so compare before and after. The leak is negative if statistics
    hide more than they give away. `same_device` shows whether devices leave a trace at all: it is
    above `chance` if a device's examples share a shift, and below if the subtraction of their mean
    moves them apart.

    Args:
      function: `function(queries, keys) -> (q, k)` maps the views on one device to embeddings `(n,
        features)`, in *training* mode and without new statistics, with both views in one batch as
        in SimCLR, or two encoders as in MoCo. It runs under `jax.vmap` over the devices, and may
        share statistics over `axis_name`.
      queries: the first views, floating-point; each device gets `batch / devices` of them, in
        order.
      keys: the second views, of the same images in the same order.
      devices: the number of devices to simulate.
      key: the random key of the shuffles.
      shuffles: the number of shuffles that `apart` is averaged over.
      axis_name: the name of the mapped axis of the devices.

    Returns:
      `Leakage`, shares from 0 to 1 in float32.

    Raises:
      ValueError: for a batch that cannot be split evenly over the devices, and for embeddings that
        are not rows or not finite.
      TypeError: for a function that does not return a pair.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> queries = jax.random.normal(jax.random.key(0), (128, 8))
      >>> keys = queries + 0.3 * jax.random.normal(jax.random.key(1), (128, 8))  # second views
      >>> def function(queries, keys, axis_name=None):
      ...     params, batch_stats = nj.batch_norm_init(8)
      ...     q, _ = nj.batch_norm(params, batch_stats, queries, True, axis_name=axis_name)
      ...     k, _ = nj.batch_norm(params, batch_stats, keys, True, axis_name=axis_name)
      ...     return q, k
      >>> settings = {"devices": 32, "key": jax.random.key(2)}
      >>> alone = nj.diagnostics.leakage(function, queries, keys, **settings)
      >>> print(bool(alone.leak > 4 * alone.standard_error))
      True
      >>> synced = lambda queries, keys: function(queries, keys, "devices")
      >>> print(nj.diagnostics.leakage(synced, queries, keys, **settings).leak)
      0.0

    References:
      He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (CVPR 2020),
      section 3.3. Chen et al., "A Simple Framework for Contrastive Learning of Visual
      Representations" (ICML 2020), section 2.2.
    """
    queries = check_examples("leakage", "queries", queries)
    keys = check_examples("leakage", "keys", keys)
    _check_devices(queries, keys, devices, shuffles)
    batch = len(queries)
    apply = jax.jit(jax.vmap(compiled(function), axis_name=axis_name))

    def split(views: Array) -> Array:
        return views.reshape(devices, -1, *views.shape[1:])

    _check_embeddings(jax.eval_shape(apply, split(queries), split(keys)), batch // devices)
    shuffled = [jax.random.permutation(own, batch) for own in jax.random.split(key, shuffles)]
    orders = jnp.stack([jnp.arange(batch), *shuffled])
    q, k = jax.vmap(lambda order: apply(split(queries), split(keys[order])))(orders)
    check_finite("leakage", "q", q)
    check_finite("leakage", "k", k)
    return _summary(q, k, orders, batch // devices)


@partial(jax.jit, static_argnames="n")
def _summary(q: Array, k: Array, orders: Array, n: int) -> Leakage:
    """Returns the result for embeddings `(orders, devices, n, ...)` of keys in these orders."""
    _, batch = orders.shape

    def cosines_of(q: Array, k: Array, order: Array) -> Array:
        return _unit(q, batch) @ _unit(k, batch)[jnp.argsort(order)].T

    cosines = jax.vmap(cosines_of)(q, k, orders)
    rows = jnp.arange(batch)
    found = (cosines.argmax(-1) == rows).astype(cosines.dtype)
    together, apart = found[0], found[1:].mean(0)
    others = jnp.where(jnp.eye(batch, dtype=bool), -jnp.inf, cosines[0]).argmax(-1)
    leak = together - apart
    return Leakage(
        leak=leak.mean(),
        standard_error=leak.std(ddof=1) / math.sqrt(batch),
        together=together.mean(),
        apart=apart.mean(),
        same_device=(others // n == rows // n).astype(leak.dtype).mean(),
        chance=jnp.asarray((n - 1) / (batch - 1), leak.dtype),
    )


def _unit(embedded: Array, batch: int) -> Array:
    """Returns the embeddings of all devices as rows of length 1."""
    rows = widen(embedded).reshape(batch, -1)
    length = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / jnp.where(length > 0, length, 1)


def _check_embeddings(embedded: object, n: int) -> None:
    if not (isinstance(embedded, (tuple, list)) and len(embedded) == 2):
        count = f" of {len(embedded)}" if isinstance(embedded, Sequence) else ""
        _checks.raise_error(
            "leakage",
            "function does not return a pair",
            expected="(q, k), the embeddings of queries and keys",
            got=f"a {type(embedded).__name__}{count}",
            fix="Split the outputs of a common batch: jnp.split(embeddings, 2)",
            kind=TypeError,
        )
    for name, rows in zip(("function(...)[0]", "function(...)[1]"), embedded, strict=True):
        of_device = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), rows)
        check_rows("leakage", name, of_device, n)


def _check_devices(queries: Array, keys: Array, devices: int, shuffles: int) -> None:
    for name, given, least in (("devices", devices, 2), ("shuffles", shuffles, 1)):
        if (_checks.positive_int(given) or 0) < least:
            as_in_training = "Pass the number of devices that you train on"
            _checks.raise_error(
                "leakage",
                f"too few {name}",
                expected=f"an int of {least} or more",
                got=f"{name}={given!r}",
                fix=as_in_training if name == "devices" else "Leave shuffles out for 4",
            )
    if queries.shape != keys.shape or len(queries) % devices:
        _checks.raise_error(
            "leakage",
            "queries and keys cannot be split evenly over the devices",
            expected=f"as many keys as queries, of one shape, a multiple of {devices}",
            got=f"queries.shape={queries.shape}, keys.shape={keys.shape} for devices={devices}",
            fix=f"Pass {len(queries) // devices * devices or devices} of each",
        )
