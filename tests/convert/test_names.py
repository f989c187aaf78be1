"""Names in every converter: no two of one path, renamed by functions and tables, and compared."""

import ast
import os
import re
from functools import partial

os.environ.setdefault("KERAS_BACKEND", "jax")

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normjax as nj
from tests.compare import assert_identical

ONES, TWOS = np.ones(3, np.float32), np.full(3, 2, np.float32)


class Clash(nnx.Module):
    """A module with `norm_0` and `norm[0]`, which are one name in linen."""

    def __init__(self, rngs):
        self.norm_0 = nj.nnx.LayerNorm(3, rngs=rngs)
        self.norm = nnx.List([nj.nnx.LayerNorm(3, rngs=rngs)])


def test_two_modules_of_nnx_with_one_name_in_linen_are_refused():
    model = Clash(nnx.Rngs(0))
    message = r"stored at 'params/norm_0/\w+'.*'norm(_0|\[0\])\.\w+' and 'norm(_0|\[0\])\.\w+'"
    with pytest.raises(ValueError, match=f"nnx_to_linen: .*{message}"):
        nj.convert.nnx_to_linen(model)
    variables = {"params": {"norm_0": {"scale": ONES, "bias": ONES}}}
    with pytest.raises(ValueError, match=f"linen_to_nnx: .*{message}"):
        nj.convert.linen_to_nnx(variables, model)


def test_two_leaves_of_haiku_with_one_name_are_refused():
    with pytest.raises(ValueError, match="'params/a/bias'.*'a/offset' and 'a/b'"):
        nj.convert.from_haiku({"a": {"offset": ONES, "b": ONES}}, {})
    average = {"average": ONES, "hidden": ONES, "counter": np.array(1)}
    state = {f"a{sep}{name}_ema": average for sep in ("/~/", "/") for name in ("mean", "var")}
    with pytest.raises(ValueError, match="'a/~/mean_ema/average' and 'a/mean_ema/average'"):
        nj.convert.from_haiku({}, state)
    nested = {"a": {"b": {"scale": ONES}}, "a/b": {"scale": TWOS}}
    with pytest.raises(ValueError, match="stored at 'a/b/scale'"):
        nj.convert.to_haiku(nested, {})


def test_what_haiku_has_beside_known_modules_is_handed_through():
    net = hk.transform_with_state(lambda x: hk.GRU(3)(x, jnp.zeros((2, 3)))[0])
    params, state = net.init(jax.random.key(0), jnp.ones((2, 4)))
    found, batch_stats = nj.convert.from_haiku(params, state)
    assert {*found["gru"]} == {"w_i", "w_h", "bias"} and batch_stats == {}
    assert_identical(nj.convert.to_haiku(found, batch_stats, like=(params, state))[0], params)
    assert_identical(nj.convert.to_haiku(found, batch_stats)[0], params)
    with pytest.raises(ValueError, match="from_haiku: 'gru/w_i' has .*first of 2.*'gru/w_h' of"):
        nj.convert.from_haiku(params, state, others="refuse")
    with pytest.raises(ValueError, match="to_haiku: 'params/gru/w_[ih]' has no counterpart"):
        nj.convert.to_haiku(found, batch_stats, others="refuse")
    state = {"vq/~/ema": {"average": ONES, "hidden": ONES, "counter": np.array(3, np.int32)}}
    trees = nj.convert.from_haiku({}, state)
    assert_identical(nj.convert.to_haiku(*trees)[1], state)


KERAS = {"old/bn/gamma": ONES, "old/bn/moving_mean": TWOS, "old/bn/moving_variance": ONES}
RENAMES = {
    "a table of beginnings": {"old/bn": "new"},
    "a table with a separator": {"old/": "", "old/bn": "new"},
    "a table of whole names": {key: key.replace("old/bn", "new") for key in KERAS},
    "a function": lambda name: name.replace("old/bn", "new"),
}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_keras_names_are_renamed(rename):
    params, batch_stats = nj.convert.from_keras(KERAS, rename=rename)
    assert_identical(params, {"new": {"scale": ONES}})
    assert_identical(batch_stats["new"]["mean"], TWOS)


def test_the_longest_entry_of_a_table_counts_and_an_empty_one_removes():
    weights = {"net/a/kernel": ONES, "net/ab/kernel": ONES, "net/kernel": ONES}
    params, _ = nj.convert.from_keras(weights, rename={"net": "", "net/a": "x/y"})
    assert {*params} == {"x", "ab", "kernel"} and {*params["x"]} == {"y"}


@pytest.mark.parametrize("rename", RENAMES.values(), ids=RENAMES)
def test_keras_takes_the_same_rename_on_the_way_back(rename):
    trees = nj.convert.from_keras(KERAS, rename=rename)
    assert_identical(nj.convert.to_keras(*trees, like=KERAS, rename=rename), KERAS)


def test_without_like_a_table_is_read_backwards():
    table = {"old/bn": "new"}
    trees = nj.convert.from_keras(KERAS, rename=table)
    assert_identical(nj.convert.to_keras(*trees, rename=table), KERAS)
    trees = nj.convert.from_keras(KERAS, rename={"old": ""})
    assert_identical(nj.convert.to_keras(*trees, rename={"old": ""}), KERAS)
    with pytest.raises(ValueError, match="to_keras: rename is a function.*Pass like="):
        nj.convert.to_keras(*trees, rename=str.lower)
    with pytest.raises(ValueError, match="to_keras: rename has two.*'x'.*'a' and 'b'"):
        nj.convert.to_keras(*trees, rename={"a": "x", "b": "x"})


def test_haiku_names_are_renamed_both_ways():
    net = hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9, name="bn")(x, True))
    haiku = net.init(jax.random.key(0), jnp.ones((4, 3)))
    for rename in ({"bn": "norm"}, lambda name: name.replace("bn", "norm")):
        params, batch_stats = nj.convert.from_haiku(*haiku, rename=rename)
        assert {*params} == {*batch_stats} == {"norm"}
        back = nj.convert.to_haiku(params, batch_stats, decay_rate=0.9, like=haiku, rename=rename)
        assert_identical(back[0], haiku[0])
        assert {*back[1]} == {*haiku[1]}
    params = {"norm": {"scale": ONES}}
    assert_identical(
        nj.convert.to_haiku(params, {}, rename={"bn": "norm"})[0], {"bn": params["norm"]}
    )


def test_flax_names_are_renamed_both_ways():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(2, 3, rngs=rngs)
            self.norm = nj.nnx.BatchNorm(3, rngs=rngs)

    model = Net(nnx.Rngs(0))
    table = {"Dense_0": "head", "BatchNorm_0": "norm"}
    variables = nj.convert.nnx_to_linen(model, rename=table)
    assert {*variables["params"]} == {*table}
    assert {*variables["batch_stats"]} == {"BatchNorm_0"}
    state = nj.convert.linen_to_nnx(variables, model, rename=table)
    assert_identical(state["head"]["kernel"].get_value(), model.head.kernel.get_value())

    def rename(name):
        return name.replace("Dense_0", "head").replace("BatchNorm_0", "norm")

    again = nj.convert.nnx_to_linen(model, like=variables, rename=rename)
    assert_identical(again, variables)


WRONG = {
    "an entry of a table": (
        {"bm": "x"},
        ValueError,
        "rename has an entry for 'bm'.*The nearest is 'bn'",
    ),
    "two of one name": (
        lambda name: "bn/scale",
        ValueError,
        "stored at 'bn/scale'.*'bn/gamma' and",
    ),
    "no function": ("bn", TypeError, "rename cannot be called"),
    "no name": (lambda name: None, TypeError, "rename returned no name for 'bn/gamma'"),
    "an empty name": (lambda name: "", ValueError, "rename returned no name for 'bn/gamma'"),
    "a table that leaves nothing": ({"bn/gamma": ""}, ValueError, "no name for 'bn/gamma'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_rename_is_named(case):
    rename, kind, message = WRONG[case]
    with pytest.raises(kind, match=f"from_keras: .*{message}"):
        nj.convert.from_keras({"bn/gamma": ONES, "bn/bias": ONES}, rename=rename)


def test_another_word_for_others_is_refused():
    converters = (nj.convert.to_keras, nj.convert.from_haiku, nj.convert.to_haiku)
    for convert in (lambda one, _, others: nj.convert.from_keras(one, others=others), *converters):
        with pytest.raises(ValueError, match="others is unknown.*'keep' or 'refuse'"):
            convert({}, {}, others="drop")


def keras(names):
    like = {f"{name}/gamma": ONES for name in names}
    return nj.convert.from_keras(like)


LIKE = ["stage_1/bn", "stage_2/bn"]
MISMATCHES = {
    "a prefix too many": (
        ["model/stage_1/bn", "model/stage_2/bn"],
        "2 of 2 names .* begin with 'model/': pass rename={'model': ''}",
    ),
    "a prefix too few for one": (
        ["bn", "stage_2/bn"],
        "lack the prefix 'stage_1/': pass rename={'bn': 'stage_1/bn'}",
    ),
    "separators": (["stage/1/bn", "stage_2/bn"], "differ.*: pass rename={'stage/1': 'stage_1'}"),
    "a prefix and separators": (
        ["model/stage/1/bn", "model/stage/2/bn"],
        "begin with 'model/'.*separators: pass rename={'model/stage/1': 'stage_1', 'model/",
    ),
    "a name": (
        ["stage_1/bm", "stage_2/bn"],
        "nearest names.*: pass rename={'stage_1/bm': 'stage_1/bn'}",
    ),
    "two names with numbers": (
        ["staging_2/bn", "staging_1/bn"],
        "nearest names.*: pass rename={'staging_2': 'stage_2', 'staging_1': 'stage_1'}",
    ),
}


def check_advice(message, convert):
    """Checks that an error has the message, and that the `rename=` in it mends the error."""
    with pytest.raises(ValueError, match=message) as error:
        convert(rename=None)
    pasted = re.search("pass rename=(.*)[.]$", str(error.value))
    convert(rename=ast.literal_eval(pasted.group(1)))


@pytest.mark.parametrize("case", MISMATCHES)
def test_names_that_do_not_match_are_compared_and_the_advice_mends_them(case):
    names, message = MISMATCHES[case]
    given = {f"{name}/gamma": ONES for name in names}
    trees = keras(LIKE)
    check_advice(f"from_keras: .*{message}", partial(nj.convert.from_keras, given, like=trees))
    check_advice(f"to_keras: .*{message}", partial(nj.convert.to_keras, *trees, like=given))

    given = {name: {"scale": ONES} for name in names}
    trees = nj.convert.from_haiku({name: {"scale": ONES} for name in LIKE}, {})
    check_advice(f"from_haiku: .*{message}", partial(nj.convert.from_haiku, given, {}, like=trees))
    to_haiku = partial(nj.convert.to_haiku, *trees, like=(given, {}))
    check_advice(f"to_haiku: .*{message}", to_haiku)

    message = message.replace("/", r"[./]")
    given = {f"{name.replace('/', '.')}.weight": ONES for name in names}
    trees = nj.convert.from_torch({f"{name.replace('/', '.')}.weight": ONES for name in LIKE})
    check_advice(f"from_torch: .*{message}", partial(nj.convert.from_torch, given, like=trees))
    check_advice(f"to_torch: .*{message}", partial(nj.convert.to_torch, *trees, like=given))


def test_a_prefix_that_all_names_lack_is_one_entry():
    given, like = ["stage_1/bn", "stage_2/bn"], ["net/stage_1/bn", "net/stage_2/bn"]
    weights = {f"{name}/gamma": ONES for name in given}
    convert = partial(nj.convert.from_keras, weights, like=keras(like))
    check_advice("lack the prefix 'net/': pass rename={'': 'net'}", convert)


def test_what_most_names_differ_in_is_said_first():
    given, like = ["stage/1/bn", "stage/2/bn", "stage/3/bn"], ["stage_1/bn", "stage_2/bn", "bn"]
    with pytest.raises(ValueError, match="differ in their separators.*{'stage/1': 'stage_1', '"):
        nj.convert.from_keras({f"{name}/gamma": ONES for name in given}, like=keras(like))


def test_a_leaf_is_not_taken_for_another_one_of_its_module():
    given = {"backbone/stage_1/bn/gamma": ONES}
    like = {"backbone": {"stage_1": {"bn": {"bias": ONES}}}}, {}
    with pytest.raises(ValueError, match="bn/beta' is missing.*if names differ, pass rename=[.]$"):
        nj.convert.from_keras(given, like=like)
    check_advice(
        "nearest names.*: pass rename={'tokens/cls': 'tokens/clas'}",
        partial(nj.convert.from_keras, {"tokens/cls": ONES}, like=({"tokens": {"clas": ONES}}, {})),
    )


def test_names_of_flax_that_do_not_match_are_compared():
    model = nnx.Dict(stage_1=nj.nnx.RMSNorm(3, rngs=nnx.Rngs(0)))
    variables = {"params": {"net": {"stage_1": {"scale": jnp.ones(3)}}}}
    with pytest.raises(ValueError, match="linen_to_nnx: .*rename={'net': ''}"):
        nj.convert.linen_to_nnx(variables, model)
    assert nj.convert.linen_to_nnx(variables, model, rename={"net": ""})
    with pytest.raises(ValueError, match="nnx_to_linen: .*rename={'net': ''}"):
        nj.convert.nnx_to_linen(model, like=variables)
    assert_identical(nj.convert.nnx_to_linen(model, like=variables, rename={"net": ""}), variables)


def test_all_that_do_not_match_are_listed():
    first, second = (f"{name}/gamma" for name in LIKE)
    with pytest.raises(
        ValueError, match=f"'{first}' is missing, .* missing: '{first}', '{second}'"
    ):
        nj.convert.from_keras({}, like=keras(LIKE))
    given = {first: ONES, second: ONES}
    with pytest.raises(ValueError, match=f"'{first}' has no .* counterpart: '{first}', '{second}'"):
        nj.convert.from_keras(given, like=({}, {}))
    with pytest.raises(ValueError, match=f"2 missing: '{first}', '{second}'"):
        nj.convert.to_keras({}, {}, like=given)
    given |= {f"layer_{i}/bn/gamma": ONES for i in range(60)}
    with pytest.raises(ValueError, match="first of 62.*'layer_0/bn/gamma'.*'layer_59/bn/gamma'"):
        nj.convert.from_keras(given, like=({}, {}))
