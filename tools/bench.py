"""Benchmarks, as ratios from one run: `python tools/bench.py [--smoke]`.

Networks of ResNet's shape are drawn at random and pruned at random: half of the channels inside each block, and half of
each residual stream, are zero in every layer that writes them. For each network it measures

- the time to shrink (without verification) by the time of `onnx.load` and `onnx.save` of the same file;
- the peak of memory while shrinking, in units of the file's size;
- the latency of the shrunk network in onnxruntime (one thread) by that of the input, and by that of the network that a
  person would have built by hand with the same widths.

With `--speed`: the latency of each form that a shrunk network may have, see `_bench_speed.py`. With `--own`: the time
and memory of onnxshrink itself, also for graphs of 10,000 nodes and weights of gigabytes, and a profile, see
`_bench_own.py`.

What is compared runs in turns, so that a slow moment of the machine hits all; figures are medians.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from _drawing import FULL, SMOKE, Shape, draw
from _timing import in_turns
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
shrink(sys.argv[1], output=sys.argv[2], verify=False, align="none")
print(before, peak())
"""


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
        [lambda: onnx.save(onnx.load(big), copy), lambda: shrink(big, output=small, verify=False, align="none")], rounds
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
    parser.add_argument("--speed", action="store_true", help="latency by how the widths are chosen, instead")
    parser.add_argument("--own", action="store_true", help="time and memory of onnxshrink itself, instead")
    parser.add_argument("--gigabytes", type=float, default=3.0, help="with --own: size of the largest model (3)")
    arguments = parser.parse_args(argv)
    if arguments.own:
        import _bench_own

        return _bench_own.run(arguments.smoke, arguments.gigabytes)
    if arguments.speed:
        import _bench_speed

        return _bench_speed.run(arguments.smoke)
    shapes, rounds = (SMOKE, 2) if arguments.smoke else (FULL, 9)
    results = {}
    for shape in shapes:
        with tempfile.TemporaryDirectory() as folder:
            results[shape.name] = measure(shape, Path(folder), rounds)
    Console().print(make_table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
