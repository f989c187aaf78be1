"""Which layer a network needs, as questions in order."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from explained.style import OURS, PALE, WIDTH

# A question, and the layer to take if the answer is yes. If it is no, go on with the next.
QUESTIONS = [
    ("Observations or returns in\nreinforcement learning?", "running_norm"),
    ("A transformer or a\nrecurrent network?", "layer_norm; in a large\nlanguage model rms_norm"),
    ("A discriminator, or a bound\non the gradient?", "weights.spectral_norm"),
    ("Style transfer, or images whose\ncontrast should not matter?", "instance_norm"),
    ("16 examples or more share\nstatistics, over all devices?", "batch_norm"),
    (
        "Weights trained with batch norm,\nnow with smaller batches?",
        "batch_renorm, or batch_norm\nwith frozen statistics",
    ),
]
OTHERWISE = "group_norm"
QUESTION, LAYER = 0.0, 0.57  # the left edges of their boxes, as shares of the width
HALF = 0.27  # of a box's height; 1 is from one question to the next


def choosing() -> plt.Figure:
    """Draws the questions below each other, with the layer of each beside it."""
    figure, axis = plt.subplots(figsize=(WIDTH, 5.4), layout="constrained")
    axis.set(xlim=(0, 1), ylim=(-len(QUESTIONS) - 0.4, 0.4))
    axis.axis("off")
    for row, (question, layer) in enumerate(QUESTIONS):
        draw_box(axis, QUESTION, -row, 0.49, question, PALE, "black")
        draw_box(axis, LAYER, -row, 0.43, layer, OURS, "white")
        draw_arrow(axis, "yes", (0.49, -row), (LAYER, -row))
        draw_arrow(axis, "no", (0.1, -row - HALF), (0.1, -row - 1 + HALF))
    draw_box(axis, QUESTION, -len(QUESTIONS), 0.49, OTHERWISE, OURS, "white")
    return figure


def draw_box(
    axis: Axes, left: float, y: float, width: float, text: str, ground: str, ink: str
) -> None:
    """Draws a text in a box."""
    axis.add_patch(Rectangle((left, y - HALF), width, 2 * HALF, color=ground, linewidth=0))
    axis.text(left + width / 2, y, text, ha="center", va="center", color=ink, linespacing=1.1)


def draw_arrow(axis: Axes, word: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draws an arrow with a word beside its middle."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "shrinkA": 0, "shrinkB": 0})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    above = start[1] == end[1]
    axis.annotate(
        word,
        (x, y),
        (0, 3) if above else (5, 0),
        textcoords="offset points",
        ha="center" if above else "left",
        va="bottom" if above else "center",
        fontsize=9,
    )
