"""Under the policy a network stores linear layers and statistics, with equal results and sends."""

from collections import Counter
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import normjax as nj
from tests.compare import assert_trees_close
from tests.distributed.mapped import DEVICES, SPLIT, WHOLE, assert_steps_close, collectives, mesh
from tests.xla import AS_FOR_USERS

WIDTH = 8


class Block(nn.Module):
    """A residual block of two convolutions, between a stem and a head."""

    @nn.compact
    def __call__(self, x):
        norm = partial(nj.linen.BatchNorm, use_running_average=False)
        x = nn.relu(norm()(nn.Conv(WIDTH, (3, 3), use_bias=False)(x)))
        y = nn.relu(norm()(nn.Conv(WIDTH, (3, 3), use_bias=False)(x)))
        x = nn.relu(x + norm()(nn.Conv(WIDTH, (3, 3), use_bias=False)(y)))
        return nn.Dense(2)(x.mean((1, 2)))


class Transformer(nn.Module):
    """Two pre-norm blocks of attention and a feed-forward network."""

    norm: type

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(2)(self.norm()(x))
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(self.norm()(x))))
        return self.norm()(x)


def applied(model, variables):
    def network(params, x):
        return model.apply(variables | {"params": params}, x, mutable=["batch_stats"])

    return network


def kept(network, *given):
    """How many arrays of which shape the backward pass is given."""
    _, backward = jax.eval_shape(partial(jax.vjp, network), *given)
    return Counter(leaf.shape for leaf in jax.tree.leaves(backward))


def gradients(network, *given):
    def loss(*given):
        y, new = network(*given)
        return jnp.sum(jnp.sin(y)), new

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*given)


def lean(network, **settings):
    return jax.checkpoint(network, policy=nj.remat_policy(**settings))


@pytest.mark.slow
def test_a_convolutional_network_keeps_the_inputs_of_its_normalizations(rng):
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 3)), jnp.float32)
    variables = Block().init(jax.random.key(0), x)
    network, wide = applied(Block(), variables), (4, 6, 6, WIDTH)
    given = variables["params"], x
    assert kept(network, *given)[wide] > 3
    assert kept(lean(network), *given)[wide] == 3
    assert kept(lean(network, recompute=lambda x: x.shape == wide), *given)[wide] == 0
    assert_trees_close(
        gradients(lean(network), *given), gradients(network, *given), rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "norm", [nj.linen.LayerNorm, nj.linen.RMSNorm, partial(nj.linen.GroupNorm, num_groups=2)]
)
def test_a_transformer_keeps_the_inputs_of_its_normalizations_and_of_its_linear_layers(rng, norm):
    x = jnp.asarray(rng.normal(size=(3, 5, WIDTH)), jnp.float32)
    model = Transformer(norm)
    params = model.init(jax.random.key(0), x)["params"]
    network = applied(model, {})
    found = kept(lean(network), params, x)
    # x, the stream before each of 5 normalizations but the first, which is x; with biases what is
    # kept of a linear layer is its output before they are added.
    assert found[x.shape] == 5, found
    assert found[(3, 5, 4 * WIDTH)] == 2, found
    assert found[(3, 2, 5, 5)] == 0, found
    assert_trees_close(
        gradients(lean(network), params, x), gradients(network, params, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_linen_and_nnx_take_it(rng):
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 3)), jnp.float32)
    variables = Block().init(jax.random.key(0), x)
    plain, lifted = (
        applied(Block(), variables),
        applied(nn.remat(Block, policy=nj.remat_policy())(), variables),
    )
    assert kept(lifted, variables["params"], x)[(4, 6, 6, WIDTH)] == 3
    assert_trees_close(
        gradients(lifted, variables["params"], x),
        gradients(plain, variables["params"], x),
        rtol=1e-5,
        atol=1e-6,
    )

    def run(wrap):
        model = nnx.Sequential(
            nnx.Linear(3, WIDTH, use_bias=False, rngs=nnx.Rngs(0)),
            nj.nnx.BatchNorm(WIDTH, rngs=nnx.Rngs(0)),
        )
        loss = wrap(lambda model, x: jnp.sum(nnx.relu(model(x)) ** 2))
        return nnx.value_and_grad(loss)(model, x), nnx.state(model, nnx.BatchStat)

    remat = partial(nnx.remat, policy=nj.remat_policy())
    assert_steps_close(*(run(wrap) for wrap in (remat, lambda f: f)))


@pytest.mark.slow
def test_the_output_of_activated_batch_norm_is_kept_in_place_of_its_input(rng):
    params, batch_stats = nj.activated_batch_norm_init(WIDTH)

    def network(kernels, x):
        z, new = nj.activated_batch_norm(params, batch_stats, x @ kernels[0], True)
        return z @ kernels[1], new

    kernels = jnp.asarray(rng.normal(size=(3, WIDTH)), jnp.float32), jnp.ones((WIDTH, 2))
    given = kernels, jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
    _, backward, _ = jax.vjp(lean(network), *given, has_aux=True)
    z = nj.activated_batch_norm(params, batch_stats, given[1] @ kernels[0], True)[0]
    for array in (leaf for leaf in jax.tree.leaves(backward) if leaf.shape == z.shape):
        assert_trees_close(array, z, rtol=1e-6, atol=1e-6)
    assert_trees_close(
        gradients(lean(network), *given), gradients(network, *given), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("check_vma", [True, False])
def test_statistics_are_shared_once_each_way(check_vma):
    params, batch_stats = nj.batch_norm_init(WIDTH)

    def network(kernel, x):
        return jax.nn.relu(
            nj.batch_norm(params, batch_stats, x @ kernel, True, axis_name="data")[0]
        )

    def step(wrap, kernel, x):
        return jax.grad(lambda x: jnp.sum(wrap(network)(kernel, x) ** 2))(x)

    def sent(wrap):
        mapped = jax.shard_map(
            partial(step, wrap),
            mesh=mesh(data=DEVICES),
            in_specs=(WHOLE, SPLIT),
            out_specs=SPLIT,
            check_vma=check_vma,
        )
        return collectives(
            jax.jit(mapped).lower(jnp.ones((3, WIDTH)), jnp.ones((16, 3))).compile(AS_FOR_USERS)
        )

    assert sent(lean) == sent(lambda network: network)


def test_what_is_no_function_is_refused():
    with pytest.raises(
        TypeError, match=r"remat_policy: recompute .*Expected .*; got recompute=112\. Pass"
    ):
        nj.remat_policy(recompute=112)
