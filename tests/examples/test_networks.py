from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common.data import load
from common.networks import linear, mlp, style
from common.training import Plan, Trainer, batch_orders, examples
from jax import lax
from studies.speedup.inception import inception, inception_of_ten

SMALL = {
    "mlp": lambda unit: mlp(unit, depth=2, width=8),
    "inception": lambda unit: inception(unit, stem=4, widths=(2,)),
}


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
@pytest.mark.parametrize(
    "make", [*SMALL.values(), inception_of_ten], ids=[*SMALL, "inception of ten"]
)
def test_shapes_and_states(make, shape):
    network = make(style(True, "relu"))
    params, batch_stats = jax.eval_shape(
        lambda key: network.init(key, shape, 10), jax.random.key(0)
    )
    images = jax.ShapeDtypeStruct((6, *shape), jnp.float32)
    logits, new = jax.eval_shape(
        lambda *variables: network.apply(*variables, True), params, batch_stats, images
    )
    assert logits.shape == (6, 10) and jax.tree.structure(new) == jax.tree.structure(batch_stats)
    # No bias under batch normalization but that of the normalization.
    assert all(("bias" in layer) == (name == "logits") for name, layer in params.items())


@pytest.mark.slow
@pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)
def test_variants_start_from_the_same_kernels(make):
    def init(normalize):
        return jax.jit(make(style(normalize, "relu")).init, static_argnums=(1, 2))(
            jax.random.key(1), (8, 8, 1), 10
        )

    (plain, none), (normalized, _) = init(False), init(True)
    assert none == {} and plain.keys() == normalized.keys()
    for name in plain:
        np.testing.assert_array_equal(plain[name]["kernel"], normalized[name]["kernel"])


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_convolution_is_a_convolution(size, stride):
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=(2, 5, 6, 3)))
    kernel = np.float32(rng.normal(size=(size, size, 3, 4)))
    expected = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(size // 2, size // 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    found = jax.jit(linear, static_argnums=2)({"kernel": kernel}, x, stride)
    np.testing.assert_allclose(found, expected, atol=1e-5)


SGD = partial(optax.sgd, momentum=0.9)


@pytest.mark.slow
def test_training_of_a_small_inception():
    data = examples(load("digits").limit(600, 101), standardize=True)
    trainer = Trainer(SMALL["inception"](style(True, "relu")), data, SGD)
    seen = []
    run, _ = trainer.finish(Plan(0, 0.05, 350, 140, 32), lambda *said: seen.append(said))
    assert run.steps == [140, 280, 350] and [steps for steps, _ in seen] == [140, 140, 70]
    assert [f"{accuracy:.1%}" for accuracy in run.accuracies] == [remark for _, remark in seen]
    assert run.best > 0.5
    # 101 test images do not fill the last batch of an evaluation: each still counts once.
    assert round(run.accuracies[-1] * 101, 3).is_integer()


@pytest.mark.slow
def test_a_trainer_takes_batches_of_several_sizes_and_hands_out_its_state():
    data = examples(load("digits").limit(60, 20), standardize=True)
    trainers = [Trainer(SMALL["mlp"](style(True, "relu")), data, SGD) for _ in range(2)]
    plan = Plan(1, 0.1, 3, 2, 4)

    def silent(steps, remark):
        pass

    wide, _ = trainers[0].finish(plan._replace(batch_size=8), silent)
    (run, state), (same, _) = (trainer.finish(plan, silent) for trainer in trainers)
    assert wide.steps == run.steps == same.steps == [2, 3]
    assert run.accuracies == same.accuracies
    assert trainers[0].accuracy(state, trainers[0].test) == run.accuracies[-1]


def test_orders_are_epochs_of_all_examples():
    plan = Plan(3, 0.1, 12, 5, 4)
    orders = list(batch_orders(plan, 10))
    assert [order.shape for order in orders] == [(5, 4), (5, 4), (2, 4)]
    rows = np.concatenate([order.ravel() for order in orders])
    for epoch in np.split(rows[:40], 4):
        assert sorted(epoch) == list(range(10))
    for first, second in zip(orders, batch_orders(plan, 10), strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_a_look_at_the_network_on_the_way():
    data = examples(load("digits").limit(60, 20), standardize=True)
    trainer, plan = Trainer(SMALL["mlp"](style(True, "relu")), data), Plan(1, 0.1, 3, 2, 4)
    run, rows = trainer.look(plan, lambda *said: None, lambda step, state, rows: rows)
    finished, _ = trainer.finish(plan, lambda *said: None)
    assert run == {"seed": 1, "steps": [2, 3], "accuracy": finished.accuracies}
    last = [order[-1] for order in batch_orders(plan, 60)]
    np.testing.assert_array_equal(rows, last)
