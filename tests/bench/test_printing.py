"""What `onnxshrink bench` prints of figures that are made up."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from rich.console import Console

from onnxshrink.bench.comparison import Comparison
from onnxshrink.bench.denormals import Denormals
from onnxshrink.bench.memory import Memory
from onnxshrink.bench.operators import NodeChange, OperatorTime
from onnxshrink.bench.printing import print_comparison, verdict
from onnxshrink.bench.statistics import Timing

TIMING = Timing((0.004, 0.003), 0.75, 0.7, 0.8, 30, 0.01)
FIGURES = Comparison(
    models=("big.onnx", "small.onnx"),
    threads=1,
    inputs={"x": "float32[1, 3]"},
    timing=TIMING,
    memory=(Memory(4_000_000, 5_000_000), Memory(2_000_000, 3_000_000)),
    denormals=(Denormals(0, 0, 9), Denormals(0, 0, 9)),
    operators=(
        OperatorTime("Conv", (6, 5), (0.0035, 0.0021)),
        OperatorTime("(between operators)", (0, 0), (1e-5, 0.0)),
    ),
    nodes=(
        NodeChange("stem", "Conv", ("Conv", "FusedConv"), (0.002, 0.001)),
        NodeChange("gone", "Conv", ("Conv", None), (0.0005, None)),
        NodeChange("same", "Conv", ("Conv", "Conv"), (0.001, 0.001)),
    ),
)


def printed(comparison: Comparison) -> list[str]:
    console = Console(width=80, record=True, highlight=False)
    with console.capture() as capture:
        print_comparison(console, comparison)
    lines = capture.get().splitlines()
    assert all(len(line) <= 80 for line in lines)
    return lines


def cells(lines: list[str]) -> list[list[str]]:
    return [line.split() for line in lines]


def test_all_figures_of_both_models() -> None:
    lines = printed(FIGURES)
    assert lines[:3] == ["A: big.onnx", "B: small.onnx", "inputs: x float32[1, 3]"]
    rows = cells(lines)
    for row in (
        ["latency,", "ms", "4", "3", "0.750"],
        ["peak", "memory,", "loading,", "MB", "4.0", "2.0", "0.500"],
        ["peak", "memory,", "running,", "MB", "5.0", "3.0", "0.600"],
        ["Conv", "6", "3.5", "5", "2.1", "0.600"],
        ["(between", "operators)", "0.01", "0"],
        ["stem", "Conv", "->", "FusedConv", "2", "1", "-1"],
        ["gone", "Conv", "0.5", "-0.5"],
    ):
        assert row in rows
    assert not any(row[:1] == ["same"] for row in rows)
    text = "B is faster than A. B takes 0.750 times as long (95% interval 0.700 to 0.800; 30 rounds, 1 thread)."
    assert " ".join(" ".join(lines[-2:]).split()) == text


@pytest.mark.parametrize(
    ("timing", "threads", "text"),
    [
        (
            replace(TIMING, ratio=1.2, low=1.1, high=1.3),
            2,
            "B is slower than A. B takes 1.200 times as long (95% interval 1.100 to 1.300; 30 rounds, 2 threads).",
        ),
        (
            replace(TIMING, ratio=1.0, low=0.9, high=1.1),
            1,
            "No difference can be told. "
            "B takes 1.000 times as long (95% interval 0.900 to 1.100; 30 rounds, 1 thread).",
        ),
        (
            replace(TIMING, low=0.0, high=math.inf, runs=4),
            1,
            "No difference can be told. B takes 0.750 times as long; fewer than 6 rounds (4 rounds, 1 thread).",
        ),
    ],
)
def test_verdicts(timing: Timing, threads: int, text: str) -> None:
    assert verdict(timing, threads) == text


def test_notes() -> None:
    assert "denormal" not in " ".join(printed(FIGURES))
    noted = replace(FIGURES, denormals=(Denormals(1234, 5, 9), Denormals(0, 0, 9)), timing=replace(TIMING, drift=-0.25))
    text = " ".join(" ".join(printed(noted)).split())
    assert "A has denormal numbers: 1,234 in its weights, 5 in the 9 tensors looked at." in text
    assert "B has denormal" not in text
    assert "The machine became 25% faster meanwhile; both models were hit alike." in text
    close = replace(FIGURES, timing=replace(TIMING, ratio=0.985, low=0.98, high=0.99))
    assert "Models that differ by less than 2% are as good as equal" in " ".join(printed(close))


def test_what_is_not_known_is_left_out() -> None:
    lines = printed(replace(FIGURES, memory=(None, None), operators=(), nodes=(), inputs={}))
    assert lines[2] == "inputs: none"
    assert not any("memory" in line or "operator" in line for line in lines)


def test_long_tables_are_cut() -> None:
    many = tuple(OperatorTime(f"Op{index}", (1, 1), (0.001, 0.001)) for index in range(12))
    assert any(
        line.strip().startswith("and 2 operators that take less") for line in printed(replace(FIGURES, operators=many))
    )
