import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adversarial_pairs import main, parse
from common.networks import UNITS, vgg
from studies.adversarial_pairs import study
from studies.adversarial_pairs.ways import ATTACKED, CLEAN, WAYS, attack

from tests.compare import assert_close, assert_identical, assert_trees_close

NETWORK = vgg(UNITS["batch"], ((4,), (4,)))
SHAPE = (4, 4, 1)


@pytest.fixture
def images(rng):
    """Clean and attacked ones, far apart."""
    return tuple(np.float32(least + rng.uniform(size=(6, *SHAPE))) for least in (0, 2))


@functools.cache
def initialized(name):
    init = jax.jit(WAYS[name].init, static_argnums=(0, 2, 3))
    return jax.device_get(init(NETWORK, jax.random.key(0), SHAPE, 2))


def start(name):
    """The parameters and statistics of a way, the caller's own copy."""
    return copy.deepcopy(initialized(name))


@functools.partial(jax.jit, static_argnums=0)
def train(name, params, batch_stats, images):
    return WAYS[name].train(NETWORK, params, batch_stats, jnp.stack(images))


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def apply(name, params, batch_stats, images, kind, training):
    return WAYS[name].apply(NETWORK, params, batch_stats, images, kind, training)[0]


def first_means(params, images):
    """What the first layer normalizes, by channel: a convolution by hand."""
    x = np.pad(np.asarray(images, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel = np.asarray(params["conv_0_0"]["kernel"], np.float64)
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", patches, kernel).mean((0, 1, 2))


@pytest.mark.slow
def test_each_way_normalizes_by_the_statistics_that_it_names(images):
    params, _ = start("shared")
    clean, attacked = (first_means(params, kind) for kind in images)
    expected = {
        "clean only": (clean,),
        "shared": ((clean + attacked) / 2,),
        "two sets": (clean, attacked),
        "two sets, two scales": (clean, attacked),
    }
    for name, means in expected.items():
        kinds = images[:1] if name == "clean only" else images
        logits, new = train(name, *start(name), kinds)
        assert logits.shape == (len(kinds), 6, 10)
        for own, mean in zip(new if len(means) > 1 else [new], means, strict=True):
            assert_close(own["conv_0_0"]["mean"], 0.1 * mean, atol=1e-5)


@pytest.mark.slow
def test_two_scales_start_as_two_sets_and_can_differ(images):
    (params, batch_stats), (split, _) = start("two sets"), start("two sets, two scales")
    two = "two sets, two scales"
    assert_trees_close(
        train(two, split, batch_stats, images),
        train("two sets", params, batch_stats, images),
        atol=1e-5,
    )
    split["conv_1_0"]["norm"]["scale"][ATTACKED] = 0
    clean, attacked = (
        np.asarray(apply(two, split, batch_stats, images[0], kind, True))
        for kind in (CLEAN, ATTACKED)
    )
    assert (np.ptp(clean, axis=0) > 1e-3).any() and not attacked.any()


@pytest.mark.slow
def test_inference_answers_with_the_set_that_is_asked_for(images):
    params, batch_stats = start("two sets")
    _, batch_stats = train("two sets", params, batch_stats, images)
    infer = jax.jit(NETWORK.apply, static_argnums=3)
    for kind in (CLEAN, ATTACKED):
        expected, _ = infer(params, batch_stats[kind], images[0], False)
        assert_identical(apply("two sets", params, batch_stats, images[0], kind, False), expected)


def attacked(loss, x, radius, steps):
    """The adversary of `loss` around `x`."""
    found = jax.jit(lambda x, key: attack(loss, x, key, radius, steps))(x, jax.random.key(0))
    return np.asarray(found)


@pytest.mark.slow
def test_the_adversary_of_a_linear_loss_goes_to_the_corner(rng):
    x, w = (np.float32(rng.uniform(size=(3, 5))) for _ in range(2))
    w = w - np.float32(0.5)
    found = attacked(lambda x: (w * x).sum(), x, 0.2, 4)
    assert_close(found, np.clip(x + 0.2 * np.sign(w), 0, 1), atol=1e-6)


def test_the_adversary_stays_within_its_radius(rng):
    x = np.float32(rng.uniform(size=(3, 5)))
    found = attacked(lambda x: jnp.sin(20 * x).sum(), x, 0.1, 3)
    assert np.abs(found - x).max() <= 0.1 + 1e-6 and 0 <= found.min() and found.max() <= 1
    assert np.sin(20 * found).sum() > np.sin(20 * x).sum()


@pytest.mark.slow
def test_gaps_are_in_standard_deviations():
    clean = {"conv": {"mean": jnp.asarray([0.0, 1.0]), "var": jnp.asarray([4.0, 1.0])}}
    attacked = {"conv": {"mean": jnp.asarray([1.0, 1.0]), "var": jnp.asarray([9.0, 9.0])}}
    assert study.gaps(clean, attacked) == {"conv": 0.25}


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(study.WIDTHS, "digits", ((8,), (16,)))
    ways = "clean only", "two sets, two scales"
    monkeypatch.setattr(study, "WAYS", {name: WAYS[name] for name in ways})
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
