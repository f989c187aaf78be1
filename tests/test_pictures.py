"""The pictures that explain: each is shown, and what the page says of it is what was computed."""

import io
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
sys.path += [str(ROOT / "docs"), str(ROOT / "benchmarks")]

import passes  # noqa: E402 (these are scripts, and import each other so)
import pictures  # noqa: E402
from explained import compilers, derivative, scale_invariance, sync_on_a_mesh  # noqa: E402

PAGES = ROOT / "docs" / "pages"
EXPLAINED = (PAGES / "explained.md").read_text()
SHOWN = dict(re.findall(r"^!\[([^]]+)\]\(images/(\w+)\.svg\)$", EXPLAINED, flags=re.MULTILINE))
ALT = {name: text for text, name in SHOWN.items()}


def test_the_page_shows_all_pictures_but_those_of_other_pages():
    elsewhere = {"far_from_zero": "index.md", "choosing": "choosing.md"}
    assert [*ALT] == [name for name in pictures.PICTURES if name not in elsewhere]
    for name, page in elsewhere.items():
        assert f"images/{name}.svg" in (PAGES / page).read_text()
    assert all((PAGES / "images" / f"{name}.svg").exists() for name in pictures.PICTURES)


@pytest.mark.parametrize("name", ["derivative", "compilers"])
def test_a_picture_can_be_drawn(name):
    drawn = io.BytesIO()
    pictures.PICTURES[name]().savefig(drawn, format="svg")
    assert drawn.getvalue().rstrip().endswith(b"</svg>")


def test_the_true_gradient_is_orthogonal_to_the_ones_and_to_the_normalized_x():
    found = derivative.gradients()
    parts = np.stack([derivative.parts(each, found.normalized) for each in found[1:]])
    np.testing.assert_allclose(parts[2, :2], 0, atol=1e-4)
    np.testing.assert_allclose(parts[2, 2], parts[1, 2], rtol=1e-5)
    np.testing.assert_allclose(found.constants / found.incoming, found.constants[0] / found[1][0])
    along, rest = parts[:, :2], parts[:, 2]
    said = ", ".join(f"{ones:.1f} and {x_hat:.1f}" for ones, x_hat in along)
    said += f". The rest is {rest[0]:.1f}, {rest[1]:.1f} and {rest[2]:.1f}"
    assert said in ALT["derivative"]


def test_the_parts_of_a_gradient_are_all_of_it(rng):
    gradient, normalized = rng.standard_normal((2, 50)).astype(np.float32)
    normalized = (normalized - normalized.mean()) / normalized.std()
    found = derivative.parts(jnp.asarray(gradient), jnp.asarray(normalized))
    np.testing.assert_allclose(np.sum(found**2), np.sum(gradient**2), rtol=1e-5)


def test_a_longer_kernel_has_a_smaller_gradient_and_turns_less():
    assert scale_invariance.invariance().invariant
    found = scale_invariance.lengths()
    assert abs(found.cosine).max() < 1e-4
    np.testing.assert_allclose(found.norm, np.geomspace(0.5, 8, 9), rtol=1e-6)
    np.testing.assert_allclose(found.gradient_norm * found.norm, found.gradient_norm[2], rtol=1e-4)
    rate = scale_invariance.LEARNING_RATE
    np.testing.assert_allclose(found.effective_learning_rate * found.norm**2, rate, rtol=1e-5)
    assert f"learning rate of {rate}" in " ".join(EXPLAINED.split())


def test_each_step_makes_the_kernel_longer_and_a_short_one_turns_twice_as_far():
    turned = []
    for length in (scale_invariance.SHORT, scale_invariance.LONG):
        path = np.asarray(scale_invariance.descend(length * jnp.asarray(scale_invariance.START)))
        assert len(path) == scale_invariance.STEPS + 1
        assert np.all(np.diff(np.linalg.norm(path, axis=1)) > 0)
        first, last = np.arctan2(path[[0, -1], 1], path[[0, -1], 0])
        turned.append(last - first)
    assert turned[0] > 2 * turned[1]


def test_half_of_the_distance_is_left_after_so_many_steps():
    after = re.findall(r"after (\d+)(?: steps)? with (?:a momentum of )?([\d.]+\d)", EXPLAINED)
    assert len(after) == 3
    assert all(round(np.log(0.5) / np.log(float(m))) == int(steps) for steps, m in after)


@pytest.mark.parametrize(
    ("axis_name", "members", "count"), [(None, 1, 0), ("member", 4, 1), (("group", "member"), 8, 1)]
)
def test_devices_share_the_statistics_of_their_group_by_one_all_reduce(axis_name, members, count):
    x = sync_on_a_mesh.batch()
    found = sync_on_a_mesh.share(x, axis_name)
    groups = np.asarray(x, np.float64).reshape(8 // members, -1, sync_on_a_mesh.FEATURES)
    expected = np.repeat(groups.mean(1), members, 0), np.repeat(groups.var(1), members, 0)
    np.testing.assert_allclose(found.mean, expected[0], atol=1e-5)
    np.testing.assert_allclose(found.var, expected[1], rtol=1e-4)
    sent = [each for each in found.collectives if not each.in_branch]
    assert [each.elements for each in sent] == count * [2 * sync_on_a_mesh.FEATURES]
    said = sync_on_a_mesh.sent(found, members)
    assert ("1 all-reduce among" in said) == (count == 1)


def test_the_page_has_the_units_of_the_recorded_programs():
    units = {}
    for target in compilers.TARGETS:
        row = compilers.programs(target)[0]
        for key in ("steps", "steps_in_branches"):
            totals = [row["peers"][peer][key] for peer in passes.PEERS]
            units[target, key] = [
                round(sum(map(sum, passes.passes(steps, row["x_bytes"])))) for steps in totals
            ]
    assert units == {
        ("cpu", "steps"): [12, 9, 4],
        ("cpu", "steps_in_branches"): [0, 0, 2],
        ("h100", "steps"): [4, 3, 3],
        ("h100", "steps_in_branches"): [0, 0, 0],
        ("v5e", "steps"): [4, 3, 3],
        ("v5e", "steps_in_branches"): [0, 0, 1],
    }
    said = "on the CPU: 12, 9 and 4 units, and 2 in a branch; on the H100: 4, 3 and 3; "
    assert said + "on the TPU: 4, 3 and 3, and 1 in a branch" in ALT["compilers"]


def test_passes_are_kernels_that_read_or_write_an_array():
    x_bytes = 2 * 64 * 64
    assert passes.passes([[x_bytes, 12], [8, 8], [12, 2 * x_bytes]], x_bytes) == [
        (1, 12 / x_bytes),
        (12 / x_bytes, 2),
    ]


def test_the_kernels_of_a_program_are_read():
    x = jnp.ones((64, 64))
    compiled = jax.jit(lambda x: x * 2).lower(x).compile()
    found = passes.figures(compiled)
    assert found == {"steps": [[x.nbytes, x.nbytes]], "steps_in_branches": [], "conditionals": 0}
