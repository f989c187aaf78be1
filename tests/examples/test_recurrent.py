import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.results import Result, Run
from jax.test_util import check_grads
from recurrent import main, parse
from studies.recurrent.cells import BATCH, LAYER, PLAIN, gru, lstm, unroll
from studies.recurrent.study import Reading, classifier, pieces, with_ink

from tests.compare import assert_close, assert_finite, assert_identical, assert_trees_close

CELLS = {"lstm": lstm, "gru": gru}
NORMS = {"plain": PLAIN, "layer": LAYER, "batch": BATCH}
BATCH_SIZE, INPUTS, UNITS, MAX_STEPS = 5, 3, 4, 3
TIME = MAX_STEPS + 3


@functools.cache
def start(kind, norm):
    """Returns a cell, its parameters and statistics: the same each time, to be compiled once."""
    cell = CELLS[kind](NORMS[norm])
    init = jax.jit(cell.init, static_argnums=(1, 2, 3))
    return cell, jax.device_get(init(jax.random.key(0), INPUTS, UNITS, MAX_STEPS))


def case(kind, norm, rng, time=TIME):
    """Returns a cell with random parameters and statistics, x, and a mask over NaN."""
    cell, (params, batch_stats) = start(kind, norm)
    params = jax.tree.map(lambda leaf: leaf + np.float32(rng.normal(0, 0.3, leaf.shape)), params)
    batch_stats = jax.tree.map(
        lambda leaf: leaf + np.float32(rng.uniform(0, 0.5, leaf.shape)), batch_stats
    )
    mask = np.arange(time) < rng.permutation(np.linspace(2, time, BATCH_SIZE).astype(int))[:, None]
    mask[0, 0] = False  # one that starts late
    x = np.where(mask[..., None], rng.normal(size=(BATCH_SIZE, time, INPUTS)), np.nan)
    return cell, params, batch_stats, x.astype(np.float32), mask


run = jax.jit(unroll, static_argnums=(0, 4))


class Reference:
    """The papers' equations in float64, by example and by time step."""

    def __init__(self, kind, norm, params, batch_stats, train):
        wide = functools.partial(jax.tree.map, lambda leaf: np.array(leaf, np.float64))
        self.kind, self.norm, self.train, self.params, self.stats = (
            kind,
            norm,
            train,
            wide(params),
            wide(batch_stats),
        )

    def normalize(self, name, rows, counts, t):
        """`rows` is a list with a vector for each example."""
        own = self.params["norms"][name]
        scale, bias = own.get("scale"), own.get("bias", 0.0)
        if self.norm == "plain":
            return rows
        if self.norm == "layer":
            return [scale * (row - row.mean()) / np.sqrt(row.var() + 1e-5) + bias for row in rows]
        stats = {leaf: array[t] for leaf, array in self.stats[name].items()}
        mean, var = stats["mean"].copy(), stats["var"].copy()
        counted = np.array([row for row, count in zip(rows, counts, strict=True) if count])
        if self.train and len(counted):
            mean, var = counted.mean(0), counted.var(0)
            self.stats[name]["mean"][t] = 0.9 * stats["mean"] + 0.1 * mean
            self.stats[name]["var"][t] = 0.9 * stats["var"] + 0.1 * var
        return [scale * (row - mean) / np.sqrt(var + 1e-5) + bias for row in rows]

    def lstm(self, state, xs, counts, t):
        hidden = self.normalize(
            "hidden", [h @ self.params["hidden_kernel"] for h, _ in state], counts, t
        )
        inputs = self.normalize("input", [x @ self.params["input_kernel"] for x in xs], counts, t)
        cells, outputs = [], []
        for a, b, (_, c) in zip(hidden, inputs, state, strict=True):
            f, i, o, g = (a + b + self.params["bias"]).reshape(4, UNITS)
            cells.append(sigmoid(f) * c + sigmoid(i) * np.tanh(g))
            outputs.append(sigmoid(o))
        normalized = self.normalize("cell", cells, counts, t)
        return [(o * np.tanh(n), c) for o, n, c in zip(outputs, normalized, cells, strict=True)]

    def gru(self, state, xs, counts, t):
        kernels, hidden, inputs = self.params, {}, {}
        for name, part in (("_gates", slice(2 * UNITS)), ("", slice(2 * UNITS, None))):
            rows = [h @ kernels["hidden_kernel"][:, part] for (h,) in state]
            hidden[name] = self.normalize(f"hidden{name}", rows, counts, t)
            inputs[name] = self.normalize(
                f"input{name}", [x @ kernels["input_kernel"][:, part] for x in xs], counts, t
            )
        bias = kernels.get("bias", np.zeros(3 * UNITS))
        new = []
        for n, (h,) in enumerate(state):
            z, r = (hidden["_gates"][n] + inputs["_gates"][n] + bias[: 2 * UNITS]).reshape(2, UNITS)
            g = np.tanh(inputs[""][n] + bias[2 * UNITS :] + sigmoid(r) * hidden[""][n])
            new.append(((1 - sigmoid(z)) * h + sigmoid(z) * g,))
        return new

    def run(self, x, mask):
        state = [(np.zeros(UNITS),) * (2 if self.kind == "lstm" else 1)] * BATCH_SIZE
        outputs = []
        for t in range(x.shape[1]):
            xs = [np.where(mask[n, t], x[n, t], 0) for n in range(BATCH_SIZE)]
            new = getattr(self, self.kind)(state, xs, mask[:, t], min(t, MAX_STEPS - 1))
            state = [new[n] if mask[n, t] else state[n] for n in range(BATCH_SIZE)]
            outputs.append([arrays[0] for arrays in state])
        return np.swapaxes(np.array(outputs), 0, 1), tuple(map(np.array, zip(*state, strict=True)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "train"), [("plain", True), ("layer", True), ("batch", True), ("batch", False)]
)
@pytest.mark.parametrize("kind", CELLS)
def test_equations_masks_and_statistics_against_numpy(kind, norm, train, rng):
    """Over more steps than there are statistics: those beyond use, and update, the last."""
    cell, params, batch_stats, x, mask = case(kind, norm, rng)
    outputs, state, new = run(cell, params, batch_stats, x, train, mask=mask)
    reference = Reference(kind, norm, params, batch_stats, train)
    expected, last = reference.run(np.float64(x), mask)
    assert_close(outputs, expected, atol=2e-5)
    assert_trees_close(state, last, atol=2e-5)
    assert_trees_close(new, reference.stats, atol=2e-5)
    if not train:
        assert_identical(jax.device_get(new), batch_stats)


@pytest.mark.slow
def test_biases_are_there_once():
    shapes = {}
    for name, norm in NORMS.items():
        init = functools.partial(gru(norm).init, inputs=2, units=3, max_steps=1)
        shapes[name], _ = jax.eval_shape(init, jax.random.key(0))
    assert "bias" in shapes["plain"] and "bias" in shapes["batch"] and "bias" not in shapes["layer"]
    _, (params, _) = start("lstm", "batch")
    leaves = {name: set(norm) for name, norm in params["norms"].items()}
    assert leaves == {"hidden": {"scale"}, "input": {"scale"}, "cell": {"scale", "bias"}}
    assert all((norm["scale"] == np.float32(0.1)).all() for norm in params["norms"].values())


@pytest.mark.slow
def test_scan_is_a_python_loop(rng):
    cell, params, batch_stats, x, _ = case("lstm", "batch", rng)
    x = np.nan_to_num(x)
    outputs, state, new = run(cell, params, batch_stats, x, True)
    outputs = np.asarray(outputs)
    step = jax.jit(cell.step, static_argnums=4)
    stats = [jax.tree.map(lambda leaf, t=t: leaf[t], batch_stats) for t in range(MAX_STEPS)]
    looped = (np.zeros((BATCH_SIZE, UNITS), np.float32),) * 2
    everything = np.ones((BATCH_SIZE, 1), bool)
    for t in range(TIME):
        own = min(t, MAX_STEPS - 1)
        looped, stats[own] = step(params, stats[own], looped, x[:, t], True, everything)
        assert_close(outputs[:, t], looped[0], atol=1e-6)
    assert_trees_close(state, looped, atol=1e-6)
    assert_trees_close(new, jax.tree.map(lambda *leaves: np.stack(leaves), *stats), atol=1e-6)


@pytest.mark.slow
def test_statistics_of_a_step_are_the_moments_of_its_batch(rng):
    cell, params, batch_stats, x, mask = case("gru", "batch", rng)
    _, _, new = run(cell, params, batch_stats, x, True, mask=mask)
    new = jax.device_get(new)
    # Of W_x x, since no state comes in there. Step 1 is a step of its own, the last statistics are
    # updated four times.
    projected = np.float64(x) @ np.float64(params["input_kernel"])[:, : 2 * UNITS]
    for own, steps in ((1, [1]), (MAX_STEPS - 1, [2, 3, 4, 5])):
        mean, var = (np.float64(batch_stats["input_gates"][leaf][own]) for leaf in ("mean", "var"))
        for t in steps:
            counted = projected[mask[:, t], t]
            mean, var = 0.9 * mean + 0.1 * counted.mean(0), 0.9 * var + 0.1 * counted.var(0)
        assert_close(new["input_gates"]["mean"][own], mean, atol=1e-5)
        assert_close(new["input_gates"]["var"][own], var, atol=1e-5)


@pytest.mark.slow
def test_statistics_of_steps_that_no_sequence_reaches_stay(rng):
    cell, params, batch_stats, x, _ = case("gru", "batch", rng)
    reached = np.arange(TIME) < MAX_STEPS - 1
    mask = np.broadcast_to(reached, x.shape[:2])
    x = np.where(mask[..., None], np.nan_to_num(x), np.float32(np.nan))
    for time in (TIME, MAX_STEPS - 1):
        _, _, new = run(cell, params, batch_stats, x[:, :time], True, mask=mask[:, :time])
        new = jax.device_get(new)
        before, after = (jax.tree.map(lambda leaf: leaf[-1], stats) for stats in (batch_stats, new))
        assert_identical(after, before)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_a_padded_sequence_is_the_sequence(norm, rng):
    cell, params, batch_stats, x, mask = case("gru", norm, rng)
    _, (last,), _ = run(cell, params, batch_stats, x, False, mask=mask)
    last = np.asarray(last)
    (short, *_) = (n for n in range(1, BATCH_SIZE) if not mask[n, -1])
    _, (alone,), _ = run(
        cell, params, batch_stats, x[short : short + 1, : mask[short].sum()], False
    )
    assert_close(last[short], np.asarray(alone)[0], atol=1e-6)


def loss(cell, params, batch_stats, x, mask):
    outputs, _, new = unroll(cell, params, batch_stats, x, True, mask=mask)
    return jnp.sum(outputs * jnp.cos(jnp.arange(UNITS, dtype=outputs.dtype))), new


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "norm"), [("gru", "layer"), ("lstm", "batch")])
def test_gradients_are_finite_over_nan(kind, norm, rng):
    cell, params, batch_stats, x, mask = case(kind, norm, rng)
    of_loss = jax.jit(jax.grad(lambda *arrays: loss(cell, *arrays)[0], (0, 2)))
    of_params, of_x = of_loss(params, batch_stats, x, mask)
    assert_finite((of_params, of_x))
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(of_params))
    assert (np.where(mask[..., None], 0, of_x) == 0).all()


@pytest.mark.slow
def test_gradients_against_differences(rng):
    cell, *arrays, mask = case("gru", "batch", rng, MAX_STEPS + 1)
    # In float64: where two examples are left, batch norm is nearly their sign, too steep for the
    # steps float32 needs.
    with jax.enable_x64(True):
        params, batch_stats, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), arrays)
        f = jax.jit(lambda params: loss(cell, params, batch_stats, x, mask)[0])
        check_grads(f, (params,), order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-6)


@pytest.mark.slow
def test_one_program_serves_all_steps(rng):
    cell, params, batch_stats, x, mask = case("gru", "batch", rng)
    traced = []

    @jax.jit
    def step(params, batch_stats, x, mask):
        traced.append(1)
        return unroll(cell, params, batch_stats, x, True, mask=mask)

    for _ in range(3):
        _, _, batch_stats = step(params, batch_stats, x, mask)
    assert len(traced) == 1


@pytest.mark.slow
def test_ink():
    rows = np.zeros((2, 5, 3), np.float32)
    rows[0, 1, 2], rows[0, 3, 0] = 1, 0.1
    assert with_ink(jnp.asarray(rows)).tolist() == [[False, True, True, True, False], [False] * 5]


@pytest.mark.slow
def test_pieces_of_an_image():
    images = jnp.arange(2 * 3 * 4 * 2).reshape(2, 3, 4, 2)
    assert_identical(pieces(images, "rows"), images.reshape(2, 3, 8))
    assert_identical(pieces(images, "pixels"), images.reshape(2, 12, 2))
    permuted = np.asarray(pieces(images, "permuted"))
    order = permuted[0, :, 0] // 2
    assert sorted(order) == list(range(12)) and order.tolist() != list(range(12))
    assert_identical(permuted, np.asarray(images.reshape(2, 12, 2))[:, order])


def test_statistics_of_each_pixel_s_step():
    network = classifier(lstm(BATCH), 4, None, "pixels")
    params, batch_stats = jax.eval_shape(
        lambda key: network.init(key, (8, 8, 1), 10), jax.random.key(0)
    )
    assert params["cell"]["input_kernel"].shape == (1, 16)
    assert {len(leaf) for leaf in jax.tree.leaves(batch_stats)} == {64}


@pytest.mark.parametrize(("sequence", "seeds"), [("rows", 3), ("pixels", 1), ("permuted", 1)])
def test_seeds_are_those_of_the_sequence(sequence, seeds):
    assert parse(["--sequence", sequence]).seeds == seeds
    assert parse(["--sequence", sequence, "--seeds", "2"]).seeds == 2


def test_claims_are_of_the_best_rate():
    study = Reading(parse([]))
    for name, rate, accuracies in (
        ("LSTM", 0.1, [0.2, 0.8]),
        ("LSTM", 0.2, [0.5, 0.95]),
        ("BN-LSTM", 0.1, [0.9, 0.97]),
        ("GRU", 0.1, [0.99, 0.99]),
    ):
        run = Run(0, [10, 20], accuracies, 1.0)
        study.results[f"{name} {rate}"] = Result(name, rate, [run])
    claims = {claim.what: claim for claim in study.claims()}
    assert claims["best accuracy, LSTM"].measured == "95.0% of Digits row by row"
    assert claims["best accuracy, BN-LSTM"].measured == "97.0% of Digits row by row"
    assert claims["steps to 90% at the best rate, BN-LSTM"].measured == "20 (LSTM), 10 (BN-LSTM)"
    assert len(claims) == 3, "none of cells that were not trained"


@pytest.mark.slow
def test_training_reads_digits(tmp_path, capsys):
    arguments = ["--steps", "80", "--eval-every", "40", "--seeds", "1", "--learning-rates", "0.02"]
    with jax.numpy_dtype_promotion("standard"):  # which optax.adam asks for
        assert main([*arguments, "--cells", "bn-gru", "--units", "16", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "recurrent.json").read_text())
    assert content["status"] == "finished"
    assert [result["variant"] for result in content["cells"]] == ["BN-GRU"]
    for result in content["cells"]:
        (run,) = result["seeds"]
        assert run["steps"] == [40, 80] and run["accuracies"][-1] > max(0.3, run["accuracies"][0])
    assert (tmp_path / "recurrent.png").read_bytes().startswith(b"\x89PNG")
    assert "BN-GRU" in capsys.readouterr().out


def test_mistakes_get_one_line(tmp_path, capsys):
    assert main(["--batch-size", "9", "--train-examples", "8", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "recurrent.py: error: --batch-size 9: there are 8 examples\n"
    with pytest.raises(SystemExit):
        parse(["--data", "mnist"])
    assert "--data mnist needs --data-dir" in capsys.readouterr().err
