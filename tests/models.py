"""Small models written as text, and what tests ask of a shrunk one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime

from onnxshrink.analyse import analyse
from onnxshrink.apply import apply
from onnxshrink.graph import Graph
from onnxshrink.plan import Plan, make_plan
from onnxshrink.planning.align import Alignment

Array = np.ndarray[Any, Any]
# Sums in another order: a few units in the last place of float32, relative to the range.
ROUNDING = 3e-6


def build(text: str, *, opset: int = 17, ir: int = 8, **weights: Array) -> onnx.ModelProto:
    """A model from the text of its graph, `name (inputs) => (outputs) { nodes }`, and its initializers."""
    header = f'<ir_version: {ir}, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    proto = onnx.parser.parse_model(header + text)
    for name, value in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), name))
    return proto


def run(model: onnx.ModelProto, **feeds: Array) -> list[Array]:
    """Outputs in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [np.asarray(value) for value in session.run(None, feeds)]


def shrunk(model: onnx.ModelProto) -> onnx.ModelProto:
    """The smaller model, by the engine alone."""
    return shrunk_with_plan(model)[0]


def shrunk_with_plan(model: onnx.ModelProto, alignment: Alignment | None = None) -> tuple[onnx.ModelProto, Plan]:
    """The smaller model and the plan that made it."""
    analysis = analyse(Graph(model))
    plan = make_plan(analysis, alignment)
    small = apply(analysis, plan).whole()
    if _passes_check(model):
        onnx.checker.check_model(small, full_check=True)
    return small, plan


def _passes_check(model: onnx.ModelProto) -> bool:
    """Some valid models fail the full check: shape inference does not know every function operator's body."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return False
    return True


def weight(model: onnx.ModelProto, name: str) -> Array:
    """An initializer."""
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    return onnx.numpy_helper.to_array(tensor)


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of the initializers by name."""
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


def operators(model: onnx.ModelProto) -> list[str]:
    """Operator types in order."""
    return [node.op_type for node in model.graph.node]


def parameters(model: onnx.ModelProto) -> int:
    """Elements of floating-point initializers."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
    return sum(int(np.prod(t.dims, dtype=np.int64)) for t in model.graph.initializer if t.data_type in kinds)


def check_same(model: onnx.ModelProto, small: onnx.ModelProto, tolerance: float = ROUNDING, **feeds: Array) -> None:
    """Equal outputs, relative to their range."""
    for before, after in zip(run(model, **feeds), run(small, **feeds), strict=True):
        assert before.shape == after.shape
        assert before.dtype == after.dtype
        scale = float(np.abs(before.astype(np.float64)).max()) or 1.0
        np.testing.assert_allclose(
            after.astype(np.float64) / scale, before.astype(np.float64) / scale, rtol=0, atol=tolerance
        )


def draw(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Random values without a zero."""
    values = np.random.default_rng([seed, *shape]).uniform(0.2, 1.2, shape)
    signs = np.random.default_rng([seed + 1, *shape]).choice([-1.0, 1.0], shape)
    return (values * signs).astype(dtype)


def dead(values: Array, *rows: int, axis: int = 0) -> Array:
    """A copy with some slices zero."""
    values = values.copy()
    values[(slice(None),) * axis + (list(rows),)] = 0
    return values
