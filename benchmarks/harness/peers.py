"""The peers on JAX, as functions `(params, stats, x) -> (y, stats)` with Flax's names.

A peer is imported when it is used. If it is not installed, or has no such layer, it raises an error
with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import normjax as nj

from .cases import EPSILON, GROUPS, MOMENTUM, Case

Apply = Callable[..., tuple[jax.Array, dict]]  # of params, stats and x; of a mask, by MASKED
AXIS = "data"  # the mapped axis of cases on several devices


class Unable(Exception):
    """Raised if the peer cannot run the case; the message is the reason."""


def normjax(case: Case) -> Apply:
    """Returns the layer of this library."""
    options = {
        "batch": {"momentum": MOMENTUM, "axis_name": _axis(case)},
        "group": {"num_groups": GROUPS},
    }
    layer = getattr(nj, f"{case.layer}_norm")
    settings = {"epsilon": EPSILON, **options.get(case.layer, {})}
    return lambda params, stats, x, **mask: layer(params, stats, x, case.train, **mask, **settings)


def formula(case: Case) -> Apply:
    """Returns the textbook formula in float32: the mean, and the mean of squares around it."""
    inner = range(1, len(case.shape) - 1)
    axes = {
        "batch": (0, *inner),
        "instance": (*inner,),
        "group": (*inner, len(case.shape)),  # the features are split into groups along a new axis
    }.get(case.layer, -1)

    def average(values: jax.Array) -> jax.Array:
        own = jnp.mean(values, axes, keepdims=True)
        return jax.lax.pmean(own, AXIS) if case.devices > 1 else own

    def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean = jnp.float32(0) if case.layer == "rms" else average(x)
        return mean, average(jnp.square(x - mean))

    def apply(params: dict, stats: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        wide = x.astype(jnp.float32)
        if case.layer == "group":
            wide = wide.reshape(*x.shape[:-1], GROUPS, -1)
        running = bool(stats) and not case.train
        mean, var = (stats["mean"], stats["var"]) if running else moments(wide)
        y = ((wide - mean) * jax.lax.rsqrt(var + EPSILON)).reshape(x.shape)
        y = y * params["scale"] + params.get("bias", 0.0)
        if stats and case.train:
            batch = {"mean": mean.reshape(-1), "var": var.reshape(-1)}
            stats = {k: MOMENTUM * stats[k] + (1 - MOMENTUM) * batch[k] for k in batch}
        return y.astype(x.dtype), stats

    return apply


def flax_linen(case: Case) -> Apply:
    """Returns `flax.linen`'s layer."""
    from flax import linen as nn

    settings: dict[str, Any] = {"epsilon": EPSILON, "dtype": case.dtype}
    layers: dict[str, Callable[[], Any]] = {
        "batch": lambda: nn.BatchNorm(
            not case.train, momentum=MOMENTUM, axis_name=_axis(case), **settings
        ),
        "layer": lambda: nn.LayerNorm(**settings),
        "rms": lambda: nn.RMSNorm(**settings),
        "group": lambda: nn.GroupNorm(GROUPS, **settings),
        "instance": lambda: nn.InstanceNorm(**settings),
    }
    layer = layers[case.layer]()

    def apply(params: dict, stats: dict, x: jax.Array, **mask: Any) -> tuple[jax.Array, dict]:
        variables = {"params": params, "batch_stats": stats}
        if not (case.train and stats):
            return layer.apply(variables, x, **mask), stats
        y, new = layer.apply(variables, x, **mask, mutable=["batch_stats"])
        return y, new["batch_stats"]

    return apply


def flax_nnx(case: Case) -> Apply:
    """Returns `flax.nnx`'s layer, split and merged as in a jitted training step."""
    from flax import nnx

    settings: dict[str, Any] = {"epsilon": EPSILON, "dtype": case.dtype, "rngs": nnx.Rngs(0)}
    batch = {"use_running_average": not case.train, "momentum": MOMENTUM, "axis_name": _axis(case)}
    layers: dict[str, Callable[[], Any]] = {
        "batch": lambda: nnx.BatchNorm(case.features, **batch, **settings),
        "layer": lambda: nnx.LayerNorm(case.features, **settings),
        "rms": lambda: nnx.RMSNorm(case.features, **settings),
        "group": lambda: nnx.GroupNorm(case.features, GROUPS, **settings),
        "instance": lambda: nnx.InstanceNorm(case.features, **settings),
    }
    graph = nnx.split(layers[case.layer](), nnx.Param, nnx.BatchStat)[0]

    def apply(params: dict, stats: dict, x: jax.Array, **mask: Any) -> tuple[jax.Array, dict]:
        variables = nnx.State({k: nnx.Param(v) for k, v in params.items()})
        kept = nnx.State({k: nnx.BatchStat(v) for k, v in stats.items()})
        layer = nnx.merge(graph, variables, kept)
        y = layer(x, **mask)
        return y, {
            name: value.get_value() for name, value in nnx.state(layer, nnx.BatchStat).items()
        }

    return apply


def haiku(case: Case) -> Apply:
    """Returns `dm-haiku`'s layer, in float32 between casts, as its mixed precision policy does."""
    import haiku as hk

    axes = tuple(range(1, len(case.shape) - 1))
    layers: dict[str, Callable[[], Any]] = {
        "batch": lambda: hk.BatchNorm(
            True, True, MOMENTUM, EPSILON, cross_replica_axis=_axis(case), name="norm"
        ),
        "layer": lambda: hk.LayerNorm(-1, True, True, EPSILON, param_axis=-1, name="norm"),
        "rms": lambda: hk.RMSNorm(-1, EPSILON, param_axis=-1, name="norm"),
        "group": lambda: hk.GroupNorm(GROUPS, eps=EPSILON, name="norm"),
        "instance": lambda: hk.LayerNorm(axes, True, True, EPSILON, param_axis=-1, name="norm"),
    }
    arguments = {"is_training": case.train} if case.layer == "batch" else {}
    transformed = hk.transform_with_state(lambda x: layers[case.layer]()(x, **arguments))
    one = (1,) * (len(case.shape) - 1)

    def average(value: jax.Array) -> dict[str, jax.Array]:
        value = value.reshape(*one, -1)
        # after many steps, when the bias correction has no effect
        return {"hidden": value, "average": value, "counter": jnp.int32(2**20)}

    def apply(params: dict, stats: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        shape = (*one, -1) if case.layer == "batch" else (-1,)
        own = {
            {"bias": "offset"}.get(name, name): value.reshape(shape)
            for name, value in params.items()
        }
        state = {f"norm/~/{name}_ema": average(value) for name, value in stats.items()}
        y, new = transformed.apply({"norm": own}, state, None, x.astype(jnp.float32))
        return y.astype(x.dtype), {
            name: new[f"norm/~/{name}_ema"]["average"].reshape(-1) for name in stats
        }

    return apply


def equinox(case: Case) -> Apply:
    """Returns `equinox`'s layer, which takes one example, under vmap, with features first."""
    import equinox as eqx

    c = case.features
    layers: dict[str, Callable[[], Any]] = {
        "batch": lambda: eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            c,
            ("batch", AXIS) if case.devices > 1 else "batch",
            EPSILON,
            momentum=MOMENTUM,
            mode="batch",
        ),
        "layer": lambda: (eqx.nn.LayerNorm(c, EPSILON), None),
        "rms": lambda: (eqx.nn.RMSNorm(c, EPSILON, use_bias=False), None),
        "group": lambda: (eqx.nn.GroupNorm(GROUPS, c, EPSILON), None),
        "instance": lambda: (eqx.nn.GroupNorm(c, c, EPSILON), None),
    }

    def apply(params: dict, stats: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        layer, state = layers[case.layer]()
        kept = {"scale": "weight", "bias": "bias"}
        for name, value in params.items():
            layer = eqx.tree_at(lambda tree, name=name: getattr(tree, kept[name]), layer, value)
        wide = x.astype(jnp.float32)
        if case.layer == "batch":
            state = state.set(layer.batch_state_index, (stats["mean"], stats["var"]))
            one = lambda x, state: layer(x, state, inference=not case.train)  # noqa: E731
            y, state = jax.vmap(one, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(
                wide, state
            )
            stats = dict(zip(("mean", "var"), state.get(layer.batch_state_index), strict=True))
            return y.astype(x.dtype), stats
        mapped = layer
        for _ in range(1 if features_first("equinox", case) else x.ndim - 1):
            mapped = jax.vmap(mapped)
        return mapped(wide).astype(x.dtype), stats

    return apply


def keras(case: Case) -> Apply:
    """Returns Keras's layer on JAX."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    if keras.backend.backend() != "jax":
        raise Unable(f"Keras runs on {keras.backend.backend()}, not on JAX")
    if case.devices > 1:
        raise Unable("shares statistics by its own keras.distribution only")
    settings: dict[str, Any] = {
        "epsilon": EPSILON,
        "dtype": {"float32": "float32", "bfloat16": "mixed_bfloat16"}[case.dtype],
    }
    layers: dict[str, Callable[[], Any]] = {
        "batch": lambda: keras.layers.BatchNormalization(momentum=MOMENTUM, **settings),
        "layer": lambda: keras.layers.LayerNormalization(**settings),
        "rms": lambda: keras.layers.RMSNormalization(**settings),
        "group": lambda: keras.layers.GroupNormalization(GROUPS, **settings),
        "instance": lambda: keras.layers.GroupNormalization(-1, **settings),
    }
    layer = layers[case.layer]()
    layer.build((None, *case.shape[1:]))

    def apply(params: dict, stats: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        arguments = {"training": case.train} if case.layer == "batch" else {}
        own = [params[name] for name in ("scale", "bias") if name in params]
        y, new = layer.stateless_call(
            own, [stats[name] for name in ("mean", "var") if stats], x, **arguments
        )
        return y, dict(zip(("mean", "var"), new, strict=False))

    return apply


def tokamax(case: Case) -> Apply:
    """Returns Tokamax's layer or RMS norm."""
    if case.layer not in ("layer", "rms"):
        raise Unable(f"has no {case.layer} norm")
    import tokamax  # pyright: ignore[reportMissingImports]: optional
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # otherwise Tokamax would read the benchmark's command line

    def apply(params: dict, stats: dict, x: jax.Array) -> tuple[jax.Array, dict]:
        layer = case.layer == "layer"
        y = tokamax.layer_norm(
            x, params["scale"], params.get("bias"), epsilon=EPSILON, subtract_mean=layer
        )
        return y, stats

    return apply


PEERS: dict[str, Callable[[Case], Apply]] = {
    "normjax": normjax,
    "flax.linen": flax_linen,
    "flax.nnx": flax_nnx,
    "haiku": haiku,
    "equinox": equinox,
    "keras": keras,
    "tokamax": tokamax,
    "formula": formula,
}
MASKED = ("normjax", "flax.linen", "flax.nnx")
LIBRARIES = tuple(name for name in PEERS if name != "formula")


def features_first(peer: str, case: Case) -> bool:
    """Returns whether the peer takes (examples, features, ...), not (examples, ..., features)."""
    return peer == "equinox" and case.layer in ("batch", "group", "instance")


def _axis(case: Case) -> str | None:
    return AXIS if case.devices > 1 else None
