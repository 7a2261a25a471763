"""Operators of onnx that have the output extents of com.microsoft operators, for shape inference alone.

One pass of inference then goes through most fused models, with one symbol for one extent all the way. What has no
stand-in is left to `custom_shapes`, which asks for another pass per operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx

_DOMAIN = "com.microsoft"
# onnxruntime's own operators that it also accepts in the default domain.
_STRAYS = frozenset({"SimplifiedLayerNormalization"})
# An einsum stands for products; older models are left as they are.
_EINSUM_SINCE = 12
_SUM = 3
# Before this version, every initializer was to be an input too.
_IR_OF_CONSTANTS = 4

Make = Callable[[onnx.NodeProto], "list[onnx.NodeProto] | None"]


def _node(op: str, inputs: list[str], output: str, **attributes: str) -> onnx.NodeProto:
    return onnx.helper.make_node(op, inputs, [output], None, None, None, **attributes)


def _only(node: onnx.NodeProto, *outputs: int) -> bool:
    """Whether a node makes no other outputs than these."""
    return all(not name or index in outputs for index, name in enumerate(node.output))


def _like_first(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    return [_node("Identity", [node.input[0]], node.output[0])] if _only(node, 0) else None


def _skip(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    if not _only(node, 0, _SUM):
        return None
    return [_node("Identity", [node.input[0]], name) for name in node.output if name]


def _embedding(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    ids, table = node.input[0], node.input[2]
    made = [_node("Gather", [table, ids], name) for name in (*node.output[:1], *node.output[2:3]) if name]
    if len(node.output) > 1 and node.output[1]:
        made.append(_node("Einsum", [ids], node.output[1], equation="bs->b"))
    return made


def _multi_head(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    """Query and value of rank three; an equation that does not fit tells nothing."""
    given = [slot for slot in range(3) if slot < len(node.input) and node.input[slot]]
    if not _only(node, 0) or len(given) != 3:
        return None
    return [_node("Einsum", [node.input[0], node.input[2]], node.output[0], equation="bsh,btv->bsv")]


def _grouped(node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
    packed = len(node.input) < 2 or not node.input[1]
    return None if packed else _like_first(node)


_MAKE: dict[str, Make] = {
    "BiasAdd": _like_first,
    "BiasGelu": _like_first,
    "EmbedLayerNormalization": _embedding,
    "FastGelu": _like_first,
    "Gelu": _like_first,
    "GroupQueryAttention": _grouped,
    "MultiHeadAttention": _multi_head,
    "QuickGelu": _like_first,
    "RotaryEmbedding": _like_first,
    "SimplifiedLayerNormalization": _like_first,
    "SkipLayerNormalization": _skip,
    "SkipSimplifiedLayerNormalization": _skip,
}


def is_custom(node: onnx.NodeProto) -> bool:
    """Whether an operator is one of onnxruntime's own."""
    return node.domain == _DOMAIN or (node.domain in ("", "ai.onnx") and node.op_type in _STRAYS)


def _replaced(nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    result: list[onnx.NodeProto] = []
    for node in nodes:
        make = _MAKE.get(node.op_type) if is_custom(node) else None
        made = make(node) if make is not None else None
        result += [onnx.NodeProto.FromString(node.SerializeToString())] if made is None else made
    return result


def stand_in(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with stand-ins in its main graph; the model itself where there is nothing to stand in for."""
    model = checkable(model)
    opset = max((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), default=1)
    if opset < _EINSUM_SINCE or not any(is_custom(node) and node.op_type in _MAKE for node in model.graph.node):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    nodes = _replaced(model.graph.node)
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def checkable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnx's checker wants it, where onnxruntime is more liberal; the model itself where it is not.

    onnxruntime takes some of its own operators in the default domain too, and needs no import of its domain. It takes
    initializers that are no inputs in models of IR version 3, too.
    """
    strays = [node for node in model.graph.node if is_custom(node) and node.domain != _DOMAIN]
    uses = any(node.domain == _DOMAIN for node in model.graph.node)
    imported = any(opset.domain == _DOMAIN for opset in model.opset_import)
    inputs = {value.name for value in model.graph.input}
    hidden = model.ir_version < _IR_OF_CONSTANTS and any(t.name not in inputs for t in model.graph.initializer)
    if not strays and (imported or not uses) and not hidden:
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for node in result.graph.node:
        if is_custom(node):
            node.domain = _DOMAIN
    if hidden:
        result.ir_version = _IR_OF_CONSTANTS
    if not imported and (strays or uses):
        result.opset_import.append(onnx.helper.make_opsetid(_DOMAIN, 1))
    return result
