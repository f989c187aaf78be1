"""LSTM and GRU with layer or batch normalization: pure functions under `lax.scan`, for you to copy.

    cell = lstm(BATCH)  # or gru; PLAIN, LAYER or BATCH
    params, batch_stats = cell.init(key, inputs, units, max_steps)
    outputs, state, batch_stats = unroll(cell, params, batch_stats, x, train, mask=mask)

With N the normalization (the identity for PLAIN), an LSTM step is

    f, i, o, g = N(W_h h) + N(W_x x) + b
    c' = sigmoid(f) * c + sigmoid(i) * tanh(g)
    h' = sigmoid(o) * tanh(N(c'))

and a GRU step

    z, r = N(W_h h) + N(W_x x) + b
    g = tanh(N(V_x x) + b_g + sigmoid(r) * N(V_h h))
    h' = (1 - sigmoid(z)) * h + sigmoid(z) * g

Layer normalization (Ba, Kiros & Hinton 2016, supplementary material, equations 20-22 and 26-28)
normalizes each example over all units of W_h h, of W_x x and of c, each with a scale and a bias; so
the GRU, as in the paper, has no b.

Batch normalization (Cooijmans et al. 2016, equations 6-8; its GRU is ours, by analogy) has scales
that start at 0.1 and no biases beside b, but for that of c. Its statistics are kept apart for each
time step up to `max_steps`, the paper's T_max, while scale and bias are those of all steps. To a
pure function that is nothing special: `batch_stats` gets a leading time axis, and is carried from
step to step with the state. Steps beyond `max_steps` use the statistics of the last, at inference;
in training each of them is normalized by its own batch and updates the statistics of the last, one
after the other.

While the state is zero and x is, too, all that is normalized is equal: its variance is 0, and the
gradient grows by `scale / sqrt(epsilon)`, 300 for layer normalization, at each such step. One of
them, the first, is harmless, as nothing comes before it; a sequence that opens with several has to
be masked there, or to start from a `state` that is not zero.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.nn import initializers, sigmoid

import normjax as nj

Tree = dict[str, Any]
State = tuple[Array, ...]  # each (batch, units), the output first

MOMENTUM = 0.9  # of the running statistics: for runs of some hundred steps, as in these examples


class Cell(NamedTuple):
    """A recurrent cell: its initializer, the number of arrays in its state, and its step."""

    init: Callable[[Array, int, int, int], tuple[Tree, Tree]]
    states: int
    step: Callable[[Tree, Tree, State, Array, bool, Array], tuple[State, Tree]]


class Norm(NamedTuple):
    """A normalization for the cells. `biased`: whether its output already has a bias."""

    init: Callable[..., tuple[Tree, Tree]]
    apply: Callable[..., tuple[Array, Tree]]
    biased: bool = False


PLAIN = Norm(
    lambda features, use_bias: ({}, {}),
    lambda params, batch_stats, x, train, mask: (x, batch_stats),
)
LAYER = Norm(
    lambda features, use_bias: nj.layer_norm_init(features),
    # Each example by itself: what is masked harms no other.
    lambda *arguments, mask: nj.layer_norm(*arguments),
    biased=True,
)
BATCH = Norm(
    partial(nj.batch_norm_init, scale_init=initializers.constant(0.1)),
    partial(nj.batch_norm, momentum=MOMENTUM),
)


def lstm(norm: Norm) -> Cell:
    """Returns an LSTM; its state is `(h, c)`. The forget gate's bias starts at 1."""

    def init(key: Array, inputs: int, units: int, max_steps: int) -> tuple[Tree, Tree]:
        params = _kernels(key, inputs, 4 * units, units)
        params["bias"] = jnp.zeros(4 * units, jnp.float32).at[:units].set(1)
        sizes = {"hidden": 4 * units, "input": 4 * units, "cell": units}
        return _with_norms(norm, params, sizes, max_steps)

    def step(
        params: Tree, batch_stats: Tree, state: State, x: Array, train: bool, mask: Array
    ) -> tuple[State, Tree]:
        (h, c), (norms, new_stats) = state, _norms(norm, params, batch_stats, train, mask)
        hidden = norms("hidden", h @ params["hidden_kernel"])
        inputs = norms("input", x @ params["input_kernel"])
        f, i, o, g = jnp.split(hidden + inputs + params["bias"], 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
        h = sigmoid(o) * jnp.tanh(norms("cell", c))
        return (h, c), new_stats

    return Cell(init, 2, step)


def gru(norm: Norm) -> Cell:
    """Returns a GRU; its state is `(h,)`."""

    def init(key: Array, inputs: int, units: int, max_steps: int) -> tuple[Tree, Tree]:
        params = _kernels(key, inputs, 3 * units, units)
        if not norm.biased:
            params["bias"] = jnp.zeros(3 * units, jnp.float32)
        gates = {"hidden_gates": 2 * units, "input_gates": 2 * units}
        sizes = gates | {"hidden": units, "input": units}
        return _with_norms(norm, params, sizes, max_steps)

    def step(
        params: Tree, batch_stats: Tree, state: State, x: Array, train: bool, mask: Array
    ) -> tuple[State, Tree]:
        (h,), (norms, new_stats) = state, _norms(norm, params, batch_stats, train, mask)
        cut = [2 * h.shape[-1]]
        hidden_gates, hidden = jnp.split(h @ params["hidden_kernel"], cut, axis=-1)
        input_gates, inputs = jnp.split(x @ params["input_kernel"], cut, axis=-1)
        gates = norms("hidden_gates", hidden_gates) + norms("input_gates", input_gates)
        hidden, inputs = norms("hidden", hidden), norms("input", inputs)
        if "bias" in params:
            gates, inputs = gates + params["bias"][: cut[0]], inputs + params["bias"][cut[0] :]
        z, r = jnp.split(sigmoid(gates), 2, axis=-1)
        h = (1 - z) * h + z * jnp.tanh(inputs + r * hidden)
        return (h,), new_stats

    return Cell(init, 1, step)


def unroll(
    cell: Cell,
    params: Tree,
    batch_stats: Tree,
    x: Array,
    train: bool,
    *,
    mask: Array | None = None,
    state: State | None = None,
) -> tuple[Array, State, Tree]:
    """Runs a cell over sequences, each step with the statistics of its own.

    Args:
      cell: what to run.
      params: of the cell, shared by all steps.
      batch_stats: of the cell, with a leading axis of `max_steps`, which may differ from time.
      x: `(batch, time, inputs)`.
      train: Python bool.
      mask: bool `(batch, time)`, True where a step counts. The others leave the state as it is and
        no trace in the statistics, whatever x has there, NaN included.
      state: to start from; None for zeros.

    Returns:
      The outputs `(batch, time, units)`, where a masked step repeats the one before; the last
      state; new statistics.
    """
    batch, time, _ = x.shape
    mask = jnp.ones((batch, time), bool) if mask is None else mask
    if state is None:
        state = (jnp.zeros((batch, len(params["hidden_kernel"])), x.dtype),) * cell.states
    max_steps = min(map(len, jax.tree.leaves(batch_stats)), default=time)

    def step(
        carry: tuple[State, Tree], inputs: tuple[Array, Array, Array]
    ) -> tuple[tuple[State, Tree], Array]:
        (state, batch_stats), (t, x, mask) = carry, inputs
        own = jax.tree.map(lambda leaf: leaf[t], batch_stats)
        # Zeros, because even a gradient of zero times NaN is NaN.
        new, own = cell.step(params, own, state, jnp.where(mask, x, 0), train, mask)
        state = jax.tree.map(partial(jnp.where, mask), new, state)
        # Without stop_gradient, the backward pass carries zeros of the size of all statistics: a
        # step of training takes a fifth longer (64 time steps on a CPU, JAX 0.10.2).
        own = lax.stop_gradient(own)
        batch_stats = jax.tree.map(lambda leaf, new: leaf.at[t].set(new), batch_stats, own)
        return (state, batch_stats), state[0]

    steps = jnp.minimum(jnp.arange(time), max_steps - 1), jnp.swapaxes(x, 0, 1), mask.T[..., None]
    (state, batch_stats), outputs = lax.scan(step, (state, batch_stats), steps)
    return jnp.swapaxes(outputs, 0, 1), state, batch_stats


def _norms(
    norm: Norm, params: Tree, batch_stats: Tree, train: bool, mask: Array
) -> tuple[Callable[[str, Array], Array], Tree]:
    """Returns what applies the normalizations of a step by name, and their new statistics."""
    new_stats: Tree = {}

    def normalize(name: str, x: Array) -> Array:
        own = params["norms"][name], batch_stats[name]
        y, new_stats[name] = norm.apply(*own, x, train, mask=mask)
        return y

    return normalize, new_stats


def _kernels(key: Array, inputs: int, outputs: int, units: int) -> Tree:
    hidden, input_ = jax.random.split(key)
    return {
        "hidden_kernel": initializers.orthogonal()(hidden, (units, outputs), jnp.float32),
        "input_kernel": initializers.glorot_normal()(input_, (inputs, outputs), jnp.float32),
    }


def _with_norms(
    norm: Norm, params: Tree, sizes: dict[str, int], max_steps: int
) -> tuple[Tree, Tree]:
    """Adds the normalizations' parameters, and makes their statistics, one for each step."""
    made = {name: norm.init(size, use_bias=name == "cell") for name, size in sizes.items()}
    params["norms"] = {name: own for name, (own, _) in made.items()}
    batch_stats = {name: stats for name, (_, stats) in made.items()}
    return params, jax.tree.map(lambda leaf: jnp.repeat(leaf[None], max_steps, axis=0), batch_stats)
