"""Finds the kind of each parameter by its name, and which parameters should decay."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import PyTree

from normjax import _checks
from normjax._trees import KeyPath, path_names, plain, show

Kind = Literal["kernel", "embedding", "scale", "bias", "activation", "statistic"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_WHOLE: dict[str, Kind] = {
    "lora_a": "kernel",
    "lora_b": "kernel",
    "weight_v": "kernel",
    "weight_g": "scale",
}
_SAY: dict[Kind, str] = {
    "kernel": "kernel kernels w weight weights",
    "embedding": "embedding embeddings embed embeds",
    "scale": "scale scales gamma gain",
    "bias": "bias biases b offset beta",
    "activation": "alpha threshold tau epsilon slope",
    "statistic": "mean var variance count",
}
_WORDS: dict[str, Kind] = {word: kind for kind, words in _SAY.items() for word in words.split()}
_ABBREVIATED = ("bn", "ln", "gn")


def kind_of(params: PyTree, *, names: Mapping[str, Kind] | None = None) -> PyTree[str]:
    """Returns the kind of each parameter, found by its name.

    The rank of an array does not determine its kind: a kernel may have rank 1, and the bias of
    attention heads, `(heads, size)`, or a conditional scale, `(classes, features)`, is not a
    kernel. These rules are applied in order:

    1. An entry of `names` applies first.
    2. A leaf below `batch_stats` is a "statistic", and so are `u` and `sigma` side by side. A leaf
       below `scales` (of `nnx.WeightNorm`) is a "scale".
    3. The last name is split at underscores, without digits, in lower case. If all of its words
       that are in this table have the same kind, this is its kind:

       | kind | words | layers |
       |---|---|---|
       | "kernel" | kernel, w, weight | dense, convolution, attention, recurrent cells |
       | "embedding" | embedding, embed | lookup tables, positions |
       | "scale" | scale, gamma, gain | normalization |
       | "bias" | bias, b, offset, beta | all layers |
       | "activation" | alpha, threshold, tau, epsilon, slope | dynamic tanh, FRN, PReLU |
       | "statistic" | mean, var, count | running statistics |

    4. A `weight` or `w` in a module named after a normalization (`norm1`, `layer_norm`, `bn`) is
       its "scale", as in PyTorch. A `weight` of rank 1 elsewhere is ambiguous: it raises an error.

    Args:
      params: the parameters of a linen or Haiku model, an nnx module or its state, or any tree of
        named arrays.
      names: kinds by the last name of a leaf, or by the end of its path: `{"cls": "bias",
        "head/table": "kernel"}`.

    Returns:
      A tree with the structure of `params` (without nnx variables), with the kinds as strings.

    Raises:
      ValueError: if the names of leaves do not determine their kinds (the error lists their paths);
        if a kind is unknown.

    Example:
      >>> import jax, jax.numpy as jnp, normjax as nj
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 8))}, "norm": nj.batch_norm_init(8)[0]}
      >>> params["cls"] = jnp.ones(8)
      >>> print(nj.optim.kind_of(params, names={"cls": "embedding"}))
      {'cls': 'embedding', 'conv': {'kernel': 'kernel'}, 'norm': {'bias': 'bias', 'scale': 'scale'}}
    """
    given: dict[str, Kind] = dict(names or {})
    for key, kind in given.items():
        _checks.choice("kind_of", f"names[{key!r}]", kind, KINDS)
    leaves, structure = jax.tree_util.tree_flatten_with_path(plain(params))
    paths = [path_names(path) for path, _ in leaves]
    kinds = [
        _kind(path, np.ndim(leaf), given, paths)
        for path, (_, leaf) in zip(paths, leaves, strict=True)
    ]
    unknown = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind is None]
    if unknown:
        _raise_unknown(unknown)
    return jax.tree.unflatten(structure, kinds)


def decay_mask(
    params: PyTree,
    *,
    kinds: Collection[Kind] = ("kernel", "embedding"),
    names: Mapping[str, Kind] | None = None,
) -> PyTree[bool]:
    """Returns which parameters should decay: kernels and embeddings, but not scales and biases.

    Pass it as the mask of an optax transformation, directly or with `functools.partial`. It only
    reads names and shapes, so it can be called inside `jax.jit`.

    Args:
      params: as in `kind_of`.
      kinds: the kinds that decay; `("kernel",)` also leaves out embeddings.
      names: as in `kind_of`.

    Returns:
      A tree with the structure of `params` (without nnx variables), of Python bools.

    Raises:
      ValueError: as in `kind_of`.

    Example:
      >>> import jax.numpy as jnp, normjax as nj, optax
      >>> query = {"kernel": jnp.ones((8, 2, 4)), "bias": jnp.ones((2, 4))}
      >>> params = {"query": query, "norm": nj.rms_norm_init(8)[0]}
      >>> print(nj.optim.decay_mask(params))
      {'norm': {'scale': False}, 'query': {'bias': False, 'kernel': True}}
      >>> optimizer = optax.adamw(1e-3, weight_decay=0.1, mask=nj.optim.decay_mask)

    References:
      van Laarhoven, "L2 Regularization versus Batch and Weight Normalization" (2017): decay of a
      kernel before normalization sets its learning rate; see `effective_learning_rate`.
    """
    for kind in kinds:
        _checks.choice("decay_mask", "kinds", kind, KINDS)
    return jax.tree.map(lambda kind: kind in kinds, kind_of(params, names=names))


def _kind(
    path: tuple[str, ...], rank: int, given: Mapping[str, Kind], paths: list[tuple[str, ...]]
) -> Kind | None:
    whole = "/".join(path)
    for key, kind in given.items():
        if f"/{whole}".endswith(f"/{key}"):
            return kind
    if not path:
        return None
    *above, name = path
    beside = {other[-1] for other in paths if other and other[:-1] == path[:-1]}
    if "batch_stats" in above or (name in ("u", "sigma") and {"u", "sigma"} <= beside):
        return "statistic"
    if "scales" in above:
        return "scale"
    words = _words(name)
    said: set[Kind] = {_WORDS[word] for word in words if word in _WORDS}
    kind: Kind | None = _WHOLE.get(name) or (said.pop() if len(said) == 1 else None)
    if kind == "kernel" and name not in _WHOLE and "kernel" not in words and "kernels" not in words:
        if _normalizes(above):
            return "scale"
        return None if rank < 2 and "w" not in words else kind
    return kind


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W_\d]+", name.lower()) if word]


def _normalizes(above: list[str]) -> bool:
    """Returns whether the nearest named module normalizes activations."""
    words = next((words for words in map(_words, reversed(above)) if words), [])
    of_kernels = any(word.startswith(("weight", "spectral")) for word in words)
    return not of_kernels and any(word.endswith("norm") or word in _ABBREVIATED for word in words)


def _raise_unknown(unknown: list[tuple[KeyPath, Any]]) -> None:
    shown = [f"{show('params', path)} of shape {np.shape(leaf)}" for path, leaf in unknown[:5]]
    listed = ", ".join(shown)
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    last = (path_names(unknown[0][0]) or ("",))[-1]
    _checks.raise_error(
        "kind_of",
        "names do not determine the kinds of parameters",
        expected="names such as 'kernel', 'w', 'embedding', 'scale', 'bias'",
        got=f"{listed}{more}",
        fix=f"Pass names={{{last!r}: 'kernel'}}, or another of {', '.join(map(repr, KINDS))}",
    )
