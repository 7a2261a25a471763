"""Carry out a plan: slice constants, change attributes, rewire nodes. Names no operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.collector import paused
from onnxshrink.edit import Editor
from onnxshrink.graph import Node
from onnxshrink.lazy import LazyModel
from onnxshrink.notation import Relation, joined_inputs
from onnxshrink.planning.data import Kept, Plan
from onnxshrink.registry import Rewrite
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, Values, taken


@paused()
def apply(analysis: Analysis, plan: Plan) -> LazyModel:
    """The smaller model; its weights are cut when they are read. The graph that was analysed is not changed."""
    editor = Editor(analysis.graph)
    for node in analysis.graph.nodes:
        if node.index in analysis.taken:
            for index, name in enumerate(node.outputs):
                if name:
                    editor.settle(editor.find(node), index, analysis.constants[name].array())
    cut = _cut_constants(analysis, plan)
    for node in analysis.nodes():
        if node.index in plan.settled:
            for index, value in enumerate(plan.settled[node.index]):
                kept = taken(value, plan.kept[node.outputs[index]])
                editor.settle(editor.find(node), index, np.asarray(kept, order="C"))
        elif any(name in plan.present for name in node.outputs):
            _Site(analysis, plan, editor, node, cut).rewrite()
    return editor.export({name: _extents(kept) for name, kept in plan.kept.items()})


def _cut_constants(analysis: Analysis, plan: Plan) -> frozenset[str]:
    """Constants that every use cuts."""
    found: dict[str, bool] = {}
    for node in analysis.nodes():
        for slot, kept in plan.constants.get(node.index, {}).items():
            cut = any(mask is not None and not mask.all() for mask in kept)
            found[node.inputs[slot]] = found.get(node.inputs[slot], True) and cut
    return frozenset(name for name, cut in found.items() if cut)


def _extents(kept: Kept) -> list[int | None]:
    return [None if mask is None else int(np.count_nonzero(mask)) for mask in kept]


def plan_view(analysis: Analysis, plan: Plan, node: Node) -> View:
    """A node as its rule sees it once the plan is made."""
    frozen = frozenset(plan.frozen.get(node.index, {}))
    view = replace(analysis.view(node), blocks=plan.blocks.get(node.index), frozen=frozen)
    view.kept.update(plan.constants.get(node.index, {}))
    for slot, name in enumerate(node.inputs):
        if slot not in view.kept and name in plan.kept:
            view.kept[slot] = plan.kept[name]
    for index, name in enumerate(node.outputs):
        if name in plan.kept:
            view.kept[-1 - index] = plan.kept[name]
    view.folds.update(plan.folds.get(node.index, {}))
    return view


class _Site:
    """One node being rewritten."""

    def __init__(self, analysis: Analysis, plan: Plan, editor: Editor, node: Node, cut: frozenset[str]) -> None:
        self.editor = editor
        self.cut = cut
        self.analysis = analysis
        self.plan = plan
        self.node = node
        self.view = plan_view(analysis, plan, node)
        self.rule = analysis.rules[node.index]
        self.relation: Relation = analysis.relations[node.index]
        self.target = editor.find(node)

    def rewrite(self) -> None:
        rewrite = self.rule.rewrite(self.view) if self.rule is not None and self.rule.rewrite else Rewrite()
        self._slice_constants(set(rewrite.constants))
        for slot, value in rewrite.constants.items():
            self._replace(slot, value)
        for slot, (mask, value) in rewrite.partly.items():
            self.editor.fix_input(self.target, slot, mask, value)
        for slot, axis in rewrite.append.items():
            operand = self.view.data(slot)
            self.editor.append_ones(self.target, slot, axis, operand.rank, operand.dtype, operand.framed is not None)
        self.editor.set_attributes(self.target, rewrite.attributes)
        self._drop_absent()
        self._correct(rewrite)
        for index, axes in rewrite.select.items():
            for axis, indices in axes.items():
                self.editor.select(self.target, index, axis, indices)
        if rewrite.nodes:
            self.editor.replace(self.target, self.node.proto, rewrite.nodes, rewrite.weights)
        if rewrite.bypass is not None:
            self.editor.bypass(self.target, rewrite.bypass)

    def _slice_constants(self, replaced: set[int]) -> None:
        frozen = self.plan.frozen.get(self.node.index, {})
        for slot, kept in self.plan.constants.get(self.node.index, {}).items():
            operand = self.view.inputs[slot]
            if slot in replaced or operand is None or slot >= len(self.node.inputs):
                continue
            if slot in frozen:
                value = np.asarray(taken(frozen[slot], kept), order="C")
                self._connect(slot, operand, Values.of(value), None)
            elif any(mask is not None and not mask.all() for mask in kept) or self._is_folded(operand):
                key = (operand.name, tuple(None if m is None else m.tobytes() for m in kept))
                assert operand.constant is not None
                self._connect(slot, operand, operand.constant.cut(kept), key)

    def _is_folded(self, operand: Operand) -> bool:
        """Whether a constant is computed from others that it may free when written out: integers, or cut weights."""
        weights = operand.constant
        if operand.name not in self.analysis.derived or weights is None:
            return False
        sources = self.analysis.sources.behind(operand.name, self.analysis.derived)
        freed = sum(self.analysis.constants[name].nbytes for name in sources & self.cut)
        return weights.dtype.kind in "iub" or weights.nbytes < freed

    def _connect(self, slot: int, operand: Operand, values: Values, key: Any) -> None:
        tensor = self.editor.constant(f"{operand.name}_shrunk", values, key)
        self.editor.set_input(self.target, slot, tensor)

    def _replace(self, slot: int, value: Array | Callable[[], Array]) -> None:
        operand = self.view.input(slot)
        name = operand.name if operand is not None else f"{self.node.outputs[0]}_input{slot}"
        read = value if callable(value) else lambda: value
        self.editor.set_input(self.target, slot, self.editor.constant(f"{name}_shrunk", read))

    def _drop_absent(self) -> None:
        """Leave out inputs and outputs that keep nothing on the axis along which they are joined."""
        gone = [
            slot
            for slot, axis in joined_inputs(self.relation).items()
            if (mask := self.view.kept[slot][axis]) is not None and not mask.any()
        ]
        self.editor.drop_inputs(self.target, gone)
        if self._cuts():
            absent = [i for i, name in enumerate(self.node.outputs) if name not in self.plan.present]
            self.editor.drop_outputs(self.target, absent)
            gone += absent
        if gone and len(self.target.outputs) == 1 and self._joins_one():
            self.editor.bypass(self.target, 0)

    def _joins_one(self) -> bool:
        """Whether what was joined or cut is down to one piece, which is the whole."""
        return (len(joined_inputs(self.relation)) > 1 and len(self.target.inputs) == 1) or self._cuts()

    def _cuts(self) -> bool:
        """Whether the outputs are pieces of one axis."""
        return any(len({link.output for link in links}) > 1 for links in self.relation.links.values())

    def _correct(self, rewrite: Rewrite) -> None:
        if rewrite.fixed is not None:
            self.editor.fix_output(self.target, *rewrite.fixed)
        target = self.target
        if rewrite.multiply is not None:
            target = self.editor.scale(target, rewrite.multiply)
        if rewrite.add is not None:
            self.editor.add(target, rewrite.add)
