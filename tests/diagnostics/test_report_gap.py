"""The gap between training and inference: its value, its layers, and when it is too large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from normjax.diagnostics import report
from tests.compare import assert_close
from tests.diagnostics.networks import NNX, Residual, data, init, trained, updated

X = data(256)[0]


def moved(variables, apply_fn, x, steps=1):
    """The variables with statistics moved towards those of a batch."""
    step = jax.jit(
        lambda variables, x: {**variables, "batch_stats": apply_fn(variables, x)[1]["batch_stats"]}
    )
    for _ in range(steps):
        variables = step(variables, x)
    return variables


def single(x, train, running):
    return nj.batch_norm({}, running, x, train)


@pytest.mark.slow
def test_the_gap_is_the_distance_of_the_layer_s_outputs():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(2, 3, (50, 4)) * [1, 2, 1e-3, 1])
        running = {
            "mean": jnp.asarray(rng.normal(size=4)),
            "var": jnp.asarray([5.0, 30.0, 1e-4, 2.0]),
        }
        apart = single(x, True, running)[0] - single(x, False, running)[0]
        (layer,), _ = report(
            ({}, running), apply_fn=lambda variables, x: single(x, True, variables[1]), batch=x
        )
    assert_close(
        np.float64(layer.gap), np.sqrt(np.mean(np.asarray(apart) ** 2)), rtol=1e-10, atol=0
    )


@pytest.mark.slow
def test_none_remains_after_recalibration_and_none_is_told_without_a_batch():
    variables = nj.recalibrate(updated(Residual()), init(Residual()), [X])
    found = report(variables, apply_fn=updated(Residual()), batch=X)
    assert (
        all(layer.gap < 1e-3 for layer in found.layers)
        and found.count("warning") == found.count("error") == 0
    )
    assert [layer.gap for layer in report(variables).layers] == [None] * 3


@pytest.mark.slow
def test_a_network_that_has_trained_has_none_to_speak_of():
    model = Residual()
    variables = trained(model)
    found = report(variables, apply_fn=updated(model), batch=X)
    assert found.findings == () and all(0 < layer.gap < 0.25 for layer in found.layers)
    # whose chance is larger than that
    few = report(variables, apply_fn=updated(model), batch=X[:8])
    assert few.findings == () and max(layer.gap for layer in few.layers) > 0.25


@pytest.mark.slow
def test_other_data_than_that_of_training_is_an_error():
    model = Residual()
    variables = moved(init(model), updated(model), X, 100)
    found = report(variables, apply_fn=updated(model), batch=3 * X + 2)
    stem = next(finding for finding in found.findings if finding.path == "stem_norm")
    assert (stem.rule, stem.severity) == ("train-eval-gap", "error")
    assert "recalibrate" in stem.advice and "stored" in stem.message and "channel" in stem.message
    assert report(variables, apply_fn=updated(model), batch=X).findings[0].rule == "zero-scale"


@pytest.mark.slow
def test_statistics_at_their_start_are_a_note_and_those_on_their_way_a_warning():
    model = Residual(momentum=0.99)
    start = report(init(model), apply_fn=updated(model), batch=X)
    gaps = [finding for finding in start.findings if finding.rule == "train-eval-gap"]
    assert gaps and {finding.severity for finding in gaps} == {"note"}
    after = report(moved(init(model), updated(model), X, 50), apply_fn=updated(model), batch=X)
    stem = next(finding for finding in after.findings if finding.path == "stem_norm")
    # 0.99^50 = 60% of the start is left
    assert stem.severity == "warning" and "more steps" in stem.advice


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nj.linen.BatchNorm, nn.BatchNorm, nj.linen.BatchRenorm])
def test_of_linen_whoever_wrote_the_layer(norm):
    model = Residual(norm)
    variables = moved(init(model), updated(model), X, 3)
    assert_gaps(
        report(variables, apply_fn=updated(model), batch=X),
        "stem_norm",
        X @ kernel(variables),
        variables,
    )


def kernel(variables):
    return variables["params"]["Dense_0"]["kernel"]


def assert_gaps(found, path, x, variables):
    running = variables["batch_stats"][path]
    m, v = (np.asarray(moment, np.float64) for moment in (x.mean(0), x.var(0)))
    mean, var = (np.asarray(running[leaf], np.float64) for leaf in ("mean", "var"))
    factor = np.sqrt(v) * (1 / np.sqrt(v + 1e-5) - 1 / np.sqrt(var + 1e-5))
    expected = np.sqrt(np.mean((m - mean) ** 2 / (var + 1e-5) + factor**2))
    (layer,) = [layer for layer in found.layers if layer.path == path]
    assert_close(np.float64(layer.gap), expected, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [nj.nnx.BatchNorm, nnx.BatchNorm])
def test_of_nnx_whose_module_stays_as_it_is(norm):
    model = NNX(norm)
    model(X)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    found = report(model, apply_fn=lambda model, x: model(x), batch=X)
    h = X @ model.first.kernel[...]
    running = {"0": {leaf: getattr(model.norms[0], leaf)[...] for leaf in ("mean", "var")}}
    found = found._replace(
        layers=tuple(
            layer._replace(path=layer.path.removeprefix("norms/")) for layer in found.layers
        )
    )
    assert_gaps(found, "0", h, {"batch_stats": running})
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


def test_what_was_measured_beforehand_does_as_well():
    model = Residual()
    variables = moved(init(model), updated(model), X)
    measured = nj.recalibrate(updated(model), variables, [X])
    one, other = (
        report(variables, apply_fn=updated(model), batch=X),
        report(variables, measured=measured),
    )
    for a, b in zip(one.layers, other.layers, strict=True):
        assert_close(np.float64(a.gap), np.float64(b.gap), rtol=1e-4, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"does not fit the layer BatchNorm_0.*shape \(24,\).*\(7,\)"
    ):
        other = {
            "batch_stats": measured["batch_stats"]
            | {"BatchNorm_0": {"mean": jnp.ones(7), "var": jnp.ones(7)}}
        }
        report(variables, measured=other)
    with pytest.raises(ValueError, match="layer stem_norm.*got layers"):
        del measured["batch_stats"]["stem_norm"], measured["params"]["stem_norm"]
        report(variables, measured=measured)


def test_a_batch_with_nan_is_found_where_it_goes():
    model = Residual()
    found = report(init(model), apply_fn=updated(model), batch=X.at[3, 4].set(jnp.nan))
    stem = next(finding for finding in found.findings if finding.path == "stem_norm")
    assert (stem.rule, stem.severity) == ("non-finite", "error") and "24 of 24" in stem.message


@pytest.mark.slow
def test_a_network_that_is_not_finite_is_reported_all_the_same():
    model = Residual()
    variables = moved(init(model), updated(model), X)
    variables["batch_stats"]["stem_norm"]["var"] = (
        variables["batch_stats"]["stem_norm"]["var"].at[5].set(jnp.nan)
    )
    found = report(variables, apply_fn=updated(model), batch=X)
    assert found.findings[0].rule == "non-finite" and "(channel 5)" in found.findings[0].message


@pytest.mark.slow
def test_it_refuses_a_forward_pass_that_tells_nothing():
    model = Residual()
    variables = init(model)
    with pytest.raises(
        ValueError, match=r"report: no layer saw the batch.*3 layer\(s\).*train=True"
    ):
        report(
            variables,
            apply_fn=lambda v, x: model.apply(v, x, False, mutable=["batch_stats"]),
            batch=X,
        )
    with pytest.raises(TypeError, match="report: apply_fn did not return a pair"):
        report(variables, apply_fn=lambda v, x: updated(model)(v, x)[0], batch=X)
    with pytest.raises(ValueError, match="report: there are no batch statistics"):
        report({"params": variables["params"]}, apply_fn=updated(model), batch=X)
    with pytest.raises(ValueError, match="got apply_fn and batch and measured"):
        report(variables, apply_fn=updated(model), batch=X, measured=variables)
