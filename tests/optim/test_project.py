"""Projected updates: against AdamP and SGDP written out in NumPy, and against what they promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from normjax.optim import decay_mask, project_scale_invariant
from tests.compare import assert_close, assert_trees_close
from tests.optim import networks

pytestmark = pytest.mark.usefixtures("promotion_as_in_flax")  # and in optax's Adam

INVARIANT = {
    "first": {"kernel": True},
    "norm": {"scale": False, "bias": False},
    "second": {"kernel": True},
    "head": {"kernel": False, "bias": False},
}


def views(w):
    """Rows that have a direction: the output channels, along the last axis, or the whole kernel."""
    return (lambda a: a.reshape(-1, w.shape[-1]).T), (lambda a: a.reshape(1, -1))


def projected(w, gradient, u, delta, wd_ratio, eps=1e-8):
    """The function `projection` of Algorithms 1 and 2, as the authors' program has it."""
    if w.ndim > 1:
        for view in views(w):
            rows, g, rows_u = view(w), view(gradient), view(u)
            lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(g, axis=1)
            cosine = np.abs((rows * g).sum(1)) / np.maximum(lengths, eps)
            if cosine.max() < delta / np.sqrt(rows.shape[1]):
                unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + eps)
                new = rows_u - unit * (unit * rows_u).sum(1, keepdims=True)
                back = (
                    new.T.reshape(w.shape)
                    if len(rows) == w.shape[-1] and len(rows) > 1
                    else new.reshape(w.shape)
                )
                return back, wd_ratio
    return u, 1.0


def adamp(w, gradients, *, lr, wd, delta, wd_ratio, b1=0.9, b2=0.999, eps=1e-8, nesterov=False):
    """Weights after each gradient, which may depend on the weights."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, 1):
        g = gradient(w)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        ahead = b1 * m + (1 - b1) * g if nesterov else m
        u = ahead / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        u, part = projected(w, g, u, delta, wd_ratio)
        w = w * (1 - lr * wd * part) - lr * u
        yield w


def sgdp(w, gradients, *, lr, wd, delta, wd_ratio, momentum=0.9):
    buf = np.zeros_like(w)
    for gradient in gradients:
        g = gradient(w)
        buf = momentum * buf + g
        u, part = projected(w, g, buf, delta, wd_ratio)
        w = w * (1 - lr * wd * part) - lr * u
        yield w


def channelwise(seed):
    """A gradient that is orthogonal to each output channel."""

    def gradient(w):
        g = np.random.default_rng(seed).standard_normal(w.shape)
        axes = tuple(range(w.ndim - 1))
        return g - w * (g * w).sum(axes, keepdims=True) / (w**2).sum(axes, keepdims=True)

    return gradient


def whole(seed):
    def gradient(w):
        g = np.random.default_rng(seed).standard_normal(w.shape)
        return g - w * (g * w).sum() / (w**2).sum()

    return gradient


def neither(seed):
    return lambda w: np.random.default_rng(seed).standard_normal(w.shape) + 0.5 * w


RULES = {"adamp": (adamp, optax.scale_by_adam()), "sgdp": (sgdp, optax.trace(0.9))}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [channelwise, whole, neither])
@pytest.mark.parametrize("shape", [(4, 3), (2, 2, 3, 5), (6,)])
def test_as_in_the_paper(rule, kind, shape):
    reference, inner = RULES[rule]
    settings = {"delta": 0.1, "wd_ratio": 0.1}
    w = np.random.default_rng(7).standard_normal(shape)
    gradients = [kind(seed) for seed in range(10)]
    with jax.enable_x64(True):
        optimizer = optax.chain(
            project_scale_invariant(inner=inner, weight_decay=0.3, **settings),
            optax.scale_by_learning_rate(0.05),
        )
        params = {"w": jnp.asarray(w)}
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient, expected in zip(
            gradients, reference(w, gradients, lr=0.05, wd=0.3, **settings), strict=True
        ):
            updates, state = update(
                {"w": jnp.asarray(gradient(np.asarray(params["w"])))}, state, params
            )
            params = optax.apply_updates(params, updates)
            # of the paper's eps
            assert_close(params["w"], expected, rtol=1e-6, atol=1e-7, dtype=np.float64)


def test_nesterovs_first_step_is_29_percent_larger_in_the_authors_program():
    """As the docstring and the page say; `optax` corrects the bias as Dozat (2016) does."""
    w, gradient = np.ones(3), np.array([1.0, -2.0, 0.5])
    settings = {"lr": 1.0, "wd": 0.0, "delta": 0.1, "wd_ratio": 0.1}
    theirs = next(adamp(w, [lambda w: gradient], nesterov=True, **settings)) - w
    ours = project_scale_invariant(inner=optax.scale_by_adam(nesterov=True))
    params = {"w": jnp.asarray(w, jnp.float32)}
    updates = {"w": jnp.asarray(gradient, jnp.float32)}
    updates, _ = ours.update(updates, ours.init(params), params)
    assert_close(-theirs / np.asarray(updates["w"]), np.full(3, 1.9 / (0.9 / 1.9 + 1)), rtol=1e-5)
    assert round(1.9 / (0.9 / 1.9 + 1), 2) == 1.29


def test_the_reference_projects_what_it_should():
    """So that the test above compares three different things."""
    w = np.random.default_rng(7).standard_normal((2, 2, 3, 5))
    u = np.random.default_rng(8).standard_normal(w.shape)
    by_channel, by_whole, by_neither = (
        projected(w, kind(0)(w), u, 0.1, 0.1)[0] for kind in (channelwise, whole, neither)
    )
    assert np.abs((by_channel * w).sum((0, 1, 2))).max() < 1e-6
    assert abs((by_whole * w).sum()) < 1e-6 and np.abs((by_whole * w).sum((0, 1, 2))).max() > 0.1
    assert (by_neither == u).all()


@pytest.mark.slow
def test_the_norm_stays_but_for_second_order():
    """Momentum lengthens kernels; projected, ||w'||^2 is ||w||^2 plus the squared step alone."""
    with jax.enable_x64(True):
        params = networks.wide(networks.params())
        plain, projects = (
            optax.chain(optax.trace(0.9), *link, optax.scale_by_learning_rate(0.05))
            for link in ((), (project_scale_invariant(INVARIANT),))
        )
        state = projects.init(params)
        for seed in range(20):
            gradients = jax.grad(networks.loss)(params, *map(jnp.asarray, networks.batch(seed)))
            updates, state = projects.update(gradients, state, params)
            new = optax.apply_updates(params, updates)
            for name in ("first", "second"):
                before, step, after = (
                    jnp.sum(tree[name]["kernel"] ** 2) for tree in (params, updates, new)
                )
                assert_close(after, before + step, rtol=1e-13)
            params = new
        _, ordinary, _ = networks.path(plain, networks.wide(networks.params()), 20)
        for name in ("first", "second"):
            assert jnp.linalg.norm(params[name]["kernel"]) < jnp.linalg.norm(
                ordinary[name]["kernel"]
            )


@pytest.mark.slow
def test_a_link_of_its_own_equals_a_wrapper():
    with jax.enable_x64(True):
        params = networks.wide(networks.params())
        link = optax.chain(
            optax.scale_by_adam(),
            project_scale_invariant(INVARIANT),
            optax.scale_by_learning_rate(0.1),
        )
        wrapper = optax.chain(
            project_scale_invariant(INVARIANT, inner=optax.scale_by_adam()),
            optax.scale_by_learning_rate(0.1),
        )
        assert_trees_close(
            networks.path(link, params, 5)[1], networks.path(wrapper, params, 5)[1], rtol=1e-14
        )


@pytest.mark.slow
def test_decay_of_projected_others_and_excluded_leaves():
    params = {
        "in": {"kernel": jnp.ones((2, 2))},
        "out": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    }
    mask = {"in": True, "out": False}
    optimizer = project_scale_invariant(
        mask, weight_decay=0.5, wd_ratio=0.1, weight_decay_mask=decay_mask
    )
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    assert_close(updates["in"]["kernel"], np.full((2, 2), 0.05), rtol=1e-6)
    assert_close(updates["out"]["kernel"], np.full((2, 2), 0.5), rtol=1e-6)
    assert not updates["out"]["bias"].any()


@pytest.mark.slow
@pytest.mark.parametrize("feature_axes", [(), -1, (0, -1)])
def test_directions_of_features(feature_axes):
    w, u = (
        np.random.default_rng(seed).standard_normal((3, 4, 5)).astype(np.float32) for seed in (0, 1)
    )
    optimizer = project_scale_invariant({"w": True}, feature_axes=feature_axes)
    new = optimizer.update({"w": jnp.asarray(u)}, optimizer.init({"w": w}), {"w": w})[0]["w"]
    axes = {(): (0, 1, 2), -1: (0, 1), (0, -1): (1,)}[feature_axes]
    expected = u - w * (w * u).sum(axes, keepdims=True) / (w * w).sum(axes, keepdims=True)
    assert_close(new, expected, atol=2e-6, dtype=np.float32)


@pytest.mark.slow
def test_bfloat16_is_projected_in_float32():
    """Sums of 4096 products lose most digits in bfloat16, and squares overflow in float16."""
    w = jnp.full((4096, 1), 1.0, jnp.bfloat16)
    u = jnp.where(jnp.arange(4096)[:, None] < 2048, 1.0, 0.0).astype(jnp.bfloat16)
    optimizer = project_scale_invariant({"w": True})
    new = optimizer.update({"w": u}, optimizer.init({"w": w}), {"w": w})[0]["w"]
    assert_close(new, np.where(np.arange(4096)[:, None] < 2048, 0.5, -0.5), dtype=jnp.bfloat16)
    half = {"w": jnp.full((4, 1), 3e4, jnp.float16)}
    new = optimizer.update(half, optimizer.init(half), half)[0]["w"]
    assert_close(new, np.zeros((4, 1)), atol=32, dtype=jnp.float16)


@pytest.mark.slow
def test_zeros_have_no_direction():
    params, updates = {"w": jnp.zeros((3, 2))}, {"w": jnp.ones((3, 2))}
    for mask in ({"w": True}, None):
        optimizer = project_scale_invariant(mask)
        assert_close(
            optimizer.update(updates, optimizer.init(params), params)[0]["w"], updates["w"]
        )


MATRIX = {"w": jnp.ones((3, 2))}


@pytest.mark.parametrize(
    ("mask", "updates", "params", "message"),
    [
        ({"w": True}, MATRIX, None, "params are missing.*got params=None"),
        (
            {"w": True},
            {"v": jnp.ones((3, 2))},
            MATRIX,
            r"do not have the same leaves.*updates\['v'\], which params lacks",
        ),
        (
            {"w": True},
            {"w": jnp.ones((2, 2))},
            MATRIX,
            r"differ in shape.*\(3, 2\).*params\['w'\] has; got shape \(2, 2\)",
        ),
        (
            {"v": True},
            MATRIX,
            MATRIX,
            r"mask does not fit.*nothing for params\['w'\] of shape \(3, 2\)",
        ),
        ({"w": "yes"}, MATRIX, MATRIX, r"mask has leaves that are not bools.*mask\['w'\]='yes'"),
    ],
)
def test_bad_input_is_refused(mask, updates, params, message):
    optimizer = project_scale_invariant(mask)
    with pytest.raises((ValueError, TypeError), match=f"project_scale_invariant: .*{message}"):
        optimizer.update(updates, optimizer.init(MATRIX), params)


def test_feature_axes_that_a_kernel_lacks_are_refused_by_its_path():
    optimizer = project_scale_invariant({"w": True}, feature_axes=3)
    with pytest.raises(
        ValueError, match=r"project_scale_invariant at params\['w'\]: axis 3 .* out of range"
    ):
        optimizer.update(MATRIX, optimizer.init(MATRIX), MATRIX)
