"""Shapes of all tensors: onnx's inference, and extents that follow from it by cancelling free dimensions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxshrink import symbols
from onnxshrink.custom_shapes import fill
from onnxshrink.protos import dims_of
from onnxshrink.stand_ins import stand_in

_ROUNDS = 256
_LIKE_INPUT = frozenset({"GroupNormalization", "MeanVarianceNormalization"})


def infer(skeleton: onnx.ModelProto) -> onnx.GraphProto:
    """The graph with as many shapes as can be told. What cannot be told is left out: it is kept whole later."""
    skeleton = stand_in(skeleton)
    symbols.forget_invented(skeleton.graph)
    for _ in range(_ROUNDS):
        try:
            inferred = onnx.shape_inference.infer_shapes(skeleton, data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            # Inference is a help, not a need.
            return skeleton.graph
        found = _cancelled(inferred.graph)
        found |= _like_input(inferred.graph)
        found |= fill(inferred.graph)
        found |= symbols.fill(inferred.graph)
        if not found:
            return inferred.graph
        skeleton = inferred
    return skeleton.graph


def with_knowledge(
    skeleton: onnx.ModelProto,
    values: Mapping[str, np.ndarray[Any, Any]],
    shapes: Mapping[str, tuple[tuple[int | str | None, ...], int]],
) -> onnx.ModelProto:
    """A copy in which some tensors of the main graph are initializers, and some have a shape and type."""
    model = onnx.ModelProto()
    model.CopyFrom(skeleton)
    graph = model.graph
    nodes = [node for node in graph.node if not all(name in values for name in node.output if name)]
    made = {name for node in nodes for name in node.output} | {tensor.name for tensor in graph.initializer}
    interface = {value.name for value in (*graph.input, *graph.output)}
    gone = {name for node in graph.node for name in node.output} - made - interface
    keep = [node for node in graph.node if not node.output or not gone.issuperset(name for name in node.output if name)]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in keep]
    del graph.node[:]
    graph.node.extend(copies)
    for name in sorted(gone):
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values[name], order="C"), name))
    known = {value.name: value for value in graph.value_info}
    for name, (shape, kind) in shapes.items():
        if name not in interface and name in made and kind:
            value = known.get(name) or graph.value_info.add(name=name)
            names = [extent if isinstance(extent, int) else None for extent in shape]
            value.type.CopyFrom(onnx.helper.make_tensor_type_proto(kind, names))
    return model


def _like_input(graph: onnx.GraphProto) -> bool:
    """Outputs that have the shape of the first input, where inference through the operator's function body fails."""
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    changed = False
    for node in graph.node:
        if node.op_type not in _LIKE_INPUT or node.domain not in ("", "ai.onnx"):
            continue
        source, target = values.get(node.input[0]), values.get(node.output[0])
        if source is None or dims_of(source) is None or (target is not None and dims_of(target) is not None):
            continue
        if target is None:
            target = graph.value_info.add(name=node.output[0])
            values[target.name] = target
        target.type.CopyFrom(source.type)
        changed = True
    return changed


def _cancelled(graph: onnx.GraphProto) -> bool:
    """Fill in the one unknown extent of a Reshape whose other free dimensions are those of its input."""
    values = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    changed = False
    for node in graph.node:
        if node.op_type != "Reshape" or node.domain not in ("", "ai.onnx"):
            continue
        source, target = values.get(node.input[0]), values.get(node.output[0])
        if source is None or target is None:
            continue
        before, after = dims_of(source), dims_of(target)
        found = None if before is None or after is None else cancel(before, after)
        if found is not None:
            axis, extent = found
            target.type.tensor_type.shape.dim[axis].dim_value = extent
            changed = True
    return changed


def cancel(before: Sequence[int | str | None], after: Sequence[int | str | None]) -> tuple[int, int] | None:
    """Axis and extent of the one extent in `after` that follows from equal numbers of elements, if there is one."""
    own = Counter(extent for extent in before if isinstance(extent, str))
    unknown = [axis for axis, extent in enumerate(after) if not isinstance(extent, int) and extent not in own]
    if None in before or len(unknown) != 1:
        return None
    if own != Counter(extent for axis, extent in enumerate(after) if isinstance(extent, str) and axis != unknown[0]):
        return None
    total = math.prod(extent for extent in before if isinstance(extent, int))
    rest = math.prod(extent for extent in after if isinstance(extent, int))
    return (unknown[0], total // rest) if rest and total % rest == 0 else None
