"""Runs all node tests of the `onnx` package for normalization operators through normjax."""

import collections
import importlib
import pathlib
import warnings
from functools import partial

import jax.numpy as jnp
import onnx
import pytest

import normjax as nj
from tests.compare import assert_close, at_once

# onnx 1.19 and 1.23.2 have this many that we run; a release that has fewer is to be looked at.
OPERATORS = {
    "BatchNormalization": 4,
    "GroupNormalization": 2,
    "InstanceNormalization": 2,
    "LayerNormalization": 19,
    "LpNormalization": 3,
    "LRN": 2,
    "MeanVarianceNormalization": 1,
    "RMSNormalization": 19,
}
P1 = "p=1 divides by a sum of absolute values, and no layer of the family does"
NOT_MAPPED = {f"test_l1normalization_axis_{axis}": P1 for axis in ("0", "1", "last")}
EPS = float(jnp.finfo(jnp.float32).eps)


def find_cases():
    """Returns the tests of a single node; `*_expanded` tests are graphs of primitives."""
    from onnx.backend.test.case import node

    # Modules change names between releases; importing all of them takes seconds, and warns.
    for path in pathlib.Path(node.__file__).parent.glob("*.py"):
        if any(f'"{op}"' in path.read_text(encoding="utf-8") for op in OPERATORS):
            with warnings.catch_warnings():
                # The case of a zero norm computes 0/0 on its way to the expected 0.
                warnings.filterwarnings(
                    "ignore", "invalid value encountered in divide", RuntimeWarning
                )
                importlib.import_module(f"{node.__name__}.{path.stem}")
    nodes = {case.name: case.model.graph.node for case in node._NodeTestCases}
    return {
        case.name: case
        for case in node._NodeTestCases
        if len(nodes[case.name]) == 1 and nodes[case.name][0].op_type in OPERATORS
    }


CASES = find_cases()
RUN = sorted(CASES.keys() - NOT_MAPPED.keys())


def operator(case):
    (node,) = case.model.graph.node
    return node.op_type, {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def batch_normalization(x, scale, bias, mean, var, *, epsilon=1e-5, momentum=0.9, training_mode=0):
    params, batch_stats = {"scale": scale, "bias": bias}, {"mean": mean, "var": var}
    settings = {"feature_axes": 1, "epsilon": epsilon, "momentum": momentum}
    y, new = nj.batch_norm(params, batch_stats, x, bool(training_mode), **settings)
    return (y, new["mean"], new["var"]) if training_mode else (y,)


def group_normalization(x, scale, bias, *, num_groups, epsilon=1e-5):
    params = {"scale": scale, "bias": bias}
    y, _ = nj.group_norm(
        params, {}, x, False, num_groups=num_groups, feature_axes=1, epsilon=epsilon
    )
    return (y,)


def instance_normalization(x, scale, bias, *, epsilon=1e-5):
    return nj.instance_norm(
        {"scale": scale, "bias": bias}, {}, x, False, feature_axes=1, epsilon=epsilon
    )[:1]


def from_axis(x, axis):
    return tuple(range(axis % x.ndim, x.ndim))


def layer_normalization(x, scale, bias, *, axis=-1, epsilon=1e-5):
    axes = from_axis(x, axis)
    params = {"scale": scale, "bias": bias}
    y, _ = nj.layer_norm(
        params, {}, x, False, reduction_axes=axes, feature_axes=axes, epsilon=epsilon
    )
    _, mean, var = nj.moments(x, axes)
    return y, *(jnp.expand_dims(part, axes) for part in (mean, 1 / jnp.sqrt(var + epsilon)))


def rms_normalization(x, scale, *, axis=-1, epsilon=1e-5):
    axes = from_axis(x, axis)
    return nj.rms_norm(
        {"scale": scale}, {}, x, False, reduction_axes=axes, feature_axes=axes, epsilon=epsilon
    )[:1]


def lrn(x, *, size, alpha=1e-4, beta=0.75, bias=1.0):
    return nj.local_response_norm(
        {}, {}, x, False, size=size, alpha=alpha, beta=beta, k=bias, feature_axes=1
    )[:1]


def mean_variance_normalization(x, *, axes=(0, 2, 3)):
    # ONNX adds 1e-9 to the standard deviation; 1e-12 to the variance is as invisible.
    return nj.layer_norm({}, {}, x, False, reduction_axes=axes, feature_axes=1, epsilon=1e-12)[:1]


def lp_normalization(x, *, axis=-1, p=2):
    assert p == 2, P1
    features = tuple(a for a in range(x.ndim) if a != axis % x.ndim)
    return nj.weights.weight_norm({}, {}, x, False, feature_axes=features)[:1]


MAPPING = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "LRN": lrn,
    "MeanVarianceNormalization": mean_variance_normalization,
    "RMSNormalization": rms_normalization,
}


@pytest.mark.parametrize("name", RUN)
def test_a_node_test_of_onnx(name):
    case = CASES[name]
    op, attributes = operator(case)
    for inputs, outputs in case.data_sets:
        actual = at_once(partial(MAPPING[op], **attributes), *inputs)
        assert len(actual) == len(outputs)
        for ours, theirs in zip(actual, outputs, strict=True):
            # ONNX allows 1e-3 and 1e-7, where an alpha of 1e-4 would not show. Their side is NumPy
            # in float32, too, and cancels a digit in variances that are differences of squares.
            assert_close(ours, theirs, rtol=64 * EPS, atol=64 * EPS, dtype=theirs.dtype)


def test_every_operator_is_found_and_none_of_its_tests_got_lost():
    found = collections.Counter(operator(CASES[name])[0] for name in RUN)
    assert found.keys() == MAPPING.keys() == OPERATORS.keys()
    assert all(found[op] >= least for op, least in OPERATORS.items()), found


@pytest.mark.parametrize("name", NOT_MAPPED)
def test_what_is_not_mapped_exists_and_says_why(name):
    assert NOT_MAPPED[name] == P1 and operator(CASES[name])[1]["p"] == 1
