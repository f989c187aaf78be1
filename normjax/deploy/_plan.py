"""Plans the folds: each batch norm into the layers before it, or else into those after it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import numpy as np

from normjax._jaxpr import Op
from normjax._trees import Path
from normjax.deploy._backward import Outputs, Region, explained, pull
from normjax.deploy._constants import ROOTS
from normjax.deploy._forward import carried_forward, push
from normjax.deploy._graph import ARITHMETIC, Graph, Linear, Norm, name_of
from normjax.deploy._layout import Affine, Unfoldable
from normjax.deploy._parallel import Merge, merges, same_input_terms

Key = tuple[str, tuple[Path, ...], tuple[Path, ...]]


class Fold(NamedTuple):
    """A fold.

    Attributes:
      kind: "backward", "forward", "parallel" or "bias".
      kernels: the kernels into which it is folded.
      norms: the batch norms that are folded.
      steps: its steps in words, in program order.
      factors: the factors in between that stay in the program, in words.
      place: its position in the program.
    """

    kind: str
    kernels: tuple[Path, ...]
    norms: tuple[Path, ...]
    steps: tuple[str, ...]
    factors: tuple[str, ...]
    place: int

    @property
    def key(self) -> Key:
        """Returns what distinguishes it from other folds of the model."""
        return self.kind, self.kernels, self.norms


class Plan:
    """The folds of a program.

    Attributes:
      graph: the program.
      folds: the folds, in the order of folding.
      reasons: the reasons why batch norms are not folded.
      absorbed: the steps that become part of kernels.
      wide: the operations that run in the dtype of a batch norm's output, to avoid rounding in
        between, with that dtype.
      sinks: the linear layers whose leaves change.
      outer: the map of a linear layer's output.
      inner: the map of a linear layer's input.
      pads: the map that the border of a `pad` has to invert.
      merges: the parallel branches that become one kernel.
    """

    def __init__(self, graph: Graph, allowed: Collection[Key] | None = None):
        self.graph, self.allowed = graph, allowed
        self.folds: list[Fold] = []
        self.reasons: dict[Path, str] = {}
        self.absorbed: frozenset[Outputs] = frozenset()
        self.wide: dict[Outputs, int] = {}
        self.sinks: dict[Path, Linear] = {}
        self.outer: dict[Path, Affine] = {}
        self.inner: dict[Path, Affine] = {}
        self.pads: dict[Outputs, Affine] = {}
        self.merges: dict[Path, Merge] = {}
        # Values that are not finite raise an error later, with their path.
        with np.errstate(all="ignore"):
            self._fold_norms()
            self._merge_branches()
            self._take_up_biases()

    def _fold_norms(self) -> None:
        """Folds batch norms backward, from the last to the first, and the rest forward."""
        steps = [op for op in self.graph.program.ops if self.graph.is_step(op)]
        left = []
        for op in reversed(steps):
            if self.graph.norms_of(op) and op.outputs not in self.absorbed:
                reason = self._attempt(
                    [lambda end=end: self._backward(end) for end in self._ends(op)]
                )
                if reason is not None:
                    left.append((op, reason))
        for op, reason in reversed(left):
            if op.outputs not in self.absorbed:
                other = self._attempt([lambda op=op: self._forward(op)])
                if other is not None:
                    words = reason if other in reason else f"{reason}; {other}"
                    self.reasons |= dict.fromkeys(self.graph.norms_of(op), words)

    def _attempt(self, folds: list[Callable[[], bool]]) -> str | None:
        """Tries several folds; returns None after the first success, or else the last reason."""
        said = None
        for fold in folds:
            try:
                if fold():
                    return None
                said = said or "not named"
            except Unfoldable as reason:
                said = str(reason)
        return said

    def _ends(self, op: Op) -> list[int]:
        """Returns the values up to which leaves scale and shift after a batch norm, last first."""
        ends, number = list(op.outputs), op.outputs[0]
        while len(uses := self.graph.users[number]) == 1 and (user := uses[0]) is not None:
            if not (self.graph.is_step(user) or self.graph.passes(user)):
                break
            (number,) = user.outputs
            if self.graph.is_step(user) and self.graph.sources(user):
                ends.insert(0, number)
        return ends

    def _backward(self, end: int) -> bool:
        region = pull(self.graph, end)
        made = explained(self.graph, region, self.absorbed)
        return self._accept_backward("backward", region, made)

    def _accept_backward(self, kind: str, region: Region, made: list[Affine]) -> bool:
        fold = self._fold(kind, list(region.ops.values()), region.sinks)
        if not self._is_allowed(fold):
            return False
        self._accept(fold, list(region.ops.values()), region.sinks)
        for sink, affine in zip(region.sinks, made, strict=True):
            old = self.outer.get(sink.path)
            self.outer[sink.path] = affine if old is None else _then(old, affine)
            self.wide[sink.op.outputs] = region.root
        self.wide |= dict.fromkeys(region.ops, region.root)
        return True

    def _forward(self, op: Op) -> bool:
        spread = push(self.graph, self._chain(op))
        carried = carried_forward(self.graph, spread, self.absorbed)
        fold = self._fold("forward", list(spread.ops.values()), spread.sinks)
        if not self._is_allowed(fold):
            return False
        self._accept(fold, list(spread.ops.values()), spread.sinks)
        for sink, affine in zip(spread.sinks, carried.inner, strict=True):
            old = self.inner.get(sink.path)
            self.inner[sink.path] = affine if old is None else _then(affine, old)
        for outputs, affine in carried.pads.items():
            old = self.pads.get(outputs)
            self.pads[outputs] = affine if old is None else _then(affine, old)
        return True

    def _chain(self, op: Op) -> list[Op]:
        """Returns the operations of a batch norm from its first reader up to an operation."""
        graph, chain = self.graph, [op]
        while graph.passes(maker := graph.makers.get(graph.data(chain[0])[0])) or graph.is_step(
            maker
        ):
            if maker is None or graph.users[maker.outputs[0]] != [chain[0]]:
                break
            chain.insert(0, maker)
        own = {path for norm in graph.norms_of(op) for path in (norm.mean, norm.var)}
        while not (graph.is_step(chain[0]) and own & graph.sources(chain[0])):
            chain.pop(0)
        return chain

    def _fold(self, kind: str, ops: list[Op], sinks: list[Linear]) -> Fold:
        new = [op for op in ops if self.graph.is_step(op) and op.outputs not in self.absorbed]
        norms: dict[Norm, None] = {}
        for op in new:
            norms |= dict.fromkeys(self.graph.norms_of(op))
        words = {op.outputs: f"`{op.name}` of {self.graph.text(op)}" for op in new}
        steps = tuple(words[op.outputs] for op in new if self.graph.is_folded(op))
        factors = tuple(words[op.outputs] for op in new if not self.graph.is_folded(op))
        kernels = tuple(sink.path for sink in sinks)
        place = min(sink.output for sink in sinks)
        return Fold(kind, kernels, tuple(map(tuple, norms)), steps, factors, place)

    def _is_allowed(self, fold: Fold) -> bool:
        return self.allowed is None or fold.key in self.allowed

    def _accept(self, fold: Fold, ops: list[Op], sinks: list[Linear]) -> None:
        self.folds.append(fold)
        steps = [op for op in ops if self.graph.is_step(op) and self.graph.is_folded(op)]
        self.absorbed |= {op.outputs for op in steps}
        self.sinks |= {sink.path: sink for sink in sinks}

    def _merge_branches(self) -> None:
        """Merges branches that read the same value and are added, as in RepVGG."""
        for terms in same_input_terms(self.graph, self.absorbed, self.inner):
            for merge in merges(self.graph, terms, self.outer, self.absorbed):
                ops = [op for term in merge.terms for op in term.ops]
                linear = [term.linear for term in merge.terms if term.linear is not None]
                fold = self._fold("parallel", ops, linear)
                known = {kernel for each in self.folds for kernel in each.kernels}
                has_norms = bool(fold.norms) or bool(known & set(fold.kernels))
                if not has_norms or not self._is_allowed(fold):
                    continue
                self._accept(fold, ops, linear)
                self.merges[merge.target.path] = merge
                for norm in fold.norms:
                    self.reasons.pop(norm, None)

    def _take_up_biases(self) -> None:
        """Merges a bias into the new bias of a layer."""
        for path in (*self.inner, *self.merges):
            sink = self.sinks[path]
            if path in self.outer:
                continue
            uses = self.graph.users[sink.output]
            op = uses[0] if len(uses) == 1 else None
            while op is not None and op.name == "convert_element_type":
                uses = self.graph.users[op.outputs[0]]
                op = uses[0] if len(uses) == 1 else None
            if op is None or op.name != "add" or len(sources := self.graph.sources(op)) != 1:
                continue
            (leaf,) = sources
            if self.graph.is_step(op) and self.graph.alone(self.graph.program.leaves[leaf], op):
                self._attempt([lambda op=op: self._bias(op)])

    def _bias(self, op: Op) -> bool:
        region = pull(self.graph, op.outputs[0])
        made = explained(self.graph, region, self.absorbed)
        return self._accept_backward("bias", region, made)

    def merged(self, path: Path) -> Path:
        """Returns the kernel into which another kernel was merged."""
        for target, merge in self.merges.items():
            if any(term.linear is not None and term.linear.path == path for term in merge.terms):
                return target
        return path

    def reason(self, norm: Norm) -> str:
        """Returns the reason why a batch norm is not folded, and a fix."""
        said = self.reasons.get(norm)
        if (user := self._other_user(norm)) is not None and said is None:
            loop = user.name in ("scan", "while")
            todo = ": write the loop in Python, with variables for each turn" if loop else ""
            return f"it is used by {name_of(user)}{todo}"
        if not any(is_root_of(self.graph, op, norm.var) for op in self.graph.program.ops):
            return (
                "its variance normalizes nothing here: the function takes the statistics of the "
                "batch. Pass one that does inference, such as functools.partial(model.apply, "
                f"train=False){f' ({said})' if said else ''}"
            )
        return said or "its variance is used in another way than to scale one value"

    def _other_user(self, norm: Norm) -> Op | None:
        """Returns an operation that reads the variance of a batch norm and is not arithmetic."""
        sources = self.graph.constants.sources
        for op in self.graph.program.ops:
            reads = any(norm.var in sources.get(number, ()) for number in op.inputs)
            if reads and self.graph.data(op) and op.name not in ARITHMETIC:
                return op
        return None


def is_root_of(graph: Graph, op: Op, path: Path) -> bool:
    """Returns whether an operation computes the square root of a leaf, up to constants."""
    sources = [graph.constants.sources.get(number) for number in op.inputs]
    return (
        op.name in ROOTS and None not in sources and any(path in each for each in sources if each)
    )


def _then(first: Affine, second: Affine) -> Affine:
    """Returns the composition of two maps."""
    multiplier = second.multiplier * first.multiplier
    return Affine(multiplier, second.multiplier * first.shift + second.shift)
