"""`python -m normjax.diagnostics`, on checkpoints as people write them."""

import builtins
import json
import os
import signal
import subprocess
import sys
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization, traverse_util
from safetensors.numpy import save_file

from normjax.diagnostics import report
from normjax.diagnostics.__main__ import main
from normjax.diagnostics.report.page import page
from tests.checkpoints.write import HERE as CHECKPOINTS
from tests.diagnostics.networks import NNX, Residual, healthy, init

PATHS = ["BatchNorm_0", "BatchNorm_1", "stem_norm"]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def reported(capsys, path):
    """The report of a checkpoint as JSON."""
    capsys.readouterr()
    status = run(path, "--json")
    out, error = capsys.readouterr()
    assert error == ""
    return status, json.loads(out, parse_constant=pytest.fail)


def paths(capsys, path):
    return [layer["path"] for layer in reported(capsys, path)[1]["layers"]]


def state(dead=0):
    """A state of training, as a dict, with dead channels."""
    variables = init(Residual())
    var = variables["batch_stats"]["stem_norm"]["var"]
    variables["batch_stats"]["stem_norm"]["var"] = var.at[:dead].set(0)
    opt_state = optax.adam(1e-3).init(variables["params"])
    return {**variables, "step": jnp.asarray(3), "opt_state": opt_state}


def save_orbax(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def flat(tree, mark):
    return {
        name: np.asarray(leaf) for name, leaf in traverse_util.flatten_dict(tree, sep=mark).items()
    }


@pytest.mark.parametrize("name", ["functional", "linen", "nnx"])
def test_checkpoints_of_the_first_version(capsys, name):
    folder = CHECKPOINTS / "0.1.0"
    found = [
        reported(capsys, path)
        for path in (folder / f"{name}.msgpack", folder / f"{name}.safetensors")
    ]
    assert found[0] == found[1] and found[0][0] == 0 and len(found[0][1]["layers"]) >= 12
    status, by_orbax = reported(capsys, folder / "orbax" / name)
    assert status == 0 and {layer["kind"] for layer in by_orbax["layers"]} == {
        layer["kind"] for layer in found[0][1]["layers"]
    }


@pytest.mark.slow
def test_orbax_with_a_state_of_training_of_which_the_optimizer_is_left_out(capsys, tmp_path):
    assert paths(capsys, save_orbax(tmp_path / "one", state())) == PATHS
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", {"model": state(), "epoch": 3, "name": "resnet"})
    assert paths(capsys, tmp_path / "tree") == ["model/" + path for path in PATHS]


def test_orbax_with_lists_and_tuples(capsys, tmp_path):
    params, batch_stats = healthy()["params"]["norm"], healthy()["batch_stats"]["norm"]
    tree = {"params": [{"norm": params}, {"norm": params}], "batch_stats": ({"norm": batch_stats},)}
    assert paths(capsys, save_orbax(tmp_path / "lists", tree)) == ["0/norm", "1/norm"]


@pytest.mark.slow
def test_orbax_of_an_nnx_model(capsys, tmp_path):
    save_orbax(tmp_path / "nnx", nnx.state(NNX()))
    assert paths(capsys, tmp_path / "nnx") == ["norms/0", "norms/1"]


@pytest.mark.slow
@pytest.mark.parametrize("items", [None, ("state", "meta")])
def test_the_newest_step_of_a_manager_and_any_other(capsys, tmp_path, items):
    with ocp.CheckpointManager(tmp_path / "run", item_names=items) as manager:
        for step in (9, 10):
            saved = ocp.args.StandardSave(state(dead=step - 9))
            if items:
                saved = ocp.args.Composite(state=saved, meta=ocp.args.JsonSave({"position": 7}))
            manager.save(step, args=saved)
    (tmp_path / "run" / "11.orbax-checkpoint-tmp").mkdir()  # as a process leaves it that dies
    rules = {}
    for folder in ("run", "run/9", "run/10"):
        findings = reported(capsys, tmp_path / folder)[1]["findings"]
        rules[folder] = [finding["rule"] for finding in findings]
    assert sorted(rules["run"]) == sorted(rules["run/10"]) == ["dead-channels", "zero-scale"]
    assert rules["run/9"] == ["zero-scale"]


@pytest.mark.slow
def test_msgpack_and_safetensors_with_any_divider(capsys, tmp_path):
    (tmp_path / "state.msgpack").write_bytes(serialization.to_bytes(state()))
    assert paths(capsys, tmp_path / "state.msgpack") == PATHS
    for mark in "./|":
        save_file(flat(init(Residual()), mark), tmp_path / "model")
        assert paths(capsys, tmp_path / "model") == PATHS
    bfloat16 = {
        name: np.asarray(jnp.asarray(leaf, jnp.bfloat16))
        for name, leaf in flat(healthy(), "/").items()
    }
    save_file(bfloat16, tmp_path / "half.safetensors")
    assert paths(capsys, tmp_path / "half.safetensors") == ["norm"]


def test_replicas_that_a_checkpoint_holds(capsys, tmp_path):
    variables = jax.tree.map(lambda leaf: np.stack([leaf] * 4), init(Residual()))
    variables["batch_stats"]["stem_norm"]["mean"][2] += 1
    save_file(flat(variables, "/"), tmp_path / "replicas.safetensors")
    status, found = reported(capsys, tmp_path / "replicas.safetensors")
    assert found["findings"][0]["rule"] == "diverged-replicas" and status == 0


def test_the_table_the_page_and_the_status(capsys, tmp_path):
    tree = healthy()
    tree["params"]["<norm>"] = tree["params"].pop("norm")
    tree["batch_stats"] = {"<norm>": tree["batch_stats"]["norm"]}
    tree["batch_stats"]["<norm>"]["var"][3] = np.nan
    tree["params"]["<norm>"]["scale"][4] = 0
    (tmp_path / "sick").write_bytes(serialization.to_bytes(tree))
    assert run(tmp_path / "sick", "--json", tmp_path / "a.json", "--html", tmp_path / "a.html") == 1
    table = capsys.readouterr().out
    assert "x  <norm>  batch norm  32" in table and "1 error, 1 warning" in table
    assert json.loads((tmp_path / "a.json").read_text())["counts"] == {
        "error": 1,
        "warning": 1,
        "note": 0,
    }
    shown = Page((tmp_path / "a.html").read_text())
    assert shown.balanced and shown.count["svg"] >= 2 and shown.count["section"] == 2
    assert (
        not shown.links
        and "(channel 3)" in shown.text
        and "prune" in shown.text
        and "<norm>" in shown.text
    )
    assert (
        shown.text.index("non-finite")
        < shown.text.index("near-zero-scale")
        < shown.text.index("Histograms")
    )


def test_a_page_folds_what_many_layers_have_in_common(tmp_path):
    silent = {"params": {f"norm{i}": {"scale": np.zeros(4)} for i in range(12)}}
    found = Page(page(report(silent), "silent"))
    assert (
        found.balanced
        and found.count["section"] == found.count["details"] == 1
        and found.count["li"] == 12
    )


class Page(HTMLParser):
    """What a page is made of."""

    def __init__(self, html):
        super().__init__()
        self.open, self.count, self.links, self.text, self.balanced = [], {}, [], "", True
        self.feed(html)
        self.balanced &= not self.open

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [
            value for name, value in attrs if name in ("src", "href") and not value.startswith("#")
        ]
        if tag not in ("meta", "br", "rect", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        self.balanced &= bool(self.open) and self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def refused(capsys, *arguments):
    assert run(*arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("normjax.diagnostics: ") and len(error.splitlines()) == 1
    return error


def test_what_cannot_be_read_is_one_line_and_status_2(capsys, tmp_path):
    assert "nowhere: there is no such file or folder" in refused(capsys, tmp_path / "nowhere")
    (tmp_path / "empty").touch()
    assert "empty: it is empty" in refused(capsys, tmp_path / "empty")
    (tmp_path / "text").write_text("epoch 3: loss 0.2")
    assert "none of Orbax, Flax's msgpack and safetensors" in refused(capsys, tmp_path / "text")
    np.savez(tmp_path / "a.npz", var=np.ones(3))
    assert "zip archive, as of PyTorch" in refused(capsys, tmp_path / "a.npz")
    (tmp_path / "folder").mkdir()
    assert "neither _METADATA nor folders of steps" in refused(capsys, tmp_path / "folder")
    save_file({"Dense_0.kernel": np.ones((2, 2))}, tmp_path / "dense")
    assert "there is no normalization layer" in refused(capsys, tmp_path / "dense", "--json")
    (tmp_path / "good").write_bytes(serialization.to_bytes(healthy()))
    assert "nowhere/a.html: No such file" in refused(
        capsys, tmp_path / "good", "--html", tmp_path / "nowhere/a.html"
    )


@pytest.mark.parametrize("part", [0.05, 0.5, 0.99])
def test_what_was_cut_off_is_one_line_and_status_2(capsys, tmp_path, part):
    save_file(flat(healthy(), "/"), tmp_path / "a.safetensors")
    (tmp_path / "a.msgpack").write_bytes(serialization.to_bytes(healthy()))
    for path in (tmp_path / "a.safetensors", tmp_path / "a.msgpack"):
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        assert "cut off or damaged" in refused(capsys, path)


def test_orbax_with_files_missing(capsys, tmp_path):
    path = save_orbax(tmp_path / "a", healthy())
    (path / "manifest.ocdbt").unlink()
    assert "cut off or damaged: Orbax finds no arrays" in refused(capsys, path)
    (path / "_METADATA").write_text("{")
    assert "cut off or damaged (JSONDecodeError" in refused(capsys, path)


@pytest.mark.parametrize("package", ["orbax", "safetensors"])
def test_a_package_that_is_missing_is_named_with_the_extra(capsys, monkeypatch, tmp_path, package):
    path = (
        save_orbax(tmp_path / "a", healthy()) if package == "orbax" else tmp_path / "a.safetensors"
    )
    if package == "safetensors":
        save_file(flat(healthy(), "/"), path)
    monkeypatch.setattr(builtins, "__import__", without(package))
    assert f"requires the package {package}" in (error := refused(capsys, path))
    assert "pip install 'normjax[diagnostics]'" in error


def without(package):
    """The import of a machine that lacks a package."""
    there = builtins.__import__

    def importing(name, *arguments):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return there(name, *arguments)

    return importing


def test_on_a_terminal_the_table_is_rich_s_and_without_rich_plain(capsys, monkeypatch, tmp_path):
    (tmp_path / "a").write_bytes(serialization.to_bytes(healthy()))
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(tmp_path / "a") == 0
    colored = capsys.readouterr().out
    assert "\x1b[" in colored and "nothing wrong" in colored
    monkeypatch.setattr(builtins, "__import__", without("rich"))
    assert run(tmp_path / "a") == 0
    plain = capsys.readouterr().out
    assert "\x1b[" not in plain and "nothing wrong" in plain


@pytest.mark.slow
def test_ctrl_c_is_quiet(tmp_path):
    os.mkfifo(tmp_path / "a")
    command = [sys.executable, "-m", "normjax.diagnostics", tmp_path / "a"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with (tmp_path / "a").open("wb"):  # opens once the command reads it
            process.send_signal(signal.SIGINT)
            assert process.communicate() == (b"", b"")
    assert process.returncode == 130


@pytest.mark.slow
def test_as_a_process(tmp_path):
    (tmp_path / "a").write_bytes(serialization.to_bytes(healthy()))
    command = [sys.executable, "-m", "normjax.diagnostics"]
    done = subprocess.run([*command, "--json", tmp_path / "a"], capture_output=True, text=True)
    assert (
        done.returncode == 0
        and done.stderr == ""
        and json.loads(done.stdout)["layers"][0]["path"] == "norm"
    )
    asked = [sys.executable, "-X", "importtime", *command[1:], "--help"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert "CHECKPOINT [--json [FILE]]" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "normjax.diagnostics" in imported
    assert not {"orbax.checkpoint", "rich", "safetensors", "matplotlib", "flax"} & imported
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "CHECKPOINT is missing" in done.stderr
