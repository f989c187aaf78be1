"""Every layer is exported once for all batch sizes, with a symbolic batch and height."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

import normjax as nj
from tests.compare import assert_trees_close, at_once
from tests.contract.cases import CASES, REORDERED
from tests.contract.layers import SHAPE

# Of a scaled kernel 1 / sqrt(fan_in) is a constant.
EXPORTED = [case for case in CASES if not case.settings.get("scaled")]
# The mode and the height: each with each, where there are statistics; else each once, by turns.
ALL_WAYS = [(True, "h"), (False, "3"), (True, "3"), (False, "h")]


def ways(case):
    if case.layer.has_statistics:
        return ALL_WAYS[:3]
    return ALL_WAYS[:2] if CASES.index(case) % 2 else ALL_WAYS[2:]


def exported(function, shape, x, mask):
    """The exported program of a function of x and a mask of this symbolic shape."""
    arguments = jax.ShapeDtypeStruct(shape, x.dtype), None
    if mask is not None:
        arguments = arguments[0], jax.ShapeDtypeStruct(shape, mask.dtype)
    return export.export(jax.jit(function))(*arguments)


@cache
def step(case, train):
    """y, new statistics, and the gradient of x."""
    params, batch_stats, _ = case.arguments(np.random.default_rng(0))

    def run(x, mask):
        settings = {} if mask is None else {"mask": mask}

        def loss(x):
            y, new = case.apply(train, **settings)(params, batch_stats, x)
            return jnp.sum(jnp.tanh(y if mask is None else jnp.where(mask, y, 0))), (y, new)

        return jax.grad(loss, has_aux=True)(x)

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "train", "height"),
    [
        pytest.param(case, *way, id="-".join(map(str, (case, *way))))
        for case in EXPORTED
        for way in ways(case)
    ],
)
def test_one_program_for_all_sizes(case, train, height, rng):
    _, _, x = case.arguments(rng)
    mask = jnp.asarray(case.mask()) if case.masked else None
    batch = "3*b" if "virtual_batch_size" in case.settings else "b"
    shape = export.symbolic_shape(f"{batch}, {height}, {SHAPE[-1]}")
    program = exported(step(case, train), shape, x, mask)
    for size in (6, 3) if (train, height) == ways(case)[0] else (3,):
        given = x[:size], mask if mask is None else mask[:size]
        assert_trees_close(program.call(*given), at_once(step(case, train), *given), **REORDERED)


SETTINGS = {
    "BatchNorm": {"use_running_average": False},
    "BatchRenorm": {"use_running_average": False},
    "GroupNorm": {"num_groups": 2},
}
WRAPPERS = ("SpectralNorm", "WeightNorm", "WeightStandardization")
ADAPTERS = [name for name in nj.linen.__all__ if name not in WRAPPERS]


@pytest.mark.slow
@pytest.mark.usefixtures("promotion_as_in_flax")
@pytest.mark.parametrize("name", ADAPTERS)
def test_flax_modules_in_training(name, rng):
    x = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    layer = getattr(nj.linen, name)(**SETTINGS.get(name, {}))
    variables = layer.init(jax.random.key(0), x)
    apply = partial(layer.apply, variables, mutable=["batch_stats"])
    module = getattr(nj.nnx, name)(SHAPE[-1], **SETTINGS.get(name, {}), rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    shape = export.symbolic_shape(f"b, h, {SHAPE[-1]}")
    for run in (apply, lambda x: nnx.merge(graph, state, copy=True)(x)):
        program = exported(lambda x, mask, run=run: run(x), shape, x, None)
        assert_trees_close(program.call(x, None), at_once(run, x), **REORDERED)


@pytest.mark.parametrize("running_var", ["biased", "unbiased"])
def test_what_is_known_of_a_size_only_when_it_runs(running_var):
    """Of one value there is no unbiased variance."""
    params, batch_stats = nj.batch_norm_init(2)
    layer = partial(nj.batch_norm, params, batch_stats, train=True, running_var=running_var)
    program = exported(lambda x, mask: layer(x=x), export.symbolic_shape("b, 2"), jnp.ones(2), None)
    _, new = program.call(jnp.full((1, 2), 7.0), None)
    kept = 1.0 if running_var == "unbiased" else 0.99
    assert_trees_close(new, {"mean": jnp.full(2, 0.07), "var": jnp.full(2, kept)}, rtol=1e-6)
    assert np.isfinite(program.call(jnp.ones((5, 2)), None)[0]).all()


def test_a_scaled_kernel_of_symbolic_size_is_refused():
    def scaled(x, mask):
        return nj.weights.weight_standardization({}, {}, x, True, scaled=True)[0]

    with pytest.raises(ValueError, match="the kernel has a symbolic size.*scaled=True"):
        exported(scaled, export.symbolic_shape("a, 4"), jnp.ones(2), None)
