"""Benchmarks, as ratios from one run: `python tools/bench.py [--smoke]`.

Networks of ResNet's shape are drawn at random and pruned at random: half of the channels inside each block, and half of
each residual stream, are zero in every layer that writes them. For each network it measures

- the time to shrink (without verification) by the time of `onnx.load` and `onnx.save` of the same file;
- the peak of memory while shrinking, in units of the file's size;
- the latency of the shrunk network in onnxruntime (one thread) by that of the input, and by that of the network that a
  person would have built by hand with the same widths.

What is compared runs in turns, so that a slow moment of the machine hits all; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from onnxshrink import shrink
from onnxshrink.measure import parameters

# Printed by a process of its own: bytes in use at most, before and after shrinking. VmHWM starts anew with the program,
# where ru_maxrss still holds what its parent used.
_MEMORY = """
import re, sys
from onnxshrink import shrink
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
before = peak()
shrink(sys.argv[1], output=sys.argv[2], verify=False)
print(before, peak())
"""


@dataclass(frozen=True)
class Shape:
    """A residual network: blocks per stage, channels of the first stage, and whether blocks have a bottleneck."""

    name: str
    blocks: tuple[int, ...]
    width: int
    bottleneck: bool
    image: int
    classes: int


FULL = (
    Shape("ResNet-18", (2, 2, 2, 2), 64, False, 224, 1000),
    Shape("ResNet-50", (3, 4, 6, 3), 64, True, 224, 1000),
)
SMOKE = (Shape("small, basic", (1, 1), 8, False, 32, 10), Shape("small, bottleneck", (1, 1), 8, True, 32, 10))


@dataclass
class Drawing:
    """A network being drawn twice over the same weights: as pruned, or `by_hand` with the dead channels left out."""

    by_hand: bool
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def half(self, channels: int) -> np.ndarray:
        """Which channels live: half of them."""
        live = np.zeros(channels, np.bool_)
        live[self.random.permutation(channels)[: channels // 2]] = True
        return live

    def node(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def weight(self, values: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def convolution(self, x: str, live: tuple[np.ndarray, np.ndarray], kernel: int, stride: int = 1) -> str:
        inputs, outputs = live
        fan = inputs.size * kernel * kernel
        values = self.random.standard_normal((outputs.size, inputs.size, kernel, kernel)) * np.sqrt(2 / fan)
        bias = self.random.standard_normal(outputs.size) * 0.1
        if self.by_hand:
            values, bias = values[outputs][:, inputs], bias[outputs]
        else:
            values[~outputs], bias[~outputs] = 0, 0
        operands = [x, self.weight(values), self.weight(bias)]
        return self.node("Conv", operands, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[kernel // 2] * 4)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x])


def draw(shape: Shape, by_hand: bool) -> onnx.ModelProto:
    """The network as pruned, or as a person would have built it with the same widths."""
    net = Drawing(by_hand)
    live = net.half(shape.width)
    x = net.relu(net.convolution("image", (np.ones(3, np.bool_), live), 7, 2))
    x = net.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for stage, blocks in enumerate(shape.blocks):
        x, live = draw_stage(net, shape, x, live, stage, blocks)
    x = net.node("Flatten", [net.node("GlobalAveragePool", [x])])
    values = net.random.standard_normal((shape.classes, live.size)) * 0.05
    operands = [x, net.weight(values[:, live] if by_hand else values), net.weight(np.zeros(shape.classes))]
    net.nodes.append(helper.make_node("Gemm", operands, ["logits"], "classifier", transB=1))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, shape.image, shape.image])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, shape.classes])
    graph = helper.make_graph(net.nodes, shape.name, [image], [logits], net.weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def draw_stage(net: Drawing, shape: Shape, x: str, live: np.ndarray, stage: int, blocks: int) -> tuple[str, np.ndarray]:
    """Blocks that share one residual stream."""
    middle = shape.width * 2**stage
    stream = net.half(middle * (4 if shape.bottleneck else 1))
    for block in range(blocks):
        stride = 2 if stage and not block else 1
        shortcut = x if block else net.convolution(x, (live, stream), 1, stride)
        inner = net.half(middle)
        if shape.bottleneck:
            y = net.relu(net.convolution(x, (live, inner), 1))
            other = net.half(middle)
            y = net.relu(net.convolution(y, (inner, other), 3, stride))
            y = net.convolution(y, (other, stream), 1)
        else:
            y = net.relu(net.convolution(x, (live, inner), 3, stride))
            y = net.convolution(y, (inner, stream), 3)
        x, live = net.relu(net.node("Add", [y, shortcut])), stream
    return x, live


# --- measuring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What was measured of one network; seconds, bytes, milliseconds."""

    file: int
    kept: tuple[int, int, int]
    copy: float
    shrink: float
    memory: int
    latency: tuple[float, float, float]


def in_turns(calls: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The median seconds of each call, after one round that does not count."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 1):
        for call, taken in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if turn:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in seconds]


def session_call(path: Path, image: np.ndarray) -> Callable[[], object]:
    """One inference, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"image": image})


def peak_memory(big: Path, small: Path) -> int:
    """Bytes that shrinking adds to the peak of a process that has imported everything."""
    command = [sys.executable, "-c", _MEMORY, str(big), str(small)]
    before, after = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    return int(after) - int(before)


def measure(shape: Shape, folder: Path, rounds: int) -> Figures:
    """Everything of one network."""
    big, small, hand, copy = (folder / f"{name}.onnx" for name in ("big", "small", "hand", "copy"))
    onnx.save(draw(shape, by_hand=False), big)
    onnx.save(draw(shape, by_hand=True), hand)
    memory = peak_memory(big, small)
    seconds = in_turns(
        [lambda: onnx.save(onnx.load(big), copy), lambda: shrink(big, output=small, verify=False)], rounds
    )
    image = np.random.default_rng(1).standard_normal((1, 3, shape.image, shape.image)).astype(np.float32)
    latency = in_turns([session_call(path, image) for path in (big, small, hand)], 3 * rounds)
    counts = [parameters(onnx.load(path)) for path in (big, small, hand)]
    milliseconds = [1e3 * value for value in latency]
    return Figures(
        big.stat().st_size,
        (counts[0], counts[1], counts[2]),
        seconds[0],
        seconds[1],
        memory,
        (milliseconds[0], milliseconds[1], milliseconds[2]),
    )


def make_table(results: dict[str, Figures]) -> Table:
    """One column per network."""
    table = Table(title="medians of interleaved runs")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[str, Callable[[Figures], str]] = {
        "file, MB": lambda f: f"{f.file / 1e6:.1f}",
        "parameters: input": lambda f: f"{f.kept[0]:,}",
        "parameters: shrunk": lambda f: f"{f.kept[1]:,}",
        "parameters: built by hand": lambda f: f"{f.kept[2]:,}",
        "load + save, s": lambda f: f"{f.copy:.3f}",
        "shrink, s": lambda f: f"{f.shrink:.3f}",
        "shrink / (load + save)": lambda f: f"{f.shrink / f.copy:.2f}",
        "peak memory / file": lambda f: f"{f.memory / f.file:.2f}",
        "latency: input, ms": lambda f: f"{f.latency[0]:.2f}",
        "latency: shrunk, ms": lambda f: f"{f.latency[1]:.2f}",
        "latency: built by hand, ms": lambda f: f"{f.latency[2]:.2f}",
        "latency: shrunk / input": lambda f: f"{f.latency[1] / f.latency[0]:.2f}",
        "latency: shrunk / by hand": lambda f: f"{f.latency[1] / f.latency[2]:.2f}",
    }
    for label, show in rows.items():
        table.add_row(label, *(show(figures) for figures in results.values()))
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Measure onnxshrink, as ratios from one run.")
    parser.add_argument("--smoke", action="store_true", help="small networks, a few seconds: does it run at all?")
    arguments = parser.parse_args(argv)
    shapes, rounds = (SMOKE, 2) if arguments.smoke else (FULL, 9)
    results = {}
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            results[shape.name] = measure(shape, Path(folder), rounds)
    Console().print(make_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
