"""The lookup task, attention to a memory, and a short run of the example."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cross_batch_attention import main, parse
from studies.cross_batch_attention.lookup import ALPHABET, ASKED, KEY_TOKENS, SYMBOLS, Lookup
from studies.cross_batch_attention.memory import NORMS, LanguageModel, _attend
from studies.cross_batch_attention.study import TRAININGS, memories, seen

from tests.compare import assert_close, assert_identical

LOOKUP = Lookup(pairs=3)
CONTEXTS = 5
ALL = np.ones((CONTEXTS, CONTEXTS), bool)


@partial(jax.jit, static_argnums=(0, 2))
def draw(lookup, key, count):
    return lookup.draw(key, count)


def records(tokens, lookup):
    return np.asarray(tokens).reshape(len(tokens), lookup.pairs, lookup.record)


@pytest.mark.slow
def test_what_is_asked_was_defined():
    documents = draw(LOOKUP, jax.random.key(0), 40)
    defined, asked = records(documents.previous, LOOKUP), records(documents.current, LOOKUP)
    keys = {tuple(key) for key in defined[..., :KEY_TOKENS].reshape(-1, KEY_TOKENS)}
    assert len(keys) == 40 * LOOKUP.pairs, "no two keys are alike"
    for place in range(KEY_TOKENS):
        assert (defined[..., place] // ALPHABET == place).all()
    assert (asked[..., -1] == ASKED).all() and ASKED < LOOKUP.vocabulary
    for of, questions, answers in zip(defined, asked, np.asarray(documents.answers), strict=True):
        values = {tuple(record[:KEY_TOKENS]): record[-1] for record in of}
        assert [values[tuple(question[:KEY_TOKENS])] for question in questions] == answers.tolist()
    assert (asked[:, 0, :KEY_TOKENS] != defined[:, 0, :KEY_TOKENS]).any(), "in another order"
    assert_identical(
        jnp.asarray(records(documents.current, LOOKUP)[:, :, -1]), LOOKUP.read(documents.current)
    )


@pytest.mark.slow
def test_definitions_hide_in_passages_of_a_text():
    text = np.frombuffer(
        b"What is the answer? It is in the question: forty-two, as they say.", np.uint8
    )
    lookup = Lookup(pairs=3, gap=4, text=jnp.asarray(text))
    documents = jax.jit(lookup.draw, static_argnums=1)(jax.random.key(0), 20)
    assert documents.previous.shape == documents.current.shape == (20, lookup.length) == (20, 24)
    starts = set()
    for tokens in (documents.previous, documents.current):
        for passage in records(tokens, lookup)[..., :4].reshape(20, -1) - SYMBOLS:
            starts.add(text.tobytes().index(passage.astype(np.uint8).tobytes()))
    assert len(starts) > 20
    assert int(documents.current.max()) < lookup.vocabulary


@pytest.mark.slow
def test_whom_a_document_sees():
    assert seen(2, 4, 1).astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert seen(4, 4, 2).astype(int).tolist() == [
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
        [1, 0, 0, 1],
    ]
    assert seen(3, 3, 3).all()
    assert memories(parse(["--distractors", "15"])) == [1, 2, 4, 8, 16]
    assert memories(parse(["--distractors", "11"])) == [1, 2, 4, 8, 12]


def test_attention_against_numpy(rng):
    """One softmax over a context's tokens, its own memory and the contexts that it sees."""
    documents, length, heads, features, contexts = 2, 3, 2, 4, 4
    of = lambda *shape: rng.normal(size=shape)  # noqa: E731
    queries, values = of(documents, length, heads, features), of(documents, length, heads, features)
    scores, keys, remembered = (
        of(documents, heads, length, length),
        *(of(contexts, 5, heads, features) for _ in "kv"),
    )
    sees = np.array([[True, False, True, False], [False, True, True, True]])
    arrays = [np.float32(array) for array in (queries, scores, values, keys, remembered)]
    attended, focus = jax.jit(_attend)(*arrays[:3], tuple(arrays[3:]), sees)
    attended, focus = np.asarray(attended), np.asarray(focus)
    for b, h, q in np.ndindex(documents, heads, length):
        far = np.exp(
            [
                [queries[b, q, h] @ keys[c, k, h] * sees[b, c] for k in range(5)]
                for c in range(contexts)
            ]
        )
        near, far = np.exp(scores[b, h, q]), far * sees[b][:, None]
        total = near.sum() + far.sum()
        expected = near @ values[b, :, h] + np.einsum("ck,ckf->f", far, remembered[:, :, h])
        assert_close(attended[b, q, h], expected / total, atol=1e-5)
    own = [
        [np.exp(keys[b, :, h] @ queries[b, q, h]).sum() for h in range(heads)]
        for b in range(2)
        for q in range(3)
    ]
    everything = [
        [
            sum(np.exp(keys[c, :, h] @ queries[b, q, h]).sum() for c in np.flatnonzero(sees[b]))
            for h in range(2)
        ]
        for b in range(2)
        for q in range(3)
    ]
    assert_close(focus.reshape(-1), (np.array(own) / np.array(everything)).mean(1), atol=1e-5)


@pytest.fixture(scope="module", params=NORMS)
def model(request):
    return LanguageModel(
        NORMS[request.param], LOOKUP.vocabulary, LOOKUP.length, ("local", "memory", "local")
    )


@pytest.fixture(scope="module")
def case(model):
    return jax.jit(model.init)(jax.random.key(0)), draw(LOOKUP, jax.random.key(1), CONTEXTS)


@partial(jax.jit, static_argnums=0)
def remember(model, params, documents):
    return model.remember(params, documents.previous)


@partial(jax.jit, static_argnums=0)
def answer_from(model, params, documents, memory, sees):
    return model.answer(params, documents.current, memory, sees)


def answer(model, params, documents, count):
    memory = remember(model, params, documents)
    return answer_from(model, params, documents, memory, seen(CONTEXTS, CONTEXTS, count))


@pytest.mark.slow
def test_a_document_sees_what_it_should(model, case):
    params, documents = case
    previous = np.array(documents.previous)
    previous[2] = previous[2, ::-1]
    other = documents._replace(previous=previous)
    for count, changed in ((1, [2]), (2, [1, 2]), (3, [0, 1, 2])):
        before, after = (
            np.asarray(answer(model, params, of, count)[0]) for of in (documents, other)
        )
        assert np.flatnonzero(abs(before - after).max((1, 2)) > 1e-3).tolist() == changed
        assert_close(np.delete(after, changed, axis=0), np.delete(before, changed, axis=0))


@pytest.mark.slow
def test_a_memory_has_no_order(model, case):
    params, documents = case
    memory = jax.device_get(remember(model, params, documents))
    expected, of_expected = answer_from(model, params, documents, memory, ALL)
    for order in (np.s_[[0, 1, 4, 2, 3]], np.s_[:, ::-1]):
        reordered = jax.tree.map(lambda leaf, order=order: leaf[order], memory)
        logits, focus = answer_from(model, params, documents, reordered, ALL)
        # Documents 0 and 1 only: the memory's own context of the others has another place.
        assert_close(logits[:2], expected[:2], atol=1e-4)
        assert_close(focus[:2], of_expected[:2], atol=1e-5)


@pytest.mark.slow
def test_no_token_sees_those_behind_it(model, case):
    params, documents = case
    place = LOOKUP.length - 3
    current = np.array(documents.current)
    current[:, place:] = 0
    other = documents._replace(current=current)
    before, after = (np.asarray(answer(model, params, of, 2)[0]) for of in (documents, other))
    assert_close(after[:, :place], before[:, :place], atol=1e-5)
    assert np.abs(after[:, place:] - before[:, place:]).max() > 0.1


@pytest.mark.slow
def test_focus_is_the_share_of_equal_contexts_where_keys_are_alike(model, case):
    params, documents = case
    blocks = [dict(block) for block in params["blocks"]]
    blocks[1]["key_norm"] = jax.tree.map(np.zeros_like, blocks[1]["key_norm"])
    for count in (1, 2, 5):
        _, focus = answer(model, params | {"blocks": blocks}, documents, count)
        assert_close(focus, np.full(focus.shape, 1 / count), atol=1e-6)


@pytest.mark.slow
def test_negatives_are_differentiable(model, case):
    params, documents = case

    @jax.jit
    @jax.grad
    def of_first(memory, count):
        logits, _ = model.answer(params, documents.current, memory, seen(CONTEXTS, CONTEXTS, count))
        return jax.nn.log_softmax(LOOKUP.read(logits)[0])[:, 0].sum()

    memory = remember(model, params, documents)
    for count in (1, 3):
        ((keys, values),) = of_first(memory, count)
        for of in (keys, values):
            assert (jnp.abs(of).max((1, 2, 3)) > 0).tolist() == [True] * count + [False] * (
                CONTEXTS - count
            )


TINY = ["--seeds", "1", "--test-batches", "1", "--pairs", "4"]


@pytest.mark.slow
def test_negatives_help_among_distractors(tmp_path, capsys):
    arguments = [
        *TINY,
        "--steps",
        "160",
        "--learning-rate",
        "0.01",
        "--norms",
        "RMS norm",
        "--distractors",
        "31",
        "--out",
        str(tmp_path),
    ]
    with jax.numpy_dtype_promotion("standard"):  # which optax.adam asks for
        assert main(arguments) == 0
    content = json.loads((tmp_path / "cross_batch_attention.json").read_text())
    assert content["status"] == "finished"
    assert list(content["results"]) == [f"RMS norm, {training}" for training in TRAININGS]
    ((crossbatch,), (own,)) = (result["runs"] for result in content["results"].values())
    assert crossbatch["accuracies"][0] > 0.9 and own["accuracies"][0] > 0.9
    assert crossbatch["accuracies"][-1] > own["accuracies"][-1] + 0.2
    assert crossbatch["focus"][-1] > own["focus"][-1] > 1 / 32
    assert 0 < crossbatch["switched"] < 160 and own["switched"] is None
    assert len(content["claims"]) == 4
    assert (tmp_path / "cross_batch_attention.png").read_bytes().startswith(b"\x89PNG")
    assert "Reported by Tworkowski et al. 2023" in capsys.readouterr().out


@pytest.mark.slow
def test_a_text_and_other_blocks(tmp_path):
    text = tmp_path / "text"
    text.write_text("Call me Ishmael. " * 9)
    arguments = [
        *TINY,
        "--steps",
        "3",
        "--norms",
        "layer norm",
        "--distractors",
        "3",
        "--text",
        str(text),
    ]
    with jax.numpy_dtype_promotion("standard"):
        assert main([*arguments, "--blocks", "memory", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "cross_batch_attention.json").read_text())
    ((run,), _) = (result["runs"] for result in content["results"].values())
    assert (
        run["switched"] is None
        and len(run["accuracies"]) == len(run["focus"]) == 3
        and run["focus"][0] == 1
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--pairs", "300"], "--batch-size: 16 contexts of 300 keys, but there are only 4096 keys"),
        (["--text", "gone"], "gone: No such file or directory"),
        (["--text", __file__, "--gap", "9000"], "72000 are needed for 8 pairs and gaps of 9000"),
    ],
)
def test_mistakes_get_one_line(arguments, said, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert (
        error.startswith("cross_batch_attention.py: error: ")
        and said in error
        and error.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--contexts", "17"], "--contexts 17: a batch has 16; raise --batch-size"),
        (["--blocks", "local"], "--blocks: no memory among them"),
        (["--norms", "batch"], "--norms: invalid choice: 'batch'"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert said in capsys.readouterr().err
