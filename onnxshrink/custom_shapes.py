"""Shapes of com.microsoft operators, of which onnx's shape inference knows nothing.

Source: onnxruntime's schemas of its own operators (docs/ContribOperators.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx

from onnxshrink.protos import UNTOLD, BareNode, dims_of
from onnxshrink.stand_ins import is_custom

Dim = int | str | None
Dims = tuple[Dim, ...]
_RANK_TWO = 2


@dataclass(frozen=True, eq=False)
class _Node(BareNode):
    """A node with what is known of its inputs."""

    shapes: tuple[Dims | None, ...]

    def shape(self, slot: int) -> Dims | None:
        return self.shapes[slot] if slot < len(self.shapes) else None


Shapes = list[Dims | None]
ShapeFunction = Callable[[_Node], Shapes]


def _like_first(node: _Node) -> Shapes:
    return [node.shape(0)]


def _norm(node: _Node) -> Shapes:
    """Output, mean, inverse deviation, sum."""
    data = node.shape(0)
    statistics = None if data is None else (*data[:-1], 1)
    return [data, statistics, statistics, data]


def _simplified_norm(node: _Node) -> Shapes:
    data = node.shape(0)
    return [data, None if data is None else (*data[:-1], 1)]


def _embedding(node: _Node) -> Shapes:
    ids, words = node.shape(0), node.shape(2)
    if ids is None or words is None or len(ids) != _RANK_TWO:
        return []
    output = (ids[0], ids[1], words[-1])
    return [output, (ids[0],), output]


def _total(past: Dims | None, given: bool, length: Dim, axis: int) -> Dim:
    """Length of the keys with those of before."""
    if not given:
        return length
    before = past[axis] if past is not None else None
    return before + length if isinstance(before, int) and isinstance(length, int) else None


def _over(extent: Dim, count: int) -> Dim:
    return extent // count if isinstance(extent, int) and count else None


def _attention(node: _Node) -> Shapes:
    data, weights, past = node.shape(0), node.shape(1), node.shape(4)
    heads = int(node.attribute("num_heads", 0))
    if data is None or weights is None or not isinstance(weights[1], int) or not heads:
        return []
    sizes = node.attribute("qkv_hidden_sizes") or [weights[1] // 3] * 3
    total = None if node.attribute("past_present_share_buffer", 0) else _total(past, node.given(4), data[1], 3)
    return [(data[0], data[1], int(sizes[2])), (2, data[0], heads, total, int(sizes[0]) // heads)]


def _multi_head(node: _Node) -> Shapes:
    query, key, value = node.shape(0), node.shape(1), node.shape(2)
    heads = int(node.attribute("num_heads", 0))
    if query is None or not heads:
        return []
    if len(query) == 5:
        hidden = heads * query[4] if isinstance(query[4], int) else None
        return [(query[0], query[1], hidden), *_caches(node, heads, query[1], query[4], query[4], (6, 7))]
    if key is None:
        return []
    if len(key) == 5:
        return [query, *_caches(node, heads, key[1], key[4], key[4], (6, 7))]
    if value is None:
        return []
    if len(value) == 4:
        hidden = heads * value[3] if isinstance(value[3], int) else None
        return [(query[0], query[1], hidden), *_caches(node, heads, value[2], key[3], value[3], (6, 7))]
    widths = _over(key[2], heads), _over(value[2], heads)
    return [(query[0], query[1], value[2]), *_caches(node, heads, key[1], *widths, (6, 7))]


def _caches(node: _Node, heads: int, length: Dim, width: Dim, value_width: Dim, past: tuple[int, int]) -> Shapes:
    """Present key and value, then the scores."""
    query = node.shape(0) or (None, None)
    if node.given(8):
        length = None
    total = _total(node.shape(past[0]), node.given(past[0]), length, 2)
    scores = (query[0], heads, query[1], total)
    return [(query[0], heads, total, width), (query[0], heads, total, value_width), scores]


def _grouped(node: _Node) -> Shapes:
    query, past = node.shape(0), node.shape(3)
    heads, groups = int(node.attribute("num_heads", 0)), int(node.attribute("kv_num_heads", 0))
    if query is None or not heads or not groups:
        return []
    packed = not node.given(1)
    width = _over(query[2], heads + 2 * groups if packed else heads)
    hidden = heads * width if isinstance(width, int) else None
    # Whether the present buffer is longer than the past one is decided when the model runs.
    total = query[1] if past is None and not node.given(3) else None
    cache = (query[0], groups, total, width)
    return [(query[0], query[1], hidden), cache, cache, (query[0], heads, query[1], None)]


def _product(node: _Node) -> Shapes:
    left, right = node.shape(0), node.shape(1)
    if left is None or right is None or min(len(left), len(right)) < _RANK_TWO:
        return []
    if node.attribute("transBatchA", 0) or node.attribute("transBatchB", 0):
        return []
    rows = left[-1] if node.attribute("transA", 0) else left[-2]
    columns = right[-2] if node.attribute("transB", 0) else right[-1]
    batch = _broadcast(left[:-2], right[:-2])
    return [] if batch is None else [(*batch, rows, columns)]


def _broadcast(left: Dims, right: Dims) -> Dims | None:
    count = max(len(left), len(right))
    padded = [(1,) * (count - len(side)) + side for side in (left, right)]
    result: list[Dim] = []
    for a, b in zip(*padded, strict=True):
        if a == b or b == 1:
            result.append(a)
        elif a == 1:
            result.append(b)
        else:
            result.append(a if isinstance(a, int) else b if isinstance(b, int) else None)
    return tuple(result)


def _as(op: str) -> ShapeFunction:
    """As onnx infers it for an operator of its own that has the same extents."""

    def shapes(node: _Node) -> Shapes:
        names = node.proto.input[: len(node.shapes)]
        if any(name and shape is None for name, shape in zip(names, node.shapes, strict=True)):
            return []
        known = set(onnx.defs.get_schema(op).attributes)
        plain = onnx.NodeProto(op_type=op, input=names, output=node.proto.output[:1])
        plain.attribute.extend(attribute for attribute in node.proto.attribute if attribute.name in known)
        values = [_value(n, onnx.TensorProto.FLOAT, s or ()) for n, s in zip(names, node.shapes, strict=True) if n]
        graph = onnx.helper.make_graph([plain], "one", values, [onnx.ValueInfoProto(name=plain.output[0])])
        inferred = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph))
        return [dims_of(inferred.graph.output[0])]

    return shapes


def _present(node: _Node) -> Shapes:
    """What onnx's own attention hands on: keys and values with those of before, scores."""
    query, key, value = node.shape(0), node.shape(1), node.shape(2)
    if query is None or key is None or value is None or len(key) != len(value):
        return []
    if len(key) == 4:
        heads, groups, length, widths = query[1], key[1], key[2], (key[3], value[3])
    else:
        heads, groups, length = int(node.attribute("q_num_heads", 0)), int(node.attribute("kv_num_heads", 0)), key[1]
        widths = _over(key[2], groups), _over(value[2], groups)
    total = _total(node.shape(4), node.given(4), length, 2)
    rows = query[2] if len(query) == 4 else query[1]
    caches = [(query[0], groups, total, width) for width in widths]
    return [None, *caches, (query[0], heads, rows, total)]


# Operators of onnx of which its inference leaves outputs out.
_OWN: dict[str, ShapeFunction] = {"Attention": _present}

_FUNCTIONS: dict[str, ShapeFunction] = {
    "Attention": _attention,
    "BiasAdd": _like_first,
    "BiasGelu": _like_first,
    "EmbedLayerNormalization": _embedding,
    "FastGelu": _like_first,
    "FusedConv": _as("Conv"),
    "FusedGemm": _as("Gemm"),
    "FusedMatMul": _product,
    "Gelu": _like_first,
    "GroupQueryAttention": _grouped,
    "MultiHeadAttention": _multi_head,
    "QuickGelu": _like_first,
    "RotaryEmbedding": _like_first,
    "SimplifiedLayerNormalization": _simplified_norm,
    "SkipLayerNormalization": _norm,
    "SkipSimplifiedLayerNormalization": _norm,
}


def _value(name: str, element: int, dims: Dims) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, element, list(dims))


def fill(graph: onnx.GraphProto) -> bool:
    """Declare the outputs of operators that onnx's inference does not know. True if that told anything new.

    Args:
        graph: a graph after inference; entries are added to its `value_info`.
    """
    declared = {value.name: value for value in (*graph.input, *graph.value_info, *graph.output)}
    declared.update({t.name: _value(t.name, t.data_type, tuple(t.dims)) for t in graph.initializer})
    told: set[str] = set()
    for proto in graph.node:
        function = (_FUNCTIONS if is_custom(proto) else _OWN).get(proto.op_type)
        if function is None or (not is_custom(proto) and proto.domain not in ("", "ai.onnx")):
            continue
        values = [declared.get(name) for name in proto.input]
        node = _Node(proto, tuple(None if value is None else dims_of(value) for value in values))
        found = function(node)
        for index, (name, dims) in enumerate(zip(proto.output, found, strict=False)):
            merged = None if dims is None else _merged(dims, dims_of(declared[name]) if name in declared else None)
            if name and merged is not None:
                declared[name] = _declare(graph, _value(name, _element_type(proto, index, values), merged))
                told.add(name)
    if told:
        _forget(graph, told)
    return bool(told)


def _merged(found: Dims, before: Dims | None) -> Dims | None:
    """Extents as declared, completed by those found; None where they tell nothing new."""
    if before is None:
        return found
    if len(before) != len(found):
        return None
    merged = tuple(f if _more(f, b) else b for f, b in zip(found, before, strict=True))
    return merged if merged != before else None


def _more(found: Dim, before: Dim) -> bool:
    if isinstance(before, int) or found is None:
        return False
    return isinstance(found, int) or before is None


def _declare(graph: onnx.GraphProto, value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Add a declaration, or complete the one that is there."""
    for there in (*graph.output, *graph.value_info):
        if there.name == value.name:
            there.type.CopyFrom(value.type)
            break
    else:
        graph.value_info.append(value)
    return value


def _forget(graph: onnx.GraphProto, names: set[str]) -> None:
    """Take back symbols that inference made up behind these tensors, so that it can do better with what is told now."""
    behind = set(names)
    stale: set[str] = set()
    for proto in graph.node:
        if behind.isdisjoint(proto.input):
            continue
        behind.update(proto.output)
        if proto.domain in ("", "ai.onnx") and not is_custom(proto):
            stale.update(proto.output)
    kept = [v for v in graph.value_info if v.name not in stale or not _has_untold(v)]
    copies = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in kept]
    del graph.value_info[:]
    graph.value_info.extend(copies)


def _has_untold(value: onnx.ValueInfoProto) -> bool:
    return any(isinstance(extent, str) and extent.startswith(UNTOLD) for extent in dims_of(value) or ())


def _element_type(proto: onnx.NodeProto, output: int, inputs: list[onnx.ValueInfoProto | None]) -> int:
    """Every output has the type of the data, but for the counts that an embedding makes of its mask."""
    embeds = proto.op_type == "EmbedLayerNormalization"
    if embeds and output == 1:
        return int(onnx.TensorProto.INT32)
    source = inputs[2 if embeds else 0]
    return source.type.tensor_type.elem_type if source is not None else 0
