"""Records the inputs of the layers of a Flax model.

Flax's own `capture_intermediates` and `nnx.capture` record what layers return, which is not the
input of the next layer if a function such as `jnp.tanh` is between them. So linen modules are
watched with `nn.intercept_methods`; nnx has no such hook.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array

from normjax import _checks
from normjax._trees import is_nnx


def layer_inputs(
    model: Callable[..., Any], *args: Any, **kwargs: Any
) -> tuple[Any, dict[str, Array]]:
    """Calls a Flax model, and returns its outputs and the inputs of its layers.

    It works for linen and nnx, and also when it is called inside `jax.jit` and `jax.grad`: the
    inputs are arrays like the outputs. A model of pure functions does not need it, since the model
    can return its layers' inputs itself.

    If the model has layers inside `jax.jit`, `nn.scan`, `nn.remat` or another transformation, the
    inputs of these layers cannot be captured.

    Args:
      model: `model.apply` of a linen module, or any function that calls it; or an nnx module.
      *args: passed to the model.
      **kwargs: passed to the model.

    Returns:
      What `model(*args, **kwargs)` returns, and a dict from the path of each module, such as
      `"encoder/Dense_0"`, to its first argument, in the order of the calls. Later calls of the same
      module have their own entries, `"Dense_0[1]"`. Modules whose first argument is not a
      floating-point array are left out.

    Raises:
      TypeError: if no layer is found: the model is not of Flax, or all of it is inside a
        transformation.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> from flax import linen as nn
      >>> model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)])
      >>> x = jnp.ones((4, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> y, inputs = nj.diagnostics.layer_inputs(model.apply, variables, x)
      >>> print(y.shape, {path: x.shape for path, x in inputs.items()})
      (4, 2) {'layers_0': (4, 3), 'layers_2': (4, 8)}
      >>> print(nj.diagnostics.percentiles(inputs).values["layers_0"])
      [1. 1. 1.]
    """
    record = _Record()
    with contextlib.ExitStack() as stack:
        if is_nnx(model):
            stack.enter_context(_nnx_watched(model, record))
        elif "flax.linen" in sys.modules:
            stack.enter_context(_linen_watched(record))
        outputs = model(*args, **kwargs)
    if not record.inputs:
        _checks.raise_error(
            "layer_inputs",
            "no layer was called",
            expected="model.apply of a linen module, or an nnx module, that calls layers outside "
            "of transformations",
            got=f"model={getattr(model, '__qualname__', type(model).__name__)}",
            fix="Jit around layer_inputs, not inside; let a model of pure functions return its "
            "layers' inputs",
            kind=TypeError,
        )
    return outputs, record.inputs


class _Record:
    """Inputs by path, of calls in the trace of its creation: inputs in others cannot leave them."""

    def __init__(self) -> None:
        self.inputs: dict[str, Array] = {}
        self._calls: dict[str, int] = {}
        self._open: set[str] = set()
        self._trace = get_opaque_trace_state(convention="flax")

    def call(self, path: tuple, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Calls the module at a path, and records its input unless a subclass has recorded it."""
        name = "/".join(map(str, path))
        if name in self._open or not self._sees(args):
            return call(*args, **kwargs)
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        self.inputs[name if calls == 1 else f"{name}[{calls - 1}]"] = jnp.asarray(args[0])
        self._open.add(name)
        try:
            return call(*args, **kwargs)
        finally:
            self._open.discard(name)

    def _sees(self, args: tuple) -> bool:
        if not args or not isinstance(args[0], (jax.Array, np.ndarray)):
            return False
        is_activation = jnp.issubdtype(args[0].dtype, jnp.inexact) and args[0].ndim > 0
        return is_activation and get_opaque_trace_state(convention="flax") == self._trace


def _linen_watched(record: _Record) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which linen modules record their inputs."""
    from flax import linen as nn

    def interceptor(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        if context.method_name != "__call__" or not context.module.path:
            return call(*args, **kwargs)
        return record.call(context.module.path, call, args, kwargs)

    return nn.intercept_methods(interceptor)


@contextlib.contextmanager
def _nnx_watched(model: Any, record: _Record) -> Iterator[None]:
    """Returns a context in which the modules of an nnx model record their inputs.

    nnx has no hook for calls, so the `__call__` of the modules' classes is replaced meanwhile.
    """
    from flax import nnx

    modules = [(path, module) for path, module in nnx.iter_modules(model) if path]
    paths = {id(module): path for path, module in modules}

    def watched(call: Callable) -> Callable:
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in paths:
                return call(self, *args, **kwargs)
            return record.call(paths[id(self)], partial(call, self), args, kwargs)

        return __call__

    classes = {base for _, module in modules for base in type(module).__mro__}
    owners = [base for base in classes if "__call__" in vars(base)]
    calls: dict[Any, Callable] = {owner: vars(owner)["__call__"] for owner in owners}
    try:
        for owner, call in calls.items():
            owner.__call__ = watched(call)
        yield
    finally:
        for owner, call in calls.items():
            owner.__call__ = call
