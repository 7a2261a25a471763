"""Run one node on given values: onnxruntime first, since its answer is the one that counts, else onnx's reference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxshrink.weights import Array

_IR_VERSION = 10
_CACHE_SIZE = 512
_sessions: OrderedDict[bytes, Any] = OrderedDict()


def _one_node_model(
    node: onnx.NodeProto,
    opsets: Sequence[tuple[str, int]],
    inputs: Sequence[Array | None],
    functions: Sequence[onnx.FunctionProto],
) -> bytes:
    bare = onnx.NodeProto()
    bare.op_type, bare.domain = node.op_type, node.domain
    bare.attribute.extend(node.attribute)
    values = []
    for index, array in enumerate(inputs):
        bare.input.append("" if array is None else f"i{index}")
        if array is not None:
            code = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            values.append(onnx.helper.make_tensor_value_info(f"i{index}", code, [None] * array.ndim))
    results = []
    for index, name in enumerate(node.output):
        bare.output.append(f"o{index}" if name else "")
        if name:
            results.append(onnx.ValueInfoProto(name=f"o{index}"))
    graph = onnx.helper.make_graph([bare], "one", values, results)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION, functions=functions)
    return bytes(model.SerializeToString(deterministic=True))


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _runner(model: bytes) -> Any:
    """A cached session, or None when onnxruntime cannot run the operator on these types."""
    if model in _sessions:
        _sessions.move_to_end(model)
        return _sessions[model]
    try:
        session = _session(model)
    except Exception:
        # onnxruntime has no narrower base class for "cannot build a session": whatever it says, there is none.
        session = None
    _sessions[model] = session
    if len(_sessions) > _CACHE_SIZE:
        _sessions.popitem(last=False)
    return session


def evaluate(
    node: onnx.NodeProto,
    opsets: Sequence[tuple[str, int]],
    inputs: Sequence[Array | None],
    functions: Sequence[onnx.FunctionProto] = (),
) -> list[Array] | None:
    """Outputs of `node` on `inputs` (None for one left out); None when nothing here can run it.

    Args:
        node: the node; its subgraphs must not read outer tensors.
        opsets: pairs of domain and version.
        inputs: values by position.
        functions: of the model that the node is from.
    """
    model = _one_node_model(node, opsets, inputs, functions)
    feeds = {f"i{index}": np.ascontiguousarray(array) for index, array in enumerate(inputs) if array is not None}
    feeds = {name: feed.reshape(inputs[int(name[1:])].shape) for name, feed in feeds.items()}  # type: ignore[union-attr]
    session = _runner(model)
    if session is not None:
        try:
            return [np.asarray(value) for value in session.run(None, feeds)]
        except Exception:
            # Values that the kernel refuses (a type, a zero extent): the reference may still know.
            pass
    return _reference(model, feeds)


def _reference(model: bytes, feeds: dict[str, Array]) -> list[Array] | None:
    from onnx.reference import ReferenceEvaluator

    try:
        with np.errstate(all="ignore"):
            results = ReferenceEvaluator(onnx.ModelProto.FromString(model)).run(None, feeds)
    except Exception:
        # The reference raises whatever numpy raises; a node that cannot be run is simply not known.
        return None
    return [np.asarray(value) for value in results]


def run_nodes(
    nodes: Sequence[onnx.NodeProto],
    opsets: Sequence[tuple[str, int]],
    values: Mapping[str, Array],
    outputs: Sequence[str],
    functions: Sequence[onnx.FunctionProto] = (),
) -> list[Array] | None:
    """Named outputs of a few nodes on named values; None when onnxruntime does not run them."""
    read = {name for node in nodes for name in node.input}
    feeds = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in values.items() if name in read}
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in feeds.items()}
    inputs = [onnx.helper.make_tensor_value_info(name, kinds[name], list(feeds[name].shape)) for name in feeds]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = onnx.helper.make_graph(list(nodes), "nodes", inputs, results)
    imports = [onnx.helper.make_opsetid(domain, version) for domain, version in opsets]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=_IR_VERSION, functions=functions)
    session = _runner(bytes(model.SerializeToString(deterministic=True)))
    if session is None:
        return None
    try:
        return [np.asarray(value) for value in session.run(None, feeds)]
    except Exception:
        # onnxruntime's exceptions share no base class of their own; whichever it is, the nodes do not run.
        return None
