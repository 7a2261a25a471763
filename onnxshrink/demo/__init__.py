"""The demo: a small classifier of handwritten digits, really trained and really pruned, is shrunk and compared.

The model and the samples come from `tools/train_demo.py`. The images are the held-out part of scikit-learn's digits, a
copy of the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, CC BY 4.0).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from rich.console import Console
from rich.table import Table

LATENCY_BATCH = 64
LATENCY_ROUNDS = 60


@dataclass(frozen=True)
class Figures:
    """What was measured of one classifier; the latency is a median in milliseconds for one batch."""

    name: str
    parameters: int
    bytes: int
    accuracy: float
    latency: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured: the classifier as it was pruned, with the fewest parameters, and as fast as it gets."""

    before: Figures
    smallest: Figures
    fastest: Figures
    largest_difference: float
    predictions_identical: bool
    samples: int


def model_path() -> Path:
    """Where the pruned classifier lies: images `[N, 1, 8, 8]` to logits `[N, 10]`, float32, N free."""
    return Path(__file__).with_name("digits.onnx")


def samples() -> tuple[np.ndarray, np.ndarray]:
    """Held-out images `[N, 1, 8, 8]`, float32 from 0 to 1, and their labels `[N]`, int64."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        # stored as the integers 0 to 16 that the data set holds
        return stored["images"].astype(np.float32) / np.float32(16), stored["labels"].astype(np.int64)


def run() -> DemoResult:
    """Shrinks the shipped classifier and measures it before and after on the shipped samples, in one process."""
    # imported here, for the package's own top module may offer the demo
    from onnxshrink import shrink

    images, _ = samples()
    pruned = onnx.load(model_path())
    (given,) = pruned.graph.input
    batch = {given.name: images[:LATENCY_BATCH]}
    return compare(pruned, shrink(pruned, align="none").model, shrink(pruned, inputs=batch).model)


def compare(before: onnx.ModelProto, smallest: onnx.ModelProto, fastest: onnx.ModelProto) -> DemoResult:
    """Measures classifiers with the same interface on the shipped samples."""
    images, labels = samples()
    models = {"before": before, "fewest parameters": smallest, "fastest": fastest}
    sessions = [_session(model) for model in models.values()]
    logits = [_logits(session, images) for session in sessions]
    accuracies = [float((some.argmax(1) == labels).mean()) for some in logits]
    latencies = _latencies(sessions, images[:LATENCY_BATCH])
    figures = [
        Figures(name, _parameters(model), model.ByteSize(), accuracy, latency)
        for (name, model), accuracy, latency in zip(models.items(), accuracies, latencies, strict=True)
    ]
    return DemoResult(
        *(figures[0], figures[1], figures[2]),
        largest_difference=max(float(np.abs(logits[0] - some).max()) for some in logits[1:]),
        predictions_identical=all(np.array_equal(logits[0].argmax(1), some.argmax(1)) for some in logits[1:]),
        samples=len(labels),
    )


def main() -> int:
    """Runs the demo and prints it; returns the exit code, 3 when a prediction differs."""
    result = run()
    console = Console()
    console.print(_table(result))
    same = "identical" if result.predictions_identical else "NOT identical"
    console.print(f"predictions on {result.samples} held-out images: {same}", highlight=False)
    console.print(f"largest difference of an output: {result.largest_difference:.1e}", highlight=False)
    return 0 if result.predictions_identical else 3


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # one thread, so that the latencies do not measure the scheduling of several
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _logits(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


def _latencies(sessions: Sequence[onnxruntime.InferenceSession], images: np.ndarray) -> list[float]:
    """The median milliseconds of each session; they take turns, so that a slow moment of the machine hits all."""
    seconds: list[list[float]] = [[] for _ in sessions]
    for _ in range(LATENCY_ROUNDS):
        for session, taken in zip(sessions, seconds, strict=True):
            start = time.perf_counter()
            _logits(session, images)
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) * 1e3 for taken in seconds]


def _parameters(model: onnx.ModelProto) -> int:
    """How many floating-point weights the model holds; its integer constants are shapes and axes."""
    constants = [
        a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"
    ]
    tensors = (onnx.numpy_helper.to_array(tensor) for tensor in [*model.graph.initializer, *constants])
    return sum(values.size for values in tensors if np.issubdtype(values.dtype, np.floating))


def _table(result: DemoResult) -> Table:
    table = Table(title="a pruned classifier of handwritten digits")
    table.add_column("")
    columns = (result.before, result.smallest, result.fastest)
    for column in columns:
        table.add_column(column.name, justify="right")
    first = result.before
    table.add_row("parameters", *(_with_share(f"{c.parameters:,}", c.parameters, first.parameters) for c in columns))
    table.add_row("bytes", *(_with_share(f"{c.bytes:,}", c.bytes, first.bytes) for c in columns))
    table.add_row("accuracy", *(f"{c.accuracy:.2%}" for c in columns))
    latencies = (_with_share(f"{c.latency:.2f} ms", c.latency, first.latency) for c in columns)
    table.add_row(f"latency, {LATENCY_BATCH} images", *latencies)
    return table


def _with_share(text: str, value: float, before: float) -> str:
    return text if value is before else f"{text}  {value / before:4.0%}"
