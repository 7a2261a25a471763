"""Running models in onnxruntime, and comparing what they give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from onnxshrink.errors import OnnxshrinkError, RuleError
from onnxshrink.weights import Array

Feed = Mapping[str, Array]

# Shares of an output's range that two ways to compute it may differ by: a few dozen roundings of each type. Two models
# may also differ by this multiple of what the first one differs by from itself, optimised and not.
TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
NOISE_FACTOR = 20.0


class RuleViolation(RuleError, AssertionError):  # noqa: N818 - reads as what it says
    """A rule claims something that is not so."""


class InputsCannotRun(OnnxshrinkError):  # noqa: N818 - reads as what it says
    """onnxruntime does not load the model, or does not run it on these inputs: nothing can be checked."""


def run(model: onnx.ModelProto, feeds: Sequence[Feed], optimised: bool = False) -> list[list[Array]]:
    """Outputs of a model in onnxruntime, per feed. Raises InputsCannotRun."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        wanted = {value.name for value in session.get_inputs()}
        fed = [
            {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in f.items() if name in wanted} for f in feeds
        ]
        return [[np.asarray(value) for value in session.run(None, feed)] for feed in fed]
    except Exception as error:
        # onnxruntime's exceptions share no base class of their own; whichever it is, the model does not run.
        raise InputsCannotRun(f"onnxruntime: {str(error).splitlines()[0] if str(error) else error!r}") from None


def run_every_tensor(model: onnx.ModelProto, feeds: Sequence[Feed]) -> list[dict[str, Array]]:
    """Values of every computed tensor of the main graph, per feed."""
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    names = [name for node in model.graph.node for name in node.output if name]
    del exposed.graph.output[:]
    exposed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return [dict(zip(names, values, strict=True)) for values in run(exposed, feeds)]


def compare(expected: Array, actual: Array, noise: float = 0.0) -> tuple[float, float]:
    """The largest difference, and the bound that it must keep. Equal infinities and NaNs do not differ."""
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return np.inf, 0.0
    if expected.dtype.kind not in "fcV":
        return float(np.any(expected != actual)), 0.0
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    with np.errstate(invalid="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        difference = np.where(same, 0.0, np.abs(a - b))
    difference[np.isnan(difference)] = np.inf
    finite = np.abs(a[np.isfinite(a)])
    extent = float(finite.max()) if finite.size else 1.0
    share = TOLERANCES.get(str(expected.dtype), 1e-5)
    return float(difference.max()) if difference.size else 0.0, max(share * (extent or 1.0), NOISE_FACTOR * noise)


def with_fixed(model: onnx.ModelProto, inputs: Feed, fixed: Iterable[str]) -> onnx.ModelProto:
    """The model with some inputs turned into initializers."""
    names = set(fixed)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.input[:]
    result.graph.input.extend(value for value in model.graph.input if value.name not in names)
    for name in sorted(names):
        result.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(inputs[name]), name))
    return result


def shuffled(feed: Feed, seed: int) -> dict[str, Array]:
    """The same floating-point values at other places, so that they stay in the domain of an operator."""
    rng = np.random.default_rng(seed)
    return {name: rng.permutation(a.reshape(-1)).reshape(a.shape) if is_floating(a) else a for name, a in feed.items()}


def is_floating(array: Array) -> bool:
    return array.dtype.kind == "f"


def rounding_of(array: Array) -> float:
    return (
        2.0 ** -{"float64": 52, "float16": 10, "bfloat16": 7}.get(str(array.dtype), 23) if is_floating(array) else 0.0
    )


def extent_of(array: Array) -> float:
    finite = np.abs(array.astype(np.float64)[np.isfinite(array)]) if is_floating(array) else np.ones(1)
    return max(1.0, float(finite.max()) if finite.size else 1.0)


def error_of(expected: Array, actual: Array) -> float:
    if not expected.size:
        return 0.0
    if expected.dtype.kind not in "fiu":
        return float(np.any(expected != actual))
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=np.inf).max())
