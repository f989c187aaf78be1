"""What the plots of rotation and scale invariance show."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import normjax as nj
from normjax.diagnostics import Rotation, ScaleInvariance, plot
from tests.compare import assert_close


def history(steps, features=()):
    values = jnp.arange(1.0, steps + 1).reshape(steps, *(1 for _ in features)) * jnp.ones(features)
    return {"w": Rotation(values, values, 0 * values, 0 * values, 2 * values, 3 * values)}


@pytest.mark.slow
def test_lines_are_those_of_the_history():
    figure = plot.rotation(history(10))
    for panel, factor in zip(figure.axes, (1, 3, 2), strict=True):
        (line,) = panel.lines
        assert_close(line.get_xdata(), np.arange(10.0))
        assert_close(line.get_ydata(), factor * np.arange(1.0, 11), rtol=1e-6)
        assert panel.get_yscale() == "log"


@pytest.mark.slow
def test_long_histories_are_root_mean_squares_of_blocks():
    line = plot.rotation(history(450, (3,)), steps=range(0, 900, 2)).axes[0].lines[0]
    assert len(line.get_ydata()) == 150
    assert_close(line.get_ydata()[0], np.sqrt((1 + 4 + 9) / 3), rtol=1e-6)
    assert_close(line.get_xdata()[:2], [2.0, 8.0])


@pytest.mark.slow
def test_predictions_are_dashed_once():
    found = nj.diagnostics.equilibrium(history(5), learning_rate=0.1, weight_decay=0.2)
    axes = Figure().subplots(1, 3)
    figure = plot.rotation(history(5), {"w": found["w"], "v": found["w"]}, axes=axes)
    assert figure is axes[0].figure
    (dashed,) = [line for line in figure.axes[2].lines if line.get_linestyle() == "--"]
    assert_close(dashed.get_ydata()[0], np.sqrt(0.04), rtol=1e-12)


def test_zeros_are_drawn_without_a_warning():
    nothing = jax.tree.map(jnp.zeros_like, history(5))
    assert plot.rotation(nothing).axes[0].get_yscale() == "linear"


@pytest.mark.slow
def test_bad_input_is_refused():
    single = jax.tree.map(lambda field: field[0], history(2))
    with pytest.raises(
        ValueError, match=r"plot.rotation: there are no steps.*norm of shape \(\) for 'w'"
    ):
        plot.rotation(single)
    with pytest.raises(
        ValueError, match="plot.rotation: axes are not one for each panel.*Expected 3"
    ):
        plot.rotation(history(2), axes=Figure().subplots(1, 2))


def test_a_mark_for_each_number_hollow_without_influence():
    found = {
        "a": ScaleInvariance(True, 1e-5, 1e-7, 1e-2, 1.0),
        "b": ScaleInvariance(False, 0.0, 0.0, 0.1, 0.0),
    }
    (axes,) = plot.scale_invariance(found).axes
    changes, cosines = axes.collections
    assert_close(changes.get_offsets(), [[1e-5, 0], [1e-8, 1]], rtol=1e-12)
    assert_close(cosines.get_offsets(), [[1e-5, 0], [1e-8, 1]], rtol=1e-12)
    assert changes.get_facecolors()[0, 3] == 1 and changes.get_facecolors()[1, 3] == 0
