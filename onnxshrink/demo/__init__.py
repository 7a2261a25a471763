"""The demo: a small classifier of handwritten digits, really trained and really pruned, is shrunk and compared.

The model and the samples come from `tools/train_demo.py`. The images are the held-out part of scikit-learn's digits, a
copy of the test set of "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, CC BY 4.0).
"""

from __future__ import annotations

import statistics
import time
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
class DemoResult:
    """What the demo measured, before and after shrinking; latencies are medians in milliseconds for one batch."""

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    accuracy_before: float
    accuracy_after: float
    largest_difference: float
    predictions_identical: bool
    samples: int
    latency_before: float
    latency_after: float

    @property
    def latency_ratio(self) -> float:
        """Latency after by latency before: below 1 is faster."""
        return self.latency_after / self.latency_before


def model_path() -> Path:
    """Where the pruned classifier lies: images `[N, 1, 8, 8]` to logits `[N, 10]`, float32, N free."""
    return Path(__file__).with_name("digits.onnx")


def samples() -> tuple[np.ndarray, np.ndarray]:
    """Held-out images `[N, 1, 8, 8]`, float32 from 0 to 1, and their labels `[N]`, int64."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as stored:
        # stored as the integers 0 to 16 that the data set holds
        return stored["images"].astype(np.float32) / np.float32(16), stored["labels"].astype(np.int64)


def run() -> DemoResult:
    """Shrinks the shipped classifier and measures both models on the shipped samples, in one process."""
    # imported here, for the package's own top module may offer the demo
    from onnxshrink import shrink

    return compare(onnx.load(model_path()), shrink(model_path()).model)


def compare(before: onnx.ModelProto, after: onnx.ModelProto) -> DemoResult:
    """Measures two classifiers with the same interface on the shipped samples."""
    images, labels = samples()
    sessions = _session(before), _session(after)
    logits_before, logits_after = (_logits(session, images) for session in sessions)
    predicted_before, predicted_after = logits_before.argmax(1), logits_after.argmax(1)
    latency_before, latency_after = _latencies(sessions, images[:LATENCY_BATCH])
    return DemoResult(
        parameters_before=_parameters(before),
        parameters_after=_parameters(after),
        bytes_before=before.ByteSize(),
        bytes_after=after.ByteSize(),
        accuracy_before=float((predicted_before == labels).mean()),
        accuracy_after=float((predicted_after == labels).mean()),
        largest_difference=float(np.abs(logits_before - logits_after).max()),
        predictions_identical=bool(np.array_equal(predicted_before, predicted_after)),
        samples=len(labels),
        latency_before=latency_before,
        latency_after=latency_after,
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


def _latencies(sessions: tuple[onnxruntime.InferenceSession, ...], images: np.ndarray) -> list[float]:
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
    for heading in ("before", "after", "after / before"):
        table.add_column(heading, justify="right")
    for label, before, after in (
        ("parameters", result.parameters_before, result.parameters_after),
        ("bytes", result.bytes_before, result.bytes_after),
    ):
        table.add_row(label, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
    table.add_row("accuracy", f"{result.accuracy_before:.2%}", f"{result.accuracy_after:.2%}", "")
    latency = f"latency, {LATENCY_BATCH} images"
    ratio = f"{result.latency_ratio:.1%}"
    table.add_row(latency, f"{result.latency_before:.2f} ms", f"{result.latency_after:.2f} ms", ratio)
    return table
