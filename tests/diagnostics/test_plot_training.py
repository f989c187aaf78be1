"""What is drawn is what was measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from normjax.diagnostics import Landscape, Percentiles, percentiles, plot
from tests.compare import assert_close


@pytest.fixture
def distributions(rng):
    """Of 5 steps: two layers, one of three features that move by 0, 5 and 100."""
    x = rng.normal(size=(5, 40, 3)) * 1e-3 + np.arange(5)[:, None, None] * np.asarray(
        [0.0, 25.0, 1.25]
    )
    x = jnp.asarray(x, jnp.float32)
    seen = [
        percentiles({"a": x[i]}, feature_axes=-1).values | percentiles({"b": x[i]}).values
        for i in range(5)
    ]
    return Percentiles(
        jnp.tile(jnp.asarray([15.0, 50, 85]), (5, 1)), jax.tree.map(lambda *s: jnp.stack(s), *seen)
    )


@pytest.mark.slow
def test_percentiles_of_a_typical_feature(distributions):
    figure = plot.percentiles(distributions, steps=range(0, 50, 10))
    assert [panel.get_title() for panel in figure.axes] == ["a, feature 2 of 3", "b"]
    for panel, values in zip(
        figure.axes, (distributions.values["a"][:, :, 2], distributions.values["b"]), strict=True
    ):
        lines = [line.get_ydata() for line in panel.lines]
        assert_close(np.stack(lines, 1), np.asarray(values))
        assert panel.lines[0].get_xdata().tolist() == [0, 10, 20, 30, 40]


@pytest.mark.slow
def test_percentiles_of_a_feature_on_given_axes(distributions):
    figure = Figure()
    axes = figure.subplots(1, 2)
    assert plot.percentiles(distributions, feature=1, axes=axes) is figure
    assert_close(axes[0].lines[1].get_ydata(), np.asarray(distributions.values["a"][:, 1, 1]))


def landscapes():
    return Landscape(
        loss=jnp.asarray([3.0, 1.0]),
        losses=jnp.asarray([[2.0, 2.5], [4.0, 2.0]]),
        gradient_distances=jnp.asarray([[1.0, 3.0], [0.5, 0.25]]),
        distances=jnp.asarray([[0.5, 1.0], [0.1, 1.0]]),
    )


@pytest.mark.slow
def test_landscapes():
    figure = plot.landscape({"one": landscapes(), "two": landscapes()}, steps=(10, 20))
    bounds = [[line.get_ydata().tolist() for line in panel.lines] for panel in figure.axes]
    assert bounds[0] == [[2.0, 1.0], [3.0, 4.0]] * 2 and bounds[1] == [[1.0, 0.25], [3.0, 0.5]] * 2
    assert_close(figure.axes[2].lines[0].get_ydata(), np.asarray([3.0, 5.0]), rtol=1e-6)
    assert all(panel.get_yscale() == "log" for panel in figure.axes)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["one", "two"]
    assert plot.landscape(landscapes()).axes[0].get_legend() is None


@pytest.mark.slow
def test_refusals(distributions):
    single = percentiles(jnp.ones((4, 2)))
    with pytest.raises(
        ValueError, match=r"plot.percentiles: there are no steps.*q of shape \(3,\)"
    ):
        plot.percentiles(single)
    with pytest.raises(ValueError, match=r"Expected 5 steps; got steps of shape \(2,\)"):
        plot.percentiles(distributions, steps=(1, 2))
    with pytest.raises(ValueError, match="Expected from 0 to 2; got feature=3"):
        plot.percentiles(distributions, feature=3)
    with pytest.raises(ValueError, match="Expected 2 matplotlib Axes; got 1 of type Axes"):
        plot.percentiles(distributions, axes=Figure().subplots())
    with pytest.raises(ValueError, match=r"plot.landscape: there are no steps.*loss of shape \(\)"):
        plot.landscape(jax.tree.map(lambda leaf: leaf[0], landscapes()))
