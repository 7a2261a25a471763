"""Parts of a model: the nodes of one module, what hangs together with them, and shrinking these alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx

from onnxshrink.analyse import Analysis
from onnxshrink.errors import InputError
from onnxshrink.facts import everything, project
from onnxshrink.graph import Graph, Node
from onnxshrink.mask_arrays import near_names
from onnxshrink.notation import Relation
from onnxshrink.plan import Plan
from onnxshrink.scopes import module_path
from onnxshrink.weights import Array, BoolArray

Axis = tuple[str, int]


class Parts:
    """The nodes of a graph by the module that they were exported from.

    A node belongs to the modules whose scope it was exported in, and to those whose parameters it reads: an exporter
    that folds a BatchNorm into a convolution leaves one node for both.
    """

    def __init__(self, graph: Graph, modules: Iterable[str]) -> None:
        self.graph = graph
        self.names = [name for name in modules if name]
        self._nodes: dict[str, dict[int, Node]] = {name: {} for name in self.names}
        for node in graph.nodes:
            paths = [module_path(node.flat.source) or ""]
            paths += [name.rpartition(".")[0] for name in node.inputs if name in graph.constants]
            for path in paths:
                for owner in _owners(path):
                    if owner in self._nodes:
                        self._nodes[owner][node.index] = node

    def nodes(self, name: str) -> list[Node]:
        """The nodes of a module, in order; or the node of that name. Raises InputError."""
        if name in self._nodes:
            return [self._nodes[name][index] for index in sorted(self._nodes[name])]
        if name == "":
            return list(self.graph.nodes)
        found = [node for node in self.graph.nodes if node.label == name]
        if not found:
            names = [*self.names, *(node.label for node in self.graph.nodes)]
            raise InputError(f"there is no module or node {name!r}{near_names(name, names)}")
        return found

    def inputs(self, name: str) -> list[str]:
        """Computed tensors that a part reads and does not make, in the order in which it reads them."""
        nodes = self.nodes(name)
        made = {output for node in nodes for output in node.outputs}
        read = [n for node in nodes for n in node.inputs if n and n not in self.graph.constants]
        return [n for n in dict.fromkeys(read) if n not in made]

    def outputs(self, name: str) -> list[str]:
        """Tensors that a part makes and that others read, or that are outputs of the model, in order."""
        own = {node.index for node in self.nodes(name)}
        read = {n for node in self.graph.nodes if node.index not in own for n in node.inputs} | set(self.graph.outputs)
        return [output for node in self.nodes(name) for output in node.outputs if output in read]


def _owners(path: str) -> Iterable[str]:
    """A module and all that contain it."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def only(analysis: Analysis, inside: set[str]) -> Analysis:
    """The same analysis without the facts of tensors outside: what nothing is known of stays as it is."""
    outside = {n for node in analysis.graph.nodes for n in (*node.inputs, *node.outputs) if n and n not in inside}
    needed = {name: mask for name, mask in analysis.needed.items() if name in inside}
    needed.update({name: everything(analysis.rank(name)) for name in outside})
    known = {name: fact for name, fact in analysis.known.items() if name in inside}
    return replace(analysis, known=known, needed=needed, blind={})


def hanging_together(analysis: Analysis, plan: Plan, nodes: Iterable[Node]) -> set[str]:
    """The tensors that lose indices together with those that some nodes read or make.

    Two axes hang together where a node has them as one factor, or joins or cuts them.
    """
    neighbours = _neighbours(analysis)
    found: set[Axis] = set()
    queue = [axis for node in nodes for axis in _shrinking(analysis, plan, node)]
    while queue:
        axis = queue.pop()
        if axis not in found:
            found.add(axis)
            queue += neighbours[axis]
    return {name for name, _ in found}


def _shrinking(analysis: Analysis, plan: Plan, node: Node) -> Iterable[Axis]:
    for name in (*node.inputs, *node.outputs):
        for axis, kept in enumerate(plan.kept.get(name, ())):
            if kept is not None and (name not in plan.present or not kept.all()):
                yield name, axis


def _neighbours(analysis: Analysis) -> Mapping[Axis, list[Axis]]:
    found: defaultdict[Axis, list[Axis]] = defaultdict(list)
    for node in analysis.nodes():
        for axes in _together(node, analysis.relations[node.index]).values():
            for axis in axes:
                found[axis] += [other for other in axes if other != axis]
    return found


def _together(node: Node, relation: Relation) -> Mapping[str, list[Axis]]:
    """The axes of a node's operands by the factors in them."""
    found: defaultdict[str, list[Axis]] = defaultdict(list)
    for slot, spec in relation.slots():
        name = node.inputs[slot] if slot >= 0 else node.outputs[-1 - slot]
        for axis, factors in enumerate(spec):
            for factor in factors:
                if factor not in relation.pinned:
                    found[factor].append((name, axis))
    return found


# --- putting the output of a part back in its place ------------------------------------------------------------------


def positions_of(analysis: Analysis, name: str, axis: int, wanted: Array, where: str) -> BoolArray:
    """Check which indices of one axis of a tensor are to be computed.

    Args:
        wanted: a mask of the whole axis, or positions.
        where: what messages call the tensor.

    Raises InputError when they do not fit the axis, or when an index that is left out is live.
    """
    shape = analysis.shape(name) or ()
    extent = shape[axis] if -len(shape) <= axis < len(shape) else None
    if not isinstance(extent, int):
        raise InputError(f"{where} has no axis {axis} of fixed extent; its shape is {list(shape)}")
    mask = np.zeros(extent, np.bool_)
    if wanted.dtype == np.bool_ and wanted.shape == (extent,):
        mask |= wanted
    elif wanted.dtype.kind in "iu" and wanted.ndim == 1 and wanted.size and 0 <= wanted.min() <= wanted.max() < extent:
        mask[wanted] = True
    if not mask.any():
        raise InputError(f"reindex of {where}: give a mask of {extent}, or positions below {extent}")
    left_out = project(analysis.live(name), axis % len(shape), extent) & ~mask
    if left_out.any():
        raise InputError(f"reindex of {where} leaves out index {int(np.flatnonzero(left_out)[0])}, which is live")
    return mask


def put_back(model: onnx.ModelProto, analysis: Analysis, name: str, axis: int, mask: BoolArray) -> onnx.ModelProto:
    """Copy a model so that what reads a tensor gets only some indices of one axis from the node that makes it.

    In place of the others it gets zero, or the constant that they hold. The model computes the same.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    rank = analysis.rank(name)
    axis %= rank
    made = next(index for index, node in enumerate(result.graph.node) if name in node.output)
    node = result.graph.node[made]
    whole, padded = f"{name}_whole", f"{name}_padded"
    node.output[list(node.output).index(name)] = whole
    # One index of zeros behind the last one stands for all that are left out.
    places = np.where(mask, np.arange(mask.size), mask.size).astype(np.int64)
    pads = np.zeros(2 * rank, np.int64)
    pads[rank + axis] = 1
    constants = {f"{name}_pads": pads, f"{name}_places": places}
    fill = _fill(analysis, name, axis, mask)
    target = name if fill is None else f"{name}_placed"
    steps = [
        onnx.helper.make_node("Pad", [whole, f"{name}_pads"], [padded]),
        onnx.helper.make_node("Gather", [padded, f"{name}_places"], [target], axis=axis),
    ]
    if fill is not None:
        constants[f"{name}_constants"] = fill
        steps.append(onnx.helper.make_node("Add", [target, f"{name}_constants"], [name]))
    for offset, step in enumerate(steps, made + 1):
        result.graph.node.insert(offset, step)
    result.graph.initializer.extend(onnx.numpy_helper.from_array(value, key) for key, value in constants.items())
    return result


def _fill(analysis: Analysis, name: str, axis: int, mask: BoolArray) -> Array | None:
    """The constants, other than zero, that the indices left out hold; None where there are none."""
    known = analysis.known.get(name)
    shape = [1] * analysis.rank(name)
    shape[axis] = mask.size
    if known is None:
        return None
    found = known.nonzero() & ~mask.reshape(shape)
    return np.where(found, known.value, np.zeros((), known.value.dtype)) if found.any() else None
