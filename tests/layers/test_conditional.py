"""Scale and bias for each example in every layer: conditional batch norm, adaLN, FiLM, AdaIN."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normjax as nj
from tests import reference
from tests import reference_family as family
from tests.compare import assert_close, assert_finite, assert_trees_close, at_once
from tests.layers.cases import draw_normal
from tests.marks import slow_after

EPS = float(jnp.finfo(jnp.float32).eps)
# As many examples as channels: a rule of trailing dimensions would take one for the other.
B, H, W, C = SHAPE = (4, 3, 2, 4)
LAYERS = {
    "batch_norm": {},
    "batch_renorm": {"r_max": 1.5, "d_max": 0.5},
    "layer_norm": {},
    "rms_norm": {},
    "group_norm": {"num_groups": 2},
    "instance_norm": {},
    "filter_response_norm": {},
    "local_response_norm": {"size": 3, "alpha": 1.0},
    "dynamic_tanh": {},
}
LEAVES = [(C,), (B, C), (1, C), (B, H, C), (1, H, C), (B, 1, 1, C), (1, 1, W, C), (B, H, W, C)]
every_layer = pytest.mark.parametrize("name", LAYERS)


def draw(rng, shape, mean=0.0, dtype=np.float32):
    return jnp.asarray(draw_normal(rng, shape, dtype, mean))


def state(name, rng, channels=C):
    """What the layer needs besides scale and bias."""
    params = {"alpha": jnp.float32(0.7)} if name == "dynamic_tanh" else {}
    if name not in ("batch_norm", "batch_renorm"):
        return params, {}
    return params, {
        "mean": draw(rng, channels),
        "var": jnp.asarray(rng.gamma(2.0, size=channels), jnp.float32),
    }


def apply(name, params, batch_stats, x, train=True, **settings):
    return getattr(nj, name)(params, batch_stats, x, train, **LAYERS[name] | settings)


def normalized(name, params, batch_stats, x, train, **settings):
    """The layer without scale and bias, in float64."""
    settings = LAYERS[name] | settings
    if name == "batch_norm":
        return reference.batch_norm({}, batch_stats, x, train, **settings)[0]
    if name == "batch_renorm":
        return family.batch_renorm({}, batch_stats, x, train, **settings)[0]
    return getattr(family, name)(params, x, **settings)


def close(y, expected, **kind):
    largest = float(np.abs(expected).max())
    assert_close(y, expected, rtol=64 * EPS, atol=64 * EPS * largest, **kind)


@pytest.mark.slow
@every_layer
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_leading_dimensions_belong_to_the_first_axes(rng, name, train):
    params, batch_stats = state(name, rng)
    x = draw(rng, SHAPE, 1.0)
    plain = normalized(name, params, batch_stats, x, train)
    both = [{"scale": draw(rng, shape, 1.0), "bias": draw(rng, shape)} for shape in LEAVES]
    drawn = both + [{leaf: leaves[leaf]} for leaves in both for leaf in leaves]

    def with_each(drawn, x):
        return [apply(name, params | leaves, batch_stats, x, train)[0] for leaves in drawn]

    outcomes = at_once(with_each, drawn, x)
    for y, leaves in zip(outcomes, drawn, strict=True):
        close(y, family.affine(leaves, plain, -1), dtype=jnp.float32)
    for y, leaves, shape in zip(outcomes, both, LEAVES, strict=False):
        # By hand: ones between the leading dimensions and the features.
        spread = (*shape[:-1], *[1] * (4 - len(shape)), C)
        scale, bias = (np.float64(leaf).reshape(spread) for leaf in leaves.values())
        close(y, scale * plain + bias)


@pytest.mark.slow
@every_layer
def test_the_rank_of_a_leaf_decides_and_not_its_size(rng, name):
    params, batch_stats = state(name, rng)
    x = draw(rng, (C, C, C, C))
    leaf = draw(rng, (C,), 1.0)
    scales = leaf, jnp.tile(leaf, (C, 1)), jnp.tile(leaf[:, None], (1, C))

    def with_each(scales, x):
        return [apply(name, params | {"scale": scale}, batch_stats, x)[0] for scale in scales]

    per_feature, per_row, per_example = at_once(with_each, scales, x)
    plain = normalized(name, params, batch_stats, x, True)
    close(per_feature, plain * np.float64(leaf))
    close(per_row, plain * np.float64(leaf))
    close(per_example, plain * np.float64(leaf)[:, None, None, None])


@every_layer
@pytest.mark.parametrize(
    "leading", slow_after(2, [(B,), (1, H, 1), (), (B, H), (B, 1, W)]), ids=str
)
def test_with_channels_first_leading_dimensions_are_those_of_the_other_axes(rng, name, leading):
    params, batch_stats = state(name, rng)
    x = draw(rng, (B, H, W, C))
    leaves = {"scale": draw(rng, (*leading, C), 1.0), "bias": draw(rng, (*leading, C))}
    axes = {"reduction_axes": 1} if name in ("layer_norm", "rms_norm") else {}

    def both(leaves, x):
        first = jnp.moveaxis(x, -1, 1)
        moved, _ = apply(name, params | leaves, batch_stats, first, feature_axes=1, **axes)
        return jnp.moveaxis(moved, 1, -1), apply(name, params | leaves, batch_stats, x)[0]

    close(*at_once(both, leaves, x))


@pytest.mark.parametrize(
    "name", ["batch_norm", "batch_renorm", "layer_norm", "rms_norm", "instance_norm"]
)
def test_several_feature_axes_come_last_in_ascending_order(rng, name):
    x = draw(rng, (4, 2, 5, 3))
    params, batch_stats = state(name, rng, (2, 3))
    leaves = {"scale": draw(rng, (4, 5, 2, 3), 1.0), "bias": draw(rng, (4, 2, 3))}
    y, _ = apply(name, params | leaves, batch_stats, x, feature_axes=(3, 1))
    plain = normalized(name, params, batch_stats, x, True, feature_axes=(1, 3))
    scale, bias = (
        np.float64(leaves["scale"]).transpose(0, 2, 1, 3),
        np.float64(leaves["bias"])[:, :, None],
    )
    close(y, plain * scale + bias)


@every_layer
@pytest.mark.parametrize("shape", [(B, C), (B, 1, W, C)], ids=str)
def test_gradients_of_the_leaves_are_the_sums_over_what_shares_them(rng, name, shape):
    params, batch_stats = state(name, rng)
    x, cotangent = draw(rng, SHAPE), draw(rng, SHAPE)
    leaves = {"scale": draw(rng, shape, 1.0), "bias": draw(rng, shape)}

    @jax.jit
    @jax.grad
    def grads(leaves):
        return jnp.sum(cotangent * apply(name, params | leaves, batch_stats, x)[0])

    plain, weights = normalized(name, params, batch_stats, x, True), np.float64(cotangent)
    shared = tuple(axis for axis in range(3) if (*shape[:-1], 1, 1)[axis] == 1)
    expected = {
        "scale": (weights * plain).sum(shared).reshape(shape),
        "bias": weights.sum(shared).reshape(shape),
    }
    terms = 64 * EPS * np.abs(weights * plain).max() * H * W
    assert_trees_close(grads(leaves), expected, rtol=64 * EPS, atol=terms)


@pytest.mark.slow
@every_layer
def test_gradients_of_x_are_those_of_the_spread_out_leaves(rng, name):
    params, batch_stats = state(name, rng)
    x, cotangent, scale = draw(rng, SHAPE), draw(rng, SHAPE), draw(rng, (B, C), 1.0)

    def losses(inside, outside):
        conditional, _ = apply(name, params | {"scale": scale}, batch_stats, inside)
        spread = scale[:, None, None] * apply(name, params, batch_stats, outside)[0]
        return jnp.sum(cotangent * conditional) + jnp.sum(cotangent * spread)

    close(*at_once(jax.grad(losses, (0, 1)), x, x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch_norm", "batch_renorm"])
@pytest.mark.parametrize("shape", [(B, C), (B, H, C), (1, H, C), (B, 1, 1, C)], ids=str)
def test_ghosts_take_the_leaves_of_their_own_examples(rng, name, shape):
    _, batch_stats = state(name, rng)
    mask = jnp.asarray(rng.random((B, H, W, 1)) < 0.7)
    x = draw(rng, SHAPE)
    leaves = {"scale": draw(rng, shape, 1.0), "bias": draw(rng, shape)}
    ways = [{"virtual_batch_size": 2}, {"virtual_batch_size": 2, "mask": mask}]

    def with_each(leaves, x):
        return [
            [apply(name, given, batch_stats, x, **settings) for given in (leaves, {})]
            for settings in ways
        ]

    outcomes = at_once(with_each, leaves, x)
    for settings, ((y, new), (_, unconditional)) in zip(ways, outcomes, strict=True):
        plain = normalized(name, {}, batch_stats, x, True, **settings)
        close(y, family.affine(leaves, plain, -1))
        assert_trees_close(new, unconditional, rtol=4 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm"]
)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_hidden_garbage_becomes_the_bias_of_its_example(rng, name, train):
    params, batch_stats = state(name, rng)
    x = draw(rng, SHAPE).at[2, 1].set(jnp.nan).at[0, 0, 1].set(jnp.inf)
    mask = jnp.isfinite(x)
    leaves = {"scale": draw(rng, (B, C), 1.0), "bias": draw(rng, (B, C))}

    def loss(leaves, x):
        y, _ = apply(name, params | leaves, batch_stats, x, train, mask=mask)
        return jnp.sum(jnp.where(mask, y, 0) ** 2), y

    gradients, y = at_once(jax.grad(loss, (0, 1), has_aux=True), leaves, x)
    close(y, family.affine(leaves, normalized(name, params, batch_stats, x, train, mask=mask), -1))
    hidden = ~np.asarray(mask)
    spread = np.broadcast_to(np.asarray(leaves["bias"])[:, None, None], SHAPE)
    assert_close(y[hidden], spread[hidden], rtol=4 * EPS, atol=4 * EPS)
    assert_finite(gradients)


@every_layer
def test_narrow_x_and_wide_leaves(rng, name):
    params, batch_stats = state(name, rng)
    x = draw(rng, SHAPE).astype(jnp.bfloat16)
    leaves = {"scale": draw(rng, (B, C), 1.0), "bias": draw(rng, (B, C))}
    y, _ = apply(name, params | leaves, batch_stats, x)
    expected = family.affine(leaves, normalized(name, params, batch_stats, np.asarray(x), True), -1)
    bfloat16 = float(jnp.finfo(jnp.bfloat16).eps)
    assert_close(
        y, expected, rtol=bfloat16, atol=64 * EPS * np.abs(expected).max(), dtype=jnp.bfloat16
    )


@pytest.mark.slow
def test_conditional_batch_norm_looks_its_leaves_up(rng):
    """Dumoulin et al. 2017, de Vries et al. 2017: a scale and bias per class, shared statistics."""
    labels, tables = (
        jnp.array([2, 0, 2, 4]),
        {"scale": draw(rng, (5, C), 1.0), "bias": draw(rng, (5, C))},
    )
    _, batch_stats = state("batch_norm", rng)
    x, cotangent = draw(rng, SHAPE), draw(rng, SHAPE)

    def loss(tables):
        y, new = nj.batch_norm(
            jax.tree.map(lambda table: table[labels], tables), batch_stats, x, True
        )
        return jnp.sum(cotangent * y), (y, new)

    grads, (y, new) = jax.jit(jax.grad(loss, has_aux=True))(tables)
    _, unconditional = nj.batch_norm({}, batch_stats, x, True)
    assert_trees_close(new, unconditional, rtol=4 * EPS)
    plain = reference.batch_norm({}, batch_stats, x, True)[0]
    for label in range(5):
        own = np.asarray(labels) == label
        params = {leaf: table[label] for leaf, table in tables.items()}
        close(y[own], family.affine(params, plain[own], -1)) if own.any() else None
        weights = np.float64(cotangent)[own]
        assert_close(
            grads["bias"][label], weights.sum((0, 1, 2)), atol=64 * EPS * np.abs(weights).sum()
        )
        expected = (weights * plain[own]).sum((0, 1, 2))
        assert_close(
            grads["scale"][label], expected, atol=64 * EPS * np.abs(weights * plain[own]).sum()
        )


@pytest.mark.slow
def test_adaptive_layer_norm_and_film(rng):
    """Perez et al. 2018, eq. 2; Peebles & Xie 2023: gamma, beta per example; 1 + gamma scales."""
    tokens, gamma, beta = draw(rng, (2, 5, 6), 1.0), draw(rng, (2, 6)), draw(rng, (2, 6))
    y, _ = nj.layer_norm({"scale": 1 + gamma, "bias": beta}, {}, tokens, True)
    x = np.float64(tokens)
    standardized = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    close(y, standardized * (1 + np.float64(gamma)[:, None]) + np.float64(beta)[:, None])
    y, _ = nj.rms_norm({"scale": gamma}, {}, tokens, True, scale_offset=1.0)
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    close(y, x / rms * (1 + np.float64(gamma)[:, None]))


@pytest.mark.slow
def test_adaptive_instance_norm_transfers_mean_and_deviation(rng):
    """Huang & Belongie 2017, eq. 8: sigma(style) * (x - mu(x)) / sigma(x) + mu(style)."""
    content, style = draw(rng, (2, 8, 7, C), 2.0), 3 * draw(rng, (2, 5, 6, C), -1.0)
    _, mean, var = nj.moments(style, (1, 2))
    y, _ = nj.instance_norm(
        {"scale": jnp.sqrt(var), "bias": mean}, {}, content, True, epsilon=1e-10
    )
    x, s = np.float64(content), np.float64(style)
    over = {"axis": (1, 2), "keepdims": True}
    close(y, s.std(**over) * (x - x.mean(**over)) / x.std(**over) + s.mean(**over))
    assert_close(np.float64(y).mean((1, 2)), s.mean((1, 2)), atol=64 * EPS)
    assert_close(np.float64(y).std((1, 2)), s.std((1, 2)), rtol=64 * EPS)


UNFIT = [
    (),
    (1,),
    (B, 1),
    (B + 1, C),
    (H, C),
    (B, W, C),
    (B, 1, H, C),
    (B, H, W, C + 1),
    (1, B, H, W, C),
    (B, H, W, C, 1),
]


@every_layer
@pytest.mark.parametrize("leaf", ["scale", "bias"])
@pytest.mark.parametrize("shape", UNFIT, ids=str)
def test_leaves_that_do_not_fit_are_refused(rng, name, leaf, shape):
    params, batch_stats = state(name, rng)
    for train in (True, False):
        with pytest.raises(ValueError) as refused:
            params = params | {leaf: jnp.ones(shape)}
            jax.eval_shape(
                lambda x, p=params, t=train: apply(name, p, batch_stats, x, t), jnp.ones(SHAPE)
            )
        message = str(refused.value)
        assert re.fullmatch(name + r": .*\. Expected .*; got .*\. .*\.", message, re.DOTALL), (
            message
        )
        assert f"params['{leaf}']" in message and str(shape) in message and f"({C},)" in message, (
            message
        )
