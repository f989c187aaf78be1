"""Batches, networks and their statistics in float64, for the tests of `recalibrate`."""

import jax
import jax.numpy as jnp
import numpy as np

import normjax as nj
from tests.compare import widest

SIZES = (8, 8, 8, 5)  # the last batch is smaller
EPS = float(jnp.finfo(jnp.float32).eps)
PROMISED = {"rtol": 1e-5}  # of a batch's variance
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}


def make(rng, sizes=SIZES, shape=(3,), mean=2.0, dtype=np.float32):
    """Batches that drift: between them is as much variance as within them."""
    return [(rng.normal(mean + i, 1 + i / 4, (size, *shape)) + np.arange(shape[-1])).astype(dtype)
            for i, size in enumerate(sizes)]  # fmt: skip


def merged(batches, ddof=0):
    everything = np.concatenate([widest(x).reshape(-1, x.shape[-1]) for x in batches])
    return {"mean": everything.mean(0), "var": everything.var(0, ddof=ddof)}


def algorithm_2(batches):
    flat = [widest(x).reshape(-1, x.shape[-1]) for x in batches]
    return {
        "mean": np.mean([x.mean(0) for x in flat], 0),
        "var": np.mean([x.var(0, ddof=1) for x in flat], 0),
    }


def network(variables, x, train=True, **settings):
    """Three layers whose inputs depend on the normalization before them."""
    new = []
    for params, batch_stats in zip(variables["params"], variables["batch_stats"], strict=True):
        x, batch_stats = nj.batch_norm(
            params["norm"], batch_stats, x @ params["kernel"], train, **settings
        )
        x = jax.nn.relu(x)
        new.append(batch_stats)
    return x, new


def init(rng, depth=3, width=5):
    params, statistics = [], []
    for size in [3, *[width] * (depth - 1)]:
        norm, batch_stats = nj.batch_norm_init(width)
        norm = {
            leaf: value + jnp.asarray(0.2 * rng.normal(size=width), jnp.float32)
            for leaf, value in norm.items()
        }
        params.append(
            {"kernel": jnp.asarray(rng.normal(size=(size, width)), jnp.float32), "norm": norm}
        )
        statistics.append(batch_stats)
    return {"params": params, "batch_stats": statistics}


def in_float64(variables, batches, by):
    """Returns the moments of each layer's inputs over all batches, by "batch" or "population"."""
    xs, found = [x.astype(np.float64) for x in batches], []
    for params in variables["params"]:
        xs = [x @ widest(params["kernel"]) for x in xs]
        found.append(merged(xs))
        mean, var = found[-1]["mean"], found[-1]["var"]
        for i, x in enumerate(xs):
            if by == "batch":
                mean, var = x.mean(0), x.var(0)
            x = (x - mean) / np.sqrt(var + 1e-5) * widest(params["norm"]["scale"]) + widest(
                params["norm"]["bias"]
            )
            xs[i] = np.maximum(x, 0)
    return found
