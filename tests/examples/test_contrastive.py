import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import data
from common.networks import UNITS, batch
from contrastive import main, parse
from studies.contrastive import study
from studies.contrastive.encoder import AXIS, TEMPERATURE, Encoder, Way, augment, contrast, probe

from tests.compare import assert_close, assert_trees_close

OPTIONS = [
    "--steps",
    "2",
    "--eval-every",
    "1",
    "--train-examples",
    "96",
    "--test-examples",
    "64",
    "--labels",
    "48",
]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(study.WIDTHS, "digits", (4,))


def trainer(way):
    return study.Trainer(way, data.load("digits").limit(96, 64), parse(OPTIONS))


def unit_rows(rng, *shape):
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


@pytest.mark.slow
def test_the_loss_is_nt_xent(rng):
    """Equation 1 of Chen et al. 2020, over the 2N embeddings; each device has its own rows."""
    q, k = (unit_rows(rng, 6, 3) for _ in range(2))
    z = np.stack([q, k], 1).reshape(12, 3)
    similarity = np.exp(z @ z.T / TEMPERATURE)
    losses = [
        -np.log(similarity[i, i ^ 1] / (similarity[i].sum() - similarity[i, i])) for i in range(12)
    ]
    with jax.enable_x64(True):
        share = jax.jit(contrast)
        shares = [share(q, k, np.arange(first, first + 2)) for first in (0, 2, 4)]
    for share, first in zip(shares, (0, 4, 8), strict=True):
        assert_close(share[0], np.mean(losses[first : first + 4]), rtol=1e-9)
    found = ((q @ k.T).argmax(1) == np.arange(6)).reshape(3, 2).mean(1)
    assert_close([share[1] for share in shares], found)


def gradients(way, key):
    """Of the whole batch's loss, as the devices add them up, and the first trainer's state."""
    own = trainer(way)
    state = own.init(0)
    specs = (study.WHOLE, study.WHOLE, jax.sharding.PartitionSpec(AXIS), study.WHOLE)
    mapped = jax.shard_map(
        lambda params, stats, images, key: jax.grad(own._loss, has_aux=True)(
            params, stats, slice(None), key, images
        )[0],
        mesh=own.everywhere.mesh,
        in_specs=specs,
        out_specs=study.WHOLE,
    )
    return own, state, jax.jit(mapped)(state.params, state.batch_stats, own.train[:32], key)


@pytest.mark.slow
def test_synced_devices_train_as_one_does_on_the_whole_batch(small):
    key = jax.random.key(3)
    own, state, found = gradients(Way(batch(axis_name=AXIS)), key)
    encoder = Encoder(batch(), (4,))

    def view(device, images, which):
        return augment(jax.random.split(jax.random.fold_in(key, device))[which], images)

    def embed(params, images, which):
        views = jax.vmap(view, (0, 0, None))(jnp.arange(8), images.reshape(8, 4, 8, 8, 1), which)
        return encoder.embed(params, state.batch_stats, views.reshape(images.shape), True)[0]

    def loss(params, images):
        return contrast(embed(params, images, 0), embed(params, images, 1), jnp.arange(32))[0]

    alone = jax.device_get((state.params, own.train[:32]))
    expected = jax.jit(jax.grad(loss))(*alone)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    assert largest > 0.01
    assert_trees_close(found, expected, atol=1e-4 * largest)


@pytest.mark.slow
def test_shuffled_keys_come_back_in_order(small):
    """Without batch statistics it makes no difference where a key is embedded."""
    key = jax.random.key(3)
    _, _, found = gradients(Way(UNITS["layer"], shuffled=True), key)
    _, _, expected = gradients(Way(UNITS["layer"]), key)
    assert_trees_close(found, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_crops_of_the_image(rng, channels):
    flat = np.full((5, 8, 8, channels), 0.5, np.float32)
    views = np.asarray(jax.jit(augment)(jax.random.key(0), flat))
    assert views.shape == flat.shape
    means = views.mean((1, 2))
    assert (np.abs(means - 0.5) < 0.2 + 0.06).all() and means.std() > 0.02
    assert_close((views - views.mean((1, 2), keepdims=True)).std(), 0.1, rtol=0.1)


@pytest.mark.slow
def test_probe_separates_what_is_separable(rng):
    labels = rng.integers(3, size=60)
    features = np.float32(rng.normal(size=(60, 4)) * 0.1 + np.eye(4)[labels])
    separated = jax.jit(probe, static_argnums=2)
    assert separated((features[:30], labels[:30]), (features[30:], labels[30:]), 3) == 1
    assert separated((features[:30], labels[:30]), (features[30:], (labels[30:] + 1) % 3), 3) == 0


@pytest.mark.slow
def test_end_to_end(tmp_path, capsys, small, monkeypatch, promotion_as_in_flax):
    monkeypatch.setattr(study, "WAYS", {"per device": study.WAYS["per device"]})
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "contrastive.json").read_text())
    assert content["status"] == "finished" and list(content["results"]) == ["per device"]
    (found,) = content["results"]["per device"]
    assert (
        found["step"] == [0, 1, 2] and any(found["leak"]) and 0.2 < content["probe_of_pixels"] < 1
    )
    assert_close(found["leak"], np.subtract(found["together"], found["apart"]), atol=1e-6)
    assert (tmp_path / "contrastive.png").read_bytes().startswith(b"\x89PNG")
    assert "Reported by Chen et al. 2020" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "30"], "--batch-size 30: expected a multiple of 8 devices"),
        (
            ["--test-examples", "16"],
            "--batch-size 32: expected a multiple of 8 devices, and no more than the 16 examples",
        ),
        (["--devices", "9"], "--devices 9: there are 8"),
    ],
)
def test_what_devices_cannot_do_gets_one_line(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
