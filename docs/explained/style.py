"""What all pictures have in common: their width, letters and colours."""

from __future__ import annotations

import matplotlib
import matplotlib.pyplot as plt

# Inches. On a phone, 390 pixels wide, a picture is shown at 0.7 of this width: letters of 10 points
# are still 9 pixels high there. A wider picture would have smaller letters.
WIDTH = 5.2

# Blue and orange differ in lightness too, so they can be told apart without colours.
OURS, THEIRS, REST, PALE = "tab:blue", "tab:orange", "0.45", "0.8"


def set_up() -> None:
    """Makes Matplotlib write the same SVG for the same figures."""
    matplotlib.use("svg")
    plt.rcParams |= {
        "svg.hashsalt": "normjax",
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
    }
