"""What is wrong with a network, before it is trained."""
from __future__ import annotations
from typing import NamedTuple
import jax
from normjax.diagnostics._findings import Finding
from normjax.diagnostics._lint import biases, decay, rules
from normjax.diagnostics._lint.model import open_model
from normjax.diagnostics._lint.network import Network

def lint(apply_fn, variables, x, *, optimizer=None, steps=None, axis_name=None, axis_size=None):
    model = open_model(apply_fn, variables)
    names = () if axis_name is None else axis_name if isinstance(axis_name, (tuple, list)) else (axis_name,)
    size = axis_size or jax.device_count()
    network = Network(model, x, {name: size for name in names})
    found = [*biases.cancelled_biases(network)]
    if optimizer is not None:
        found += decay.decayed_scales(network, optimizer, model.variables["params"])
    found += rules.dropout_before(network)
    found += rules.few_values(network)
    if steps is not None:
        found += rules.slow_momentum(network, steps)
    found += rules.unsynced(network)
    found += rules.residual_scale(network)
    return tuple(found)
