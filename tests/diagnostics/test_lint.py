"""Each rule: networks that trigger it, with the values in its message, and networks that do not."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import normjax as nj
from normjax.diagnostics import Lint, lint
from tests.diagnostics.lint_networks import ROWS, Dense, dense, linear, rules

BOTH = pytest.mark.parametrize("norm", [nn.BatchNorm, nj.linen.BatchNorm], ids=["flax", "normjax"])


def only(found: Lint, rule: str):
    assert {finding.rule for finding in found} == {rule}
    return found[0]


def linen(model, x, *, dropout=False):
    variables = model.init(jax.random.key(0), x)
    rngs = {"dropout": jax.random.key(1)} if dropout else None
    return (
        lambda variables, x: model.apply(variables, x, mutable=["batch_stats"], rngs=rngs),
        variables,
        x,
    )


def training(norm, **settings):
    return norm(use_running_average=False, **settings)


class TestCancelledBias:
    @pytest.mark.slow
    def test_of_each_layer(self):
        network = Dense(bias=True)
        found = lint(network, network.variables, ROWS)
        assert rules(found) == [("cancelled-bias", "dense_0"), ("cancelled-bias", "dense_1")]
        finding = found[0]
        assert finding.severity == "note" and "use_bias=False" in finding.advice
        assert finding.message == "norm_0 subtracts the mean, and so cancels 'bias' of shape (6,)"

    @pytest.mark.slow
    def test_none_without_biases(self):
        network = Dense(bias=False)
        assert lint(network, network.variables, ROWS) == ()

    @pytest.mark.slow
    @BOTH
    def test_in_linen(self, norm, promotion_as_in_flax):
        biased = nn.Sequential([nn.Conv(4, (3, 3)), training(norm), nn.relu, nn.Dense(2)])
        plain = nn.Sequential(
            [nn.Conv(4, (3, 3), use_bias=False), training(norm), nn.relu, nn.Dense(2)]
        )
        x = jnp.ones((8, 6, 6, 1))
        assert rules(lint(*linen(biased, x))) == [("cancelled-bias", "layers_0")]
        assert lint(*linen(plain, x)) == ()

    @pytest.mark.slow
    @pytest.mark.parametrize("norm", [nnx.BatchNorm, nj.nnx.BatchNorm], ids=["flax", "normjax"])
    def test_in_nnx(self, norm):
        rngs = nnx.Rngs(0)
        model = nnx.Sequential(nnx.Linear(5, 4, rngs=rngs), norm(4, rngs=rngs), nnx.relu)
        before = jax.tree.map(jnp.array, nnx.state(model))
        assert rules(lint(lambda model, x: model(x), model, ROWS)) == [
            ("cancelled-bias", "layers/0")
        ]
        assert jax.tree.all(jax.tree.map(jnp.array_equal, before, nnx.state(model)))


class TestDecayedScale:
    masked = partial(optax.adamw, 1e-3, weight_decay=1e-2, mask=nj.optim.decay_mask)
    warm_up = partial(optax.warmup_cosine_decay_schedule, 0.0, 1e-3, 100, 1000)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "optimizer",
        [
            optax.adamw(1e-3, weight_decay=1e-4),
            optax.adamw(warm_up(), weight_decay=1e-4),
            optax.lion(1e-3, weight_decay=1e-3),
            optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9)),
            optax.MultiSteps(optax.adamw(1e-3), every_k_schedule=4),
            optax.contrib.schedule_free_adamw(1e-3, weight_decay=1e-2),
            optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
        ],
        ids=[
            "adamw",
            "warm-up",
            "lion",
            "sgd",
            "MultiSteps",
            "schedule-free",
            "inject_hyperparams",
        ],
    )
    def test_without_a_mask(self, optimizer):
        network = Dense(hidden=1)
        finding = only(lint(network, network.variables, ROWS, optimizer=optimizer), "decayed-scale")
        assert (finding.path, finding.severity) == ("norm_0", "warning")
        assert (
            finding.message == "the optimizer decays its 'bias' and 'scale'"
            and "decay_mask" in finding.advice
        )

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "optimizer",
        [
            masked(),
            optax.MultiSteps(masked(), every_k_schedule=4),
            optax.adam(1e-3),
            optax.sgd(0.1),
            optax.lamb(1e-3),
            optax.contrib.schedule_free_sgd(1e-3),
            optax.chain(optax.add_noise(0.1, 0.55, 0), optax.sgd(0.1)),
            nj.optim.renormalize(
                lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params), masked()
            ),
        ],
        ids=["adamw", "MultiSteps", "adam", "sgd", "lamb", "schedule-free", "noise", "renormalize"],
    )
    def test_none_with_a_mask_or_without_decay(self, optimizer):
        network = Dense(hidden=1)
        assert lint(network, network.variables, ROWS, optimizer=optimizer) == ()

    @pytest.mark.slow
    def test_only_what_is_decayed(self):
        network = Dense(hidden=1)
        params, _ = network.variables
        mask = jax.tree.map(lambda leaf: False, params) | {"norm_0": {"bias": False, "scale": True}}
        found = lint(network, network.variables, ROWS, optimizer=optax.adamw(1e-3, mask=mask))
        assert [finding.message for finding in found] == ["the optimizer decays its 'scale'"]

    @pytest.mark.slow
    def test_of_any_kind_but_for_scales_that_start_at_zero(self):
        def apply(params, x):
            x, _ = nj.layer_norm(params["layer"], {}, x, train=True)
            x = linear(params["dense"], jax.nn.relu(x))
            return nj.rms_norm({"scale": 1 + params["gemma"]["scale"]}, {}, x, train=True)[0]

        params = {
            "layer": nj.layer_norm_init(5)[0],
            "dense": dense(0, 5, 4),
            "gemma": {"scale": jnp.zeros(4)},
        }
        assert rules(lint(apply, params, ROWS, optimizer=optax.adamw(1e-3))) == [
            ("decayed-scale", "layer")
        ]

    @pytest.mark.slow
    def test_of_an_nnx_module(self):
        model = nnx.Sequential(
            nnx.Linear(5, 4, use_bias=False, rngs=nnx.Rngs(0)),
            nj.nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
        )
        found = lint(lambda model, x: model(x), model, ROWS, optimizer=optax.adamw(1e-3))
        assert rules(found) == [("decayed-scale", "layers/1")]
        assert lint(lambda model, x: model(x), model, ROWS, optimizer=self.masked()) == ()


class TestDropoutBefore:
    @pytest.mark.slow
    @BOTH
    def test_directly_and_before_a_linear_layer(self, norm, promotion_as_in_flax):
        drop = nn.Dropout(0.5, deterministic=False)
        direct = nn.Sequential([nn.Dense(8, use_bias=False), drop, training(norm)])
        found = lint(*linen(direct, ROWS, dropout=True))
        assert (
            rules(found) == [("dropout-before", "layers_2")]
            and "no linear layer between" in found[0].message
        )
        before = nn.Sequential([drop, nn.relu, nn.Dense(8, use_bias=False), training(norm)])
        found = lint(*linen(before, ROWS, dropout=True))
        assert (
            rules(found) == [("dropout-before", "layers_3")]
            and "one linear layer between" in found[0].message
        )
        assert found[0].severity == "warning" and "after the last batch norm" in found[0].advice

    @pytest.mark.slow
    @BOTH
    def test_none_behind_or_far_before(self, norm, promotion_as_in_flax):
        drop = nn.Dropout(0.5, deterministic=False)
        behind = nn.Sequential(
            [nn.Dense(8, use_bias=False), training(norm), nn.relu, drop, nn.Dense(2)]
        )
        assert lint(*linen(behind, ROWS, dropout=True)) == ()
        layers = [nn.Dense(8), nn.relu, nn.Dense(8, use_bias=False)]
        assert (
            lint(*linen(nn.Sequential([drop, *layers, training(norm)]), ROWS, dropout=True)) == ()
        )
        other = nn.Sequential([drop, nn.LayerNorm(), nn.Dense(8, use_bias=False), training(norm)])
        assert lint(*linen(other, ROWS, dropout=True)) == ()
        assert lint(*linen(nn.Sequential([drop, nn.LayerNorm()]), ROWS, dropout=True)) == ()

    def test_of_channels_as_a_factor_and_by_raw_keys(self):
        class Dropped(Dense):
            def before(self, x, i):
                mask = jax.random.bernoulli(jax.random.PRNGKey(0), 0.8, (len(x), x.shape[-1]))
                return x * mask.astype(x.dtype) / 0.8

        network = Dropped(hidden=1)
        assert rules(lint(network, network.variables, ROWS)) == [("dropout-before", "norm_0")]

    @pytest.mark.parametrize("kind", ["depth", "noise", "flip", "cutout"])
    def test_none_for_other_things_at_random(self, kind):
        def apply(variables, x):
            key = jax.random.key(0)
            if kind == "depth":
                x = jnp.where(jax.random.bernoulli(key, 0.8, (len(x), 1)), x, 0.0)
            elif kind == "noise":
                x = x * jax.random.normal(key, x.shape)
            elif kind == "flip":
                x = jnp.where(jax.random.bernoulli(key, 0.5, (len(x), 1)), x, x[:, ::-1])
            else:
                x = jnp.where(
                    jnp.arange(x.shape[1]) < jax.random.randint(key, (len(x), 1), 0, 5), 0.0, x
                )
            return network(variables, x)

        network = Dense(hidden=1)
        assert lint(apply, network.variables, ROWS) == ()


class TestFewValues:
    def test_few_examples(self):
        network = Dense(hidden=1)
        finding = only(lint(network, network.variables, ROWS[:8]), "few-values")
        assert (finding.path, finding.severity) == ("norm_0", "warning")
        assert finding.message == (
            "its input of shape (8, 6) has 8 values for each statistic: "
            "variances are off by about 53%"
        )

    def test_of_ghost_batches(self):
        network = Dense(hidden=1, virtual_batch_size=4)
        assert "has 4 values" in only(lint(network, network.variables, ROWS), "few-values").message
        network = Dense(hidden=1, virtual_batch_size=16)
        assert lint(network, network.variables, ROWS) == ()

    @pytest.mark.slow
    def test_one_is_an_error(self):
        model = nn.Sequential(
            [nn.Dense(4, use_bias=False), nj.linen.BatchNorm(use_running_average=False)]
        )
        finding = only(lint(*linen(model, ROWS[:1])), "few-values")
        assert (
            finding.severity == "error"
            and "has 1 value for each statistic: variances are always 0" in finding.message
        )

    @pytest.mark.slow
    def test_pixels_and_devices_count(self):
        def images(variables, x):
            return nj.batch_norm(*variables, x, train=True)

        variables = nj.batch_norm_init(3)
        assert lint(images, variables, jnp.ones((2, 3, 3, 3))) == ()
        assert rules(lint(images, variables, jnp.ones((2, 2, 2, 3)))) == [("few-values", "/")]

        network = Dense(hidden=1, axis_name="data")
        assert lint(network, network.variables, ROWS[:4], axis_name="data", axis_size=4) == ()
        finding = only(
            lint(network, network.variables, ROWS[:4], axis_name="data", axis_size=2), "few-values"
        )
        assert "has 8 values for each statistic, over all of 'data'" in finding.message

    @pytest.mark.slow
    def test_groups_of_devices_count(self, promotion_as_in_flax):
        norm = nn.BatchNorm(
            use_running_average=False, axis_name="data", axis_index_groups=[[0, 1], [2, 3]]
        )
        variables = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), ROWS)
        found = lint(
            partial(norm.apply, mutable=["batch_stats"]),
            variables,
            ROWS[:4],
            axis_name="data",
            axis_size=4,
        )
        assert "has 8 values" in only(found, "few-values").message

    def test_none_for_layers_without_a_batch(self):
        def apply(params, x):
            return nj.layer_norm(params, {}, x, train=True)[0]

        assert lint(apply, nj.layer_norm_init(5)[0], ROWS[:1]) == ()
        each = jax.vmap(apply, in_axes=(None, 0))
        assert lint(each, nj.layer_norm_init(5)[0], jnp.ones((2, 1, 5))) == ()


class TestTorchMomentum:
    def test_of_pytorch(self):
        network = Dense(hidden=1, momentum=0.1)
        finding = only(lint(network, network.variables, ROWS), "torch-momentum")
        assert (finding.path, finding.severity) == ("norm_0", "warning")
        assert "momentum 0.1 is the weight of the old value" in finding.message
        assert "90% of its running statistics come from the last batch" in finding.message
        assert finding.advice.startswith("write 0.9 if 0.1 is from PyTorch")

    def test_in_linen_and_of_shapes(self, promotion_as_in_flax):
        model = nn.Sequential([nn.Dense(4, use_bias=False), training(nn.BatchNorm, momentum=0.03)])
        apply, variables, x = linen(model, ROWS)
        found = lint(apply, jax.eval_shape(lambda: variables), x)
        assert "write 0.97" in only(found, "torch-momentum").advice

    @pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, None, "schedule"])
    def test_none_for_others_and_for_schedules(self, momentum):
        network = Dense(hidden=1)
        params, batch_stats = network.variables
        batch_stats["norm_0"] |= {"count": jnp.zeros((), jnp.int32)}
        if momentum == "schedule":  # TensorFlow's: 0.1, 0.18, 0.25, ...

            def apply(variables, x):
                count = variables[1]["norm_0"]["count"].astype(jnp.float32)
                network.settings = {"momentum": (1 + count) / (10 + count)}
                return network(variables, x)

            assert lint(apply, (params, batch_stats), ROWS) == ()
        else:
            network.settings = {"momentum": momentum}
            assert lint(network, (params, batch_stats), ROWS) == ()


class TestSlowMomentum:
    def test_its_value_is_found(self):
        network = Dense(hidden=1, momentum=0.98)
        finding = only(lint(network, network.variables, ROWS, steps=100), "slow-momentum")
        assert (finding.path, finding.severity) == ("norm_0", "warning")
        assert finding.message == (
            "after 100 steps of momentum 0.98, 13% of its running statistics are their initial "
            "value"
        )
        assert "momentum=0.95 or less" in finding.advice  # 0.95**100 = 0.6%

    @pytest.mark.parametrize("momentum, steps", [(0.9, 44), (0.99, 459), (0.0, 1), (None, 1)])
    def test_none_for_enough_steps(self, momentum, steps):
        network = Dense(hidden=1, momentum=momentum)
        params, batch_stats = network.variables
        batch_stats["norm_0"] |= {"count": jnp.zeros((), jnp.int32)} if momentum is None else {}
        assert lint(network, (params, batch_stats), ROWS, steps=steps) == ()
        if momentum:
            assert rules(lint(network, (params, batch_stats), ROWS, steps=steps - 1)) == [
                ("slow-momentum", "norm_0")
            ]

    @pytest.mark.slow
    @BOTH
    def test_in_linen(self, norm, promotion_as_in_flax):
        model = nn.Sequential([nn.Dense(4, use_bias=False), training(norm, momentum=0.999)])
        found = lint(*linen(model, ROWS), steps=1000)
        assert "37%" in only(found, "slow-momentum").message

    @pytest.mark.slow
    def test_with_a_mask_ghosts_and_devices(self):
        class Masked(Dense):
            def __call__(self, variables, x):
                self.settings["mask"] = x["mask"][:, None]
                return super().__call__(variables, x["rows"])

        network = Masked(hidden=1)
        x = {"rows": ROWS, "mask": jnp.ones(32, bool)}
        assert (
            "momentum 0.99"
            in only(lint(network, network.variables, x, steps=10), "slow-momentum").message
        )
        network = Dense(hidden=1, virtual_batch_size=16, axis_name="i")
        found = lint(network, network.variables, ROWS, steps=10, axis_name="i", axis_size=2)
        assert "momentum 0.99" in only(found, "slow-momentum").message


class TestUnsynced:
    @pytest.mark.slow
    def test_under_a_named_axis(self):
        network = Dense(hidden=2)
        found = lint(network, network.variables, ROWS, axis_name="data", axis_size=4)
        assert rules(found) == [("unsynced", "norm_0"), ("unsynced", "norm_1")]
        assert "mapped axis 'data'" in found[0].message and "axis_name='data'" in found[0].advice
        assert found[0].severity == "warning"

    def test_none_where_statistics_are_shared(self):
        network = Dense(axis_name="data")
        assert lint(network, network.variables, ROWS, axis_name="data", axis_size=4) == ()
        network = Dense(axis_name=("rows", "columns"))
        assert (
            lint(network, network.variables, ROWS, axis_name=("rows", "columns"), axis_size=2) == ()
        )
        found = lint(
            network, network.variables, ROWS, axis_name=("rows", "columns", "more"), axis_size=2
        )
        assert "mapped axis 'more'" in only(found, "unsynced").message

    def test_none_where_devices_merge_what_they_learned_or_nothing_is_of_a_batch(self):
        network = Dense()

        def merged(variables, x):
            y, batch_stats = network(variables, x)
            return y, nj.sync_batch_stats(batch_stats, "data")

        assert lint(merged, network.variables, ROWS, axis_name="data", axis_size=4) == ()
        alone = partial(nj.layer_norm, nj.layer_norm_init(5)[0], {}, train=True)
        assert lint(lambda _, x: alone(x)[0], {}, ROWS, axis_name="data") == ()

    @pytest.mark.parametrize("how", ["shard_map", "pmap"])
    @pytest.mark.parametrize("axis_name", [None, "data"])
    def test_inside_of_apply_fn(self, how, axis_name):
        network = Dense(hidden=1, axis_name=axis_name)
        if how == "pmap":
            step, x = jax.pmap(network, axis_name="data", in_axes=(None, 0)), ROWS.reshape(2, 16, 5)
        else:
            mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
            split, whole = jax.P("data"), jax.P()
            step = jax.shard_map(
                network,
                mesh=mesh,
                in_specs=(whole, split),
                out_specs=(split, whole),
                check_vma=axis_name is not None,
            )
            x = ROWS
        found = lint(step, network.variables, x)
        assert rules(found) == ([] if axis_name else [("unsynced", "norm_0")])


class TestResidualScale:
    @staticmethod
    def block(shortcut="identity", scale=1.0, layers=2):
        def apply(variables, x):
            params, batch_stats = variables
            new, h = {}, x
            for i in range(layers):
                h, new[f"norm_{i}"] = nj.batch_norm(
                    params[f"norm_{i}"],
                    batch_stats[f"norm_{i}"],
                    linear(params[f"dense_{i}"], h),
                    train=True,
                )
                h = jax.nn.relu(h) if i < layers - 1 else h
            if shortcut == "projection":
                x, new["shortcut"] = nj.batch_norm(
                    params["shortcut"],
                    batch_stats["shortcut"],
                    linear(params["projection"], x),
                    train=True,
                )
            return (jax.nn.relu(x + h) if shortcut else h), new

        params = {f"dense_{i}": dense(i, 5, 5, bias=False) for i in range(layers)} | {
            "projection": dense(9, 5, 5, bias=False)
        }
        batch_stats = {}
        for name in (*(f"norm_{i}" for i in range(layers)), "shortcut"):
            params[name], batch_stats[name] = nj.batch_norm_init(5)
        params[f"norm_{layers - 1}"]["scale"] *= scale
        return apply, (params, batch_stats), ROWS

    @pytest.mark.slow
    @pytest.mark.parametrize("shortcut", ["identity", "projection"])
    def test_of_one(self, shortcut):
        finding = only(lint(*self.block(shortcut)), "residual-scale")
        assert (finding.path, finding.severity) == ("norm_1", "note")
        assert "its scale starts at 1" in finding.message and "zeros" in finding.advice

    @pytest.mark.parametrize("shortcut", ["identity", "projection"])
    @pytest.mark.parametrize("scale", [0.0, 0.5])
    def test_none_at_zero_or_in_training(self, shortcut, scale):
        assert lint(*self.block(shortcut, scale)) == ()

    def test_none_without_a_shortcut_or_beside_an_equal(self):
        assert lint(*self.block(None)) == ()
        assert lint(*self.block("projection", layers=1)) == ()
