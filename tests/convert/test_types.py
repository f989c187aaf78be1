"""The annotations of the converters are true: checked at run time, over typical calls."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import normjax as nj
from tests.test_types import typed

TRAINED = {"weight": np.ones(2), "running_mean": np.ones(2), "running_var": np.ones(2)}


def test_torch():
    module = torch.nn.BatchNorm1d(2)
    like = nj.batch_norm_init(2, count=True)
    for source in (module, module.state_dict(), TRAINED):
        params, batch_stats = typed(nj.convert.from_torch)(source)
    typed(nj.convert.from_torch)(module, like=like)
    for target in (None, TRAINED | {"num_batches_tracked": np.array(0)}):
        typed(nj.convert.to_torch)(params, batch_stats, like=target)
    typed(nj.convert.to_torch)(*like, like=module)
    typed(nj.convert.torch_settings)(module)
    conv = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.Flatten(), torch.nn.Linear(8, 1))
    names = {"0": "Conv_0"}
    for settings in ({"flattened": {"2": (2, 2, 2)}}, {"example_input": torch.ones(1, 1, 2, 2)}):
        trees = typed(nj.convert.from_torch)(conv, rename=names, others="refuse", **settings)
    typed(nj.convert.to_torch)(
        *trees, like=conv, rename=names, flattened={"2": None}, others="keep"
    )
    typed(nj.convert.to_torch)(*trees, rename=names)


def test_keras():
    weights = typed(nj.convert.to_keras)(*nj.batch_norm_init(2))
    typed(nj.convert.from_keras)(weights, like=nj.batch_norm_init(2))
    typed(nj.convert.to_keras)(*nj.batch_norm_init(2), like=weights)


@pytest.mark.slow
def test_haiku():
    net = hk.transform_with_state(lambda x: hk.LayerNorm(-1, True, True)(x))
    haiku = net.init(jax.random.key(0), jnp.ones((3, 2)))
    trees = typed(nj.convert.from_haiku)(*haiku)
    typed(nj.convert.to_haiku)(*trees, like=haiku)
    for count in (3, jnp.int32(3)):
        typed(nj.convert.haiku_momentum)(0.9, count)


def test_a_wrong_type_is_noticed():
    with pytest.raises(Exception, match="source"):
        typed(nj.convert.from_torch)([np.ones(3)])
