"""The picture of a report."""

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

import normjax as nj
from normjax.diagnostics import plot, report
from tests.diagnostics.networks import healthy


def sick():
    tree = healthy()
    tree["batch_stats"]["norm"]["var"][3] = 0
    tree["params"]["other"] = {"scale": np.ones(4)}
    return tree


@pytest.mark.slow
def test_a_row_for_each_layer_a_mark_for_each_channel_in_the_color_of_its_finding(tmp_path):
    found = report(sick())
    figure = plot.report(found)
    var, scale = figure.axes
    assert [label.get_text() for label in var.get_yticklabels()] == ["norm", "other"]
    assert to_hex(var.get_yticklabels()[0].get_color()) == plot.report.__globals__["COLORS"]["note"]
    marks, median = var.lines
    np.testing.assert_allclose(marks.get_xdata(), np.maximum(found.layers[0].leaves["var"], 1e-8))
    assert (
        median.get_xdata()[0] == pytest.approx(found.layers[0].var.median) and len(scale.lines) == 4
    )
    figure.savefig(tmp_path / "report.png")


def test_the_gap_where_there_is_one_and_axes_of_one_s_own():
    found = report(
        sick(),
        measured=sick() | {"batch_stats": {"norm": {"mean": np.zeros(32), "var": np.ones(32)}}},
    )
    figure = Figure()
    axes = figure.subplots(1, 3)
    assert plot.report(found, axes) is figure
    (bar, empty) = axes[2].patches
    assert bar.get_width() == pytest.approx(found.layers[0].gap) and empty.get_width() == 0
    with pytest.raises(
        ValueError, match="plot.report: axes are not one for each panel.*3 matplotlib Axes; got 2"
    ):
        plot.report(found, axes[:2])
    assert len(plot.report(report(nj.layer_norm_init(4))).axes) == 1
