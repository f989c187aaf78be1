"""How calls and equations are counted."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import normjax as nj
from benchmarks.harness import tracing


def helper(x):
    return jnp.sum(x)


def layer(x):
    y = helper(x)
    return helper(y + 1)


def test_calls_of_the_own_files_are_noted_in_order():
    walk = tracing.watched(pathlib.Path(__file__), lambda: layer(jnp.ones(3)))
    names = [code.co_name for code in walk.own]
    assert names == ["<lambda>", "layer", "helper", "helper"]
    assert walk.before_first_sum == 3
    assert walk.around == 0


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], 0),
        (["layers/batch_norm.py", "statistics/moments.py", "_checks.py"], 0),
        (["layers/batch_norm.py", "statistics/moments.py", "_checks.py", "layers/_affine.py"], 1),
        (["statistics/moments.py", "layers/a.py", "nnx/a.py", "statistics/a.py", "nnx/a.py"], 3),
    ],
)
def test_a_climb_is_a_step_to_a_higher_level(files, expected):
    assert tracing.climbs(tracing.NORMJAX / file for file in files) == expected


def test_equations_are_counted_with_those_inside_and_alone():
    def function(x):
        return jax.lax.cond(x > 0, lambda x: jnp.sin(x) + 1, jnp.negative, x)

    # the comparison, the conversion of its result, and cond; two in one branch, one in the other
    assert tracing.equations(tracing.traced(function, 1.0).jaxpr) == (6, 3)


@pytest.mark.slow
def test_with_empty_caches_a_second_trace_calls_as_much_as_the_first():
    params, batch_stats = nj.batch_norm_init(3)

    def function(x):
        return nj.batch_norm(params, batch_stats, x, train=True)

    walks = []
    for _ in range(2):
        tracing.empty_caches()
        run = lambda: tracing.traced(function, jnp.ones((4, 3)))  # noqa: E731
        walks.append(tracing.watched(tracing.NORMJAX, run))
    assert walks[0].own == walks[1].own != []
