"""Writes checkpoints as users do: functional layers, a linen and an nnx model, three formats.

    python -m tests.checkpoints.write

writes a folder for this version. Folders that are there stay as they are: every later version must
still read them.
"""

import pathlib

import jax
import orbax.checkpoint as ocp
from flax import nnx, serialization, traverse_util
from safetensors.flax import save_file

import normjax as nj
from tests.checkpoints import trees

HERE = pathlib.Path(__file__).parent
# of paths in a file of safetensors; names of linen's wrappers have slashes and dots may be anywhere
SEPARATOR = "|"


def flat(tree):
    return traverse_util.flatten_dict(tree, sep=SEPARATOR)


def main():
    folder = HERE / nj.__version__
    folder.mkdir()
    model = trees.nnx_model()
    contents = {
        "functional": trees.functional(),
        "linen": trees.linen_variables(),
        "nnx": nj.convert.nnx_to_linen(model),
    }
    for name, tree in contents.items():
        (folder / f"{name}.msgpack").write_bytes(serialization.to_bytes(tree))
        save_file(flat(tree), folder / f"{name}.safetensors")
    with ocp.StandardCheckpointer() as checkpointer:
        for name, tree in (contents | {"nnx": nnx.state(model)}).items():
            checkpointer.save(folder / "orbax" / name, tree)
    outputs = trees.functional_outputs(contents["functional"])
    outputs |= {"linen": trees.linen_output(contents["linen"]), "nnx": model(trees.x())}
    save_file(jax.tree.map(jax.numpy.asarray, outputs), folder / "outputs.safetensors")


if __name__ == "__main__":
    main()
