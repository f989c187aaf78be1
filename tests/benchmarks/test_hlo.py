"""What is read off the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo


def fusion(name, cycles):
    config = f'{{"window_config":{{"estimated_cycles":"{cycles}","iteration_bounds":["2"]}}}}'
    return (
        f"  %{name} = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%fused, backend_config={config}\n"
    )


def computation(name, *lines, entry=False):
    return f"{'ENTRY ' * entry}%{name} (p: f32[8]) -> f32[8] {{\n{''.join(lines)}}}\n\n"


CONDITIONAL = (
    "  %c = f32[8]{0} conditional(%p, %a, %b), branch_computations={%region_0.1, %region_1.2}\n"
)
LOOP = "  %w = f32[8]{{0}} while(%p), condition=%until, body=%again{}\n"
TRIPS = ', backend_config={"known_trip_count":{"n":"12"}}'
AROUND = computation("fused", "  %n = f32[8]{0} negate(%p)\n") + computation("until")


def test_the_cycles_of_the_entry_are_summed():
    text = AROUND + computation("main.3", fusion("a", 100), fusion("b", 20), entry=True)
    assert hlo.estimated_cycles(text) == (120, 0)


@pytest.mark.parametrize("cycles", [(0, 1000), (1000, 0)])
def test_the_cheapest_branch_counts_as_taken_and_the_others_apart(cycles):
    branches = [
        computation(name, fusion("x", own + 1))
        for name, own in zip(("region_0.1", "region_1.2"), cycles, strict=True)
    ]
    text = "".join(
        [AROUND, *branches, computation("main", fusion("a", 5), CONDITIONAL, entry=True)]
    )
    assert hlo.estimated_cycles(text) == (5 + 1, 1001)


@pytest.mark.parametrize(("known", "times"), [(TRIPS, 12), ("", 1)])
def test_a_loop_counts_as_often_as_it_is_known_to_run(known, times):
    body = computation("again", fusion("x", 7), CONDITIONAL)
    branches = computation("region_0.1") + computation("region_1.2", fusion("y", 3))
    text = AROUND + branches + body + computation("main", LOOP.format(known), entry=True)
    assert hlo.estimated_cycles(text) == (7 * times, 3 * times)


def test_there_is_no_estimate_where_the_compiler_gives_none():
    compiled = jax.jit(jnp.sin).lower(jnp.ones(8)).compile()
    assert hlo.estimated_cycles(compiled.as_text()) is None
