"""The rows that are drawn, and what is said about them."""

import math

import numpy as np
import pytest

from benchmarks.harness import drawn
from benchmarks.harness.cases import DTYPES, GROUPS

MANY = drawn.draw(seed=1, count=2000)


def row(case, **ratios):
    peers = {name.replace("_", "."): {"ratio": ratio} for name, ratio in ratios.items()}
    return {"name": case.name, "case": case._asdict(), "peers": {"normjax": {"ms": 1.5}, **peers}}


def test_a_seed_draws_the_same_rows_and_more_of_them_for_a_larger_count():
    assert drawn.draw(seed=1, count=7) == MANY[:7]
    assert not set(drawn.draw(seed=2, count=50)) & set(MANY[:50])


def test_layers_and_dtypes_take_turns():
    pairs = {(layer, dtype) for layer in drawn.RANKS for dtype in DTYPES}
    for start in range(0, 40, 10):
        assert {(case.layer, case.dtype) for case in MANY[start : start + 10]} == pairs


def test_the_shapes_are_within_the_bounds_and_all_ranks_come_up():
    for layer, ranks in drawn.RANKS.items():
        cases = [case for case in MANY if case.layer == layer]
        assert {len(case.shape) for case in cases} == set(ranks)
        assert all(case.features % (GROUPS if layer == "group" else 8) == 0 for case in cases)
        assert all(32 <= case.features <= 2048 for case in cases)
        assert all(min(case.shape[1:-1], default=4) >= 4 for case in cases)
        assert all(1 <= case.shape[0] <= 64 for case in cases if len(case.shape) > 2)
    assert {case.mode for case in MANY} == {"forward+backward"}


def test_sizes_are_spread_evenly_on_a_logarithmic_scale():
    sizes = np.log2([math.prod(case.shape) for case in MANY])
    assert 16 < sizes.min() and sizes.max() < 24  # the bounds, 2^17 and 2^23, before rounding
    quarters = np.histogram(sizes, bins=[17, 18.5, 20, 21.5, 23])[0]
    assert quarters.min() > 0.8 * quarters.max()


def test_the_summary_has_the_means_of_the_drawn_rows_and_names_those_behind():
    one, two = MANY[:2]  # float32 and bfloat16 of the same layer
    rows = [
        row(drawn.REPORTED[0], flax_linen=0.5),
        row(one, flax_linen=2.0, flax_nnx=4.0, torch=0.1),
        row(two, flax_linen=2.0, haiku=0.5),
    ]
    said = drawn.summary(rows)
    assert (
        "  drawn, 2 rows: fastest library on JAX 1.000x, flax.linen 2.000x, flax.nnx 4.000x" in said
    )
    assert f"  {one.layer} norm, float32, 1 rows: fastest library on JAX 2.000x" in "\n".join(said)
    assert "Behind on 2 of 3 rows:" in said
    assert [line for line in said if one.name in line] == []
    assert f"  {two.name}: haiku 0.50x, 1.5 ms" in said
    assert f"  {drawn.REPORTED[0].name}: flax.linen 0.50x, 1.5 ms" in said


@pytest.mark.parametrize("ratios", [{}, {"torch": 2.0}, {"formula": 2.0}])
def test_a_row_without_a_library_on_jax_is_not_counted(ratios):
    said = drawn.summary([row(MANY[0], **ratios)])
    assert "  drawn, 0 rows: fastest library on JAX not measured" in said
