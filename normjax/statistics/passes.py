"""Forward passes over batches in which layers collect statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree

from normjax import _checks
from normjax._trees import STATISTICS
from normjax.statistics.models import FUNCTION, ApplyFn, Layer, Layers, Model
from normjax.statistics.population import POPULATION

Step = Callable[[Any, PyTree[Array], Layers, Any], tuple[Layers, "Report"]]


def compile_step(apply_fn: ApplyFn, model: Model) -> Step:
    """Returns `step(static, arrays, layers, batch)`, which calls the model and returns a `Report`.

    The step is compiled once for each function.
    """
    try:
        hash(apply_fn)
    except TypeError:  # such as a bound method of some modules
        apply_fn = partial(apply_fn)
    return _compiled(apply_fn, type(model))


class Report(NamedTuple):
    """The report of a pass over one batch, with an entry for each layer, ordered by path.

    Attributes:
      collected: whether the layer collected any element.
      foreign: whether the running statistics changed, as in layers of other libraries.
      finite: whether means and variances are finite, `(layers, 2)`.
    """

    collected: Bool[Array, " layers"]
    foreign: Bool[Array, " layers"]
    finite: Bool[Array, "layers 2"]


@lru_cache(maxsize=16)
def _compiled(apply_fn: ApplyFn, kind: type[Model]) -> Step:
    """Returns a compiled `step(static, arrays, layers, batch)`, cached for 16 functions."""

    @partial(jax.jit, static_argnums=0)
    def step(
        static: Any, arrays: PyTree[Array], layers: Layers, batch: Any
    ) -> tuple[Layers, Report]:
        new = kind.call(apply_fn, static, arrays, layers, batch)
        reports = [_report_of(layers[path], new[path]) for path in sorted(layers)]
        return new, jax.tree.map(lambda *parts: jnp.stack(parts), *reports)

    return step


def _report_of(old: Layer, new: Layer) -> Report:
    seen, _ = new[POPULATION].seen
    moved = (
        jnp.any(new[leaf] != jnp.asarray(old[leaf]).astype(new[leaf].dtype)) for leaf in STATISTICS
    )
    finite = (jnp.all(jnp.isfinite(part)) for part in new[POPULATION].statistics())
    return Report(jnp.any(seen), jnp.any(jnp.stack([*moved])), jnp.stack([*finite]))


def one_pass(step: Step, model: Model, layers: Layers, batches: Iterable[Any]) -> Layers:
    """Returns the layers after all batches; raises an error if a batch has a bad report."""
    report, index = None, -1
    for index, batch in enumerate(batches):
        previous = report
        try:
            layers, report = step(model.static, model.arrays, layers, batch)
        except Exception:
            raise_if_a_part_fits(step, model, layers, batch, index)
            raise
        # Checks the report one batch late, so that the device is never idle, with two batches
        # queued.
        if previous is not None:
            _check(previous, index - 1, sorted(layers))
    if report is None:
        _checks.raise_error(
            FUNCTION,
            "there are no batches",
            expected="at least one",
            got="an empty iterable",
            fix="Pass a list, or a new generator: one that was used before is empty",
        )
    _check(report, index, sorted(layers))
    if not np.asarray(report.collected).any():
        _checks.raise_error(
            FUNCTION,
            "no layer collected anything",
            expected="a forward pass in training mode, through layers of normjax",
            got=f"{len(layers)} layer(s) that did not update, the first of them {min(layers)}",
            fix="Pass train=True (linen: use_running_average=False; nnx: model.train()) and no "
            "mask that hides it all",
        )
    return layers


def raise_if_a_part_fits(step: Any, model: Model, layers: Layers, batch: Any, index: int) -> None:
    """Raises an error that names the part of a batch that `apply_fn` accepts, if there is one.

    It is called after `apply_fn` failed on a whole batch, such as (images, labels).
    """
    if isinstance(batch, Mapping):
        parts = {f"batch[{key!r}]": part for key, part in batch.items()}
    elif isinstance(batch, tuple | list):
        parts = {f"batch[{place}]": part for place, part in enumerate(batch)}
    else:
        return
    kinds = ", ".join(_kind_of(part) for part in parts.values())
    for name, part in parts.items():
        try:
            step.eval_shape(model.static, model.arrays, layers, part)
        except Exception:  # of any kind: this part is not an input of the model
            continue
        _checks.raise_error(
            FUNCTION,
            f"apply_fn does not accept batch {index} as a whole, but its part {name}",
            expected="batches that apply_fn accepts, such as images without labels",
            got=f"a {type(batch).__name__} of {len(parts)}: {kinds}",
            fix=f"Pass ({name} for batch in batches), as a list for layer_by_layer, or take "
            f"{name} in apply_fn",
            kind=TypeError,
        )


def _kind_of(part: Any) -> str:
    return f"{part.dtype}{part.shape}" if hasattr(part, "dtype") else type(part).__name__


def _check(report: Report, index: int, paths: list[str]) -> None:
    """Raises an error if a layer did not collect, or collected NaN or infinity."""
    report = jax.tree.map(np.asarray, report)
    if not report.finite.all():
        layer, leaf = (int(position) for position in np.argwhere(~report.finite)[0])
        count = int((~report.finite).any(1).sum())
        _checks.raise_error(
            FUNCTION,
            f"the statistics of batch {index} are not finite",
            expected="finite activations",
            got=f"NaN or infinity in {paths[layer]}[{STATISTICS[leaf]!r}], in {count} of "
            f"{len(paths)} layer(s)",
            fix=f"Look for NaN in batch {index} (counted from 0) and in the parameters, or mask "
            "what does not count",
        )
    if report.foreign.any():
        _checks.raise_error(
            FUNCTION,
            "a layer updated its running statistics instead of collecting statistics",
            expected="layers of normjax",
            got=f"{paths[int(report.foreign.argmax())]}, which another library's layer keeps, or "
            f"which lost its {POPULATION!r} leaf on the way",
            fix="Use nj.batch_norm, nj.linen.BatchNorm or nj.nnx.BatchNorm, and hand each layer "
            "its whole sub-tree",
        )
