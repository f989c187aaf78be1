import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adversarial_pairs import main, parse
from common import pairs
from common.adversarial import ATTACKED, CLEAN, WAYS, attack
from common.units import UNITS
from common.vgg import vgg

from tests.compare import assert_close, assert_identical, assert_trees_close

NETWORK = vgg(UNITS["batch"], ((4,), (4,)))
SHAPE = (4, 4, 1)


@pytest.fixture
def images(rng):
    """Clean and attacked ones, far apart."""
    return jnp.asarray(rng.uniform(size=(6, *SHAPE)), jnp.float32), jnp.asarray(
        2 + rng.uniform(size=(6, *SHAPE)), jnp.float32
    )


def start(name):
    return WAYS[name].init(NETWORK, jax.random.key(0), SHAPE)


def first_means(params, images):
    """What the first layer normalizes, by channel: a convolution by hand."""
    x = np.pad(np.asarray(images, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["conv_0_0"]["kernel"], np.float64)
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", patches, kernel).mean((0, 1, 2))


def test_each_way_normalizes_by_the_statistics_that_it_names(images):
    params, _ = start("shared")
    clean, attacked = (first_means(params, kind) for kind in images)
    expected = {
        "clean only": (clean, clean),
        "shared": ((clean + attacked) / 2,) * 2,
        "two sets": (clean, attacked),
        "two sets, two scales": (clean, attacked),
    }
    for name, means in expected.items():
        way, (params, batch_stats) = WAYS[name], start(name)
        logits, new = jax.jit(lambda p, s, way=way: way.train(NETWORK, p, s, *images))(
            params, batch_stats
        )
        assert len(logits) == (6 if name == "clean only" else 12)
        for own, mean in zip(new, means, strict=True):
            assert_close(own["conv_0_0"]["mean"], 0.1 * mean, atol=1e-5)


def test_two_scales_start_as_two_sets_and_can_differ(images):
    (params, batch_stats), (split, _) = start("two sets"), start("two sets, two scales")
    one, two = WAYS["two sets"], WAYS["two sets, two scales"]
    assert_trees_close(
        two.train(NETWORK, split, batch_stats, *images),
        one.train(NETWORK, params, batch_stats, *images),
        atol=1e-5,
    )
    split["conv_1_0"]["norm"]["scale"] = split["conv_1_0"]["norm"]["scale"].at[ATTACKED].set(0)
    clean, attacked = (
        two.apply(NETWORK, split, batch_stats, images[0], kind, True)[0]
        for kind in (CLEAN, ATTACKED)
    )
    assert (jnp.ptp(clean, axis=0) > 1e-3).any() and not attacked.any()


def test_inference_answers_with_the_set_that_is_asked_for(images):
    params, batch_stats = start("two sets")
    _, batch_stats = WAYS["two sets"].train(NETWORK, params, batch_stats, *images)
    for kind in (CLEAN, ATTACKED):
        expected, _ = NETWORK.apply(params, batch_stats[kind], images[0], False)
        assert_identical(
            WAYS["two sets"].apply(NETWORK, params, batch_stats, images[0], kind, False)[0],
            expected,
        )


def test_the_adversary_of_a_linear_loss_goes_to_the_corner(rng):
    x, w = (jnp.asarray(rng.uniform(size=(3, 5)), jnp.float32) for _ in range(2))
    w = w - 0.5
    found = attack(lambda x: (w * x).sum(), x, jax.random.key(0), 0.2, 4)
    assert_close(found, np.clip(x + 0.2 * np.sign(w), 0, 1), atol=1e-6)


def test_the_adversary_stays_within_its_radius(rng):
    x = jnp.asarray(rng.uniform(size=(3, 5)), jnp.float32)
    found = attack(lambda x: jnp.sin(20 * x).sum(), x, jax.random.key(0), 0.1, 3)
    assert float(jnp.abs(found - x).max()) <= 0.1 + 1e-6 and 0 <= found.min() and found.max() <= 1
    assert jnp.sin(20 * found).sum() > jnp.sin(20 * x).sum()


def test_gaps_are_in_standard_deviations():
    clean = {"conv": {"mean": jnp.asarray([0.0, 1.0]), "var": jnp.asarray([4.0, 1.0])}}
    attacked = {"conv": {"mean": jnp.asarray([1.0, 1.0]), "var": jnp.asarray([9.0, 9.0])}}
    assert pairs.gaps(clean, attacked) == {"conv": 0.25}


def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(pairs.WIDTHS, "digits", ((8,), (16,)))
    ways = "clean only", "two sets, two scales"
    monkeypatch.setattr(pairs, "WAYS", {name: WAYS[name] for name in ways})
    arguments = ["--steps", "60", "--eval-every", "60", "--seeds", "1", "--test-examples", "100"]
    assert main([*arguments, "--attack-steps", "2", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "adversarial_pairs.json").read_text())
    assert content["status"] == "finished" and tuple(content["results"]) == ways
    plain, both = (content["results"][name][0] for name in ways)
    clean, attacked = plain["accuracies"]["clean set"]
    assert list(plain["accuracies"]) == ["clean set"] and clean > 0.4 > 2 * attacked
    assert all(attacked < clean - 0.3 for clean, attacked in both["accuracies"].values())
    assert not any(plain["gaps"].values()) and all(both["gaps"].values())
    assert (tmp_path / "adversarial_pairs.png").read_bytes().startswith(b"\x89PNG")
    assert "two sets, two scales" in capsys.readouterr().out


def test_mistakes_get_one_line(capsys):
    with pytest.raises(SystemExit):
        parse(["--radius", "-1"])
    error = capsys.readouterr().err
    assert "--radius: expected a positive number, got '-1'" in error and error.count("\n") == 1
