"""Every layer of the family against float64 for random ranks, axes, masks, dtypes and leaves."""

from functools import partial
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import normjax as nj
from tests import reference
from tests import reference_family as family
from tests.compare import assert_close, assert_same_kind, widest
from tests.layers.cases import DTYPES, ROUNDINGS, cases, draw_normal

CENTERED = ("layer_norm", "group_norm", "instance_norm")
OVER_SPACE = ("instance_norm", "filter_response_norm", "global_response_norm")
LAYERS = (*CENTERED, "rms_norm", *OVER_SPACE[1:], "local_response_norm", "dynamic_tanh")


class Case(NamedTuple):
    name: str
    params: dict[str, Any]
    x: Any
    train: bool
    settings: dict[str, Any]


def signed(draw, axes, rank):
    """The axes in any order, each counted from either end."""
    axes = draw(st.permutations(axes))
    return tuple(axis - draw(st.sampled_from((0, rank))) for axis in axes)


def some_of(draw, axes, least=0):
    return draw(st.lists(st.sampled_from(axes), unique=True, min_size=least)) if axes else []


def draw_axes(draw, name, shape):
    """Settings for the axes that the layer takes; sizes of `shape` may change to suit them."""
    rank = len(shape)
    if name in ("layer_norm", "rms_norm"):
        reduced, features = (some_of(draw, range(rank), 1) for _ in range(2))
        return {
            "reduction_axes": signed(draw, reduced, rank),
            "feature_axes": signed(draw, features, rank),
        }
    if name in OVER_SPACE:
        features = some_of(draw, range(1, rank), 1)
        space = [axis for axis in range(1, rank) if axis not in features]
        reduced = draw(st.sampled_from((None, signed(draw, some_of(draw, space), rank))))
        return {"reduction_axes": reduced, "feature_axes": signed(draw, features, rank)}
    if name == "dynamic_tanh":
        return {"feature_axes": signed(draw, some_of(draw, range(rank), 1), rank)}
    feature = draw(st.integers(name == "group_norm", rank - 1))
    settings = {"feature_axes": feature - draw(st.sampled_from((0, rank)))}
    if name == "group_norm":
        groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        shape[feature] = groups * size
        settings |= draw(st.sampled_from(({"num_groups": groups}, {"group_size": size})))
        if draw(st.booleans()):
            more = some_of(draw, [axis for axis in range(rank) if axis != feature])
            settings["reduction_axes"] = signed(draw, [feature, *more], rank)
    return settings


def per_statistic(name, shape, settings):
    """How many values a statistic is over."""
    axes = settings.get("reduction_axes")
    if axes is None:
        axes = family.space(len(shape), settings["feature_axes"] if name == "instance_norm" else 0)
    values = int(np.prod([shape[axis] for axis in axes]))
    if name == "group_norm":
        channels = shape[settings["feature_axes"]]
        values = (
            values
            * settings.get("group_size", channels // settings.get("num_groups", channels))
            // channels
        )
    return values


def draw_leaf(draw, rng, shape, feature_axes, dtype, mean=0.0):
    """A leaf of the features' shape, with leading dimensions of size 1 or of their axes."""
    features = [shape[axis] for axis in family.axes_of(feature_axes, len(shape))]
    others = [
        draw(st.sampled_from((1, shape[axis]))) for axis in family.others(feature_axes, len(shape))
    ]
    leading = others[: draw(st.sampled_from((0, 0, 1, len(others))))]
    return draw_normal(rng, (*leading, *features), dtype, mean)


@st.composite
def family_cases(draw, name):
    dtype = jnp.dtype(draw(st.sampled_from(DTYPES)))
    wide = np.result_type(np.float32, dtype if dtype.itemsize > 2 else np.float32)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rank = draw(st.integers(2 if name in ("group_norm", *OVER_SPACE) else 1, 5))
    shape = [draw(st.integers(1, 4)) for _ in range(rank)]
    settings = draw_axes(draw, name, shape)
    leaves = draw(st.sets(st.sampled_from(("scale", "bias"))))
    params = {
        leaf: draw_leaf(draw, rng, shape, settings["feature_axes"], wide, 1.0)
        for leaf in sorted(leaves)
    }
    x = draw_normal(
        rng, shape, dtype, draw(st.sampled_from((0.0, 3.0))), draw(st.sampled_from((0.1, 1.0)))
    )
    train = draw(st.booleans()) and (
        name not in CENTERED or per_statistic(name, shape, settings) > 1
    )
    if name == "dynamic_tanh":
        params["alpha"] = draw_normal(rng, (), np.finfo(wide).dtype, 0.5)
    elif name == "local_response_norm":
        numbers = {
            "alpha": (0.0, 1e-4, 1.0),
            "beta": (0.0, 0.5, 0.75),
            "k": (0.5, 1.0, 2.0),
            "size": (1, 2, 3, 5, 8),
        }
        settings |= {
            argument: draw(st.sampled_from(values)) for argument, values in numbers.items()
        }
    else:
        settings["epsilon"] = draw(st.sampled_from((1e-5, 1e-3, 0.5)))
        settings["mask"] = draw_mask(draw, rng, x)
    if name in ("rms_norm", "layer_norm"):
        settings["scale_offset"] = draw(st.sampled_from((0.0, 1.0)))
    if name == "filter_response_norm":
        real = np.finfo(wide).dtype
        features = tuple(shape[axis] for axis in family.axes_of(settings["feature_axes"], rank))
        extra = draw(st.sets(st.sampled_from(("threshold", "epsilon"))))
        params |= {leaf: rng.normal(size=features).astype(real) for leaf in sorted(extra)}
        if wide.kind == "c":
            params.pop("threshold", None)
    return Case(name, params, x, train, settings)


def draw_mask(draw, rng, x):
    """None, or a mask of any shape that broadcasts; masked values may then be NaN or infinite."""
    if draw(st.booleans()):
        return None
    sizes = [draw(st.sampled_from((1, size))) for size in x.shape][draw(st.integers(0, x.ndim)) :]
    mask = rng.random(sizes) < draw(st.sampled_from((0.3, 0.8)))
    garbage = draw(st.sampled_from((None, np.nan, np.inf)))
    if garbage is not None:
        x[~np.broadcast_to(mask, x.shape) & (rng.random(x.shape) < 0.5)] = garbage
    return mask


def roundings_of(case, expected):
    """The largest (|x| + |mean|) * scale / standard deviation, and the largest |y|."""
    largest = np.abs(expected).max()
    if case.name in CENTERED:
        mask, settings = case.settings["mask"], dict(case.settings)
        epsilon = settings.pop("epsilon")
        if case.name == "group_norm":
            mean, var = family.group_moments(case.x, **settings)
        else:
            axes = settings["reduction_axes"]
            axes = family.space(case.x.ndim, settings["feature_axes"]) if axes is None else axes
            mean, var = family.moments(case.x, axes, mask)
        gain = np.abs(widest(case.params.get("scale", 1.0))).max() / np.sqrt(var + epsilon)
        largest += (gain * (np.abs(family.cleaned(case.x, mask)) + np.abs(mean))).max()
    # A sum of scale * y and bias rounds both, whatever is left of them.
    return largest + np.abs(widest(case.params.get("bias", 0.0))).max()


def check(on_platform, case):
    settings = {argument: value for argument, value in case.settings.items() if argument != "mask"}

    def run(params, x, mask):
        masked = {"mask": mask} if "mask" in case.settings else {}
        return getattr(nj, case.name)(params, {}, x, case.train, **settings, **masked)

    y, batch_stats = on_platform(run, case.params, case.x, case.settings.get("mask"))
    assert batch_stats == {}
    expected = getattr(family, case.name)(case.params, case.x, **case.settings)
    narrow = jnp.dtype(case.x.dtype).itemsize == 2
    eps = float(jnp.finfo(jnp.float32 if narrow else case.x.dtype).eps)
    output = float(jnp.finfo(case.x.dtype).eps) if narrow else 0.0
    assert_close(
        y,
        expected,
        rtol=output,
        atol=ROUNDINGS * eps * roundings_of(case, expected),
        dtype=case.x.dtype,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
def test_it_computes_the_formula_for_any_arguments(on_platform, data, name):
    case = data.draw(family_cases(name))
    with jax.enable_x64(case.x.dtype == np.float64):
        check(on_platform, case)


@pytest.mark.parametrize("name", LAYERS)
def test_it_computes_the_formula_with_its_defaults_in_any_dtype(on_platform, rng, name):
    check_defaults(on_platform, rng, name, [dtype for dtype in DTYPES if dtype != jnp.float64])
    with jax.enable_x64(True):
        check_defaults(on_platform, rng, name, [jnp.float64])


def check_defaults(on_platform, rng, name, dtypes):
    channels = 64 if name == "group_norm" else 6
    cases = [default_case(rng, name, channels, dtype) for dtype in dtypes]

    def run(operands):
        return [getattr(nj, name)(params, {}, x, True)[0] for params, x in operands]

    outcomes = on_platform(run, [(case.params, case.x) for case in cases])
    numbers = {"mask": None, "epsilon": 1e-6 if name == "filter_response_norm" else 1e-5}
    settings = {
        "reduction_axes": -1 if name == "layer_norm" else None,
        "feature_axes": -1,
    } | numbers
    for y, case, dtype in zip(outcomes, cases, dtypes, strict=True):
        expected = getattr(family, name)(case.params, case.x)
        rounded = roundings_of(case._replace(settings=settings), expected)
        narrow = jnp.dtype(dtype).itemsize == 2
        eps = float(jnp.finfo(jnp.float32 if narrow else dtype).eps)
        output = float(jnp.finfo(dtype).eps) if narrow else 0.0
        assert_close(y, expected, rtol=output, atol=ROUNDINGS * eps * rounded, dtype=dtype)


def default_case(rng, name, channels, dtype):
    x = draw_normal(rng, (3, 2, 4, channels), dtype, 1.0)
    wide = jnp.dtype(dtype) if jnp.dtype(dtype).itemsize > 2 else jnp.dtype(jnp.float32)
    params, _ = getattr(nj, f"{name}_init")(channels, param_dtype=wide)
    if wide.kind == "c":
        params.pop("threshold", None)
    return Case(name, jax.tree.map(np.asarray, params), x, True, {})


@pytest.mark.slow
@hypothesis.settings(max_examples=6)
@hypothesis.given(data=st.data())
def test_batch_renorm_computes_the_formula_for_any_arguments(on_platform, data):
    dtype = data.draw(st.sampled_from([dtype for dtype in DTYPES if dtype != jnp.complex64]))
    params, batch_stats, x, train, settings = data.draw(cases(dtype))
    limits = {
        "r_max": data.draw(st.sampled_from((1.0, 1.5, 3.0))),
        "d_max": data.draw(st.sampled_from((0.0, 0.5, 5.0))),
    }
    settings |= limits
    with jax.enable_x64(dtype == jnp.float64):
        layer = partial(nj.batch_renorm, train=train, **settings)
        y, new = on_platform(layer, params, batch_stats, x)
        assert_same_kind(new, jax.tree.map(jnp.asarray, batch_stats))
    expected, expected_new = family.batch_renorm(params, batch_stats, x, train, **settings)
    of_x = {name: settings[name] for name in ("feature_axes", "mask", "virtual_batch_size")}
    applied = [reference.applied_statistics(batch_stats, x, t, **of_x) for t in (train, False)]
    size = np.abs(widest(x)).max() + max(np.abs(mean).max() for mean, _ in applied)
    gain = (
        max((1 / np.sqrt(var + settings["epsilon"])).max() for _, var in applied) * limits["r_max"]
    )
    scale = np.abs(widest(params.get("scale", 1.0))).max()
    eps, narrow = float(jnp.finfo(batch_stats["mean"].dtype).eps), jnp.dtype(dtype).itemsize == 2
    output = float(jnp.finfo(dtype).eps) if narrow else 0.0
    rounded = scale * (gain * size + limits["d_max"]) + np.abs(expected).max()
    assert_close(y, expected, rtol=output, atol=ROUNDINGS * eps * rounded, dtype=dtype)
    # The statistics are those of batch_norm, whose tests say what rounding they are allowed.
    assert_close(new["mean"], expected_new["mean"], rtol=4 * eps, atol=ROUNDINGS * eps * size)
    largest = max(var.max() for _, var in applied) + settings["epsilon"]
    assert_close(
        new["var"], expected_new["var"], rtol=ROUNDINGS * eps, atol=2 * ROUNDINGS * eps * largest
    )
    assert new["count"] == expected_new["count"]
