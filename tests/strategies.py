"""Random models for hypothesis: a few inputs, 2 to 25 nodes, random attributes, dead rows, columns and biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import graph_block_steps  # noqa: F401 - registers its steps
import graph_layout_steps
import numpy as np
import onnx
from graph_builder import Array, Builder, Chooser, Dim, Rejected, Tensor
from graph_steps import draw_step
from hypothesis import strategies as st

OPSETS = [*range(11, 27)]
# How often a step that does not fit is drawn again.
_TRIES = 8


@dataclass(frozen=True, eq=False)
class RandomGraph:
    """A model and the extents of its inputs in the sample run, and in a second one with other free extents."""

    model: onnx.ModelProto
    shapes: tuple[dict[str, tuple[int, ...]], ...]

    def feeds(self, seed: int) -> list[dict[str, Array]]:
        """Random inputs, for both runs."""
        rng = np.random.default_rng(seed)
        dtype = {v.name: _numpy_type(v) for v in self.model.graph.input}
        return [{n: rng.standard_normal(s).astype(dtype[n]) for n, s in shapes.items()} for shapes in self.shapes]


def _numpy_type(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


class _HypothesisChooser:
    def __init__(self, draw: Callable[..., Any]) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return int(self._draw(st.integers(low, high)))


@st.composite
def graphs(draw: Callable[..., Any]) -> RandomGraph:
    """A random valid graph; hypothesis makes it smaller when it fails."""
    return random_graph(_HypothesisChooser(draw))


def random_graph(chooser: Chooser) -> RandomGraph:
    """A random graph; almost all of them are valid."""
    kind = chooser.integer(0, 19)
    dtype = {18: np.float64, 19: np.float16}.get(kind, np.float32)
    builder = Builder(chooser, dtype, OPSETS[chooser.integer(0, len(OPSETS) - 1)])
    sizes = _make_inputs(builder)
    _stem(builder)
    wanted = builder.integer(2, 25)
    while len(builder.nodes) < wanted:
        _grow(builder)
    outputs = _make_outputs(builder)
    return RandomGraph(builder.model(outputs), sizes)


def _make_inputs(builder: Builder) -> tuple[dict[str, tuple[int, ...]], ...]:
    """One or two inputs: images of one to three axes of space, sequences, or plain rows; some extents free."""
    rank = builder.choice([4, 4, 4, 4, 3, 5, 2, 3])
    extents = [builder.integer(1, 2), builder.integer(1, 6), *builder.integers(rank - 2, 4, 6)]
    symbols = ["N", "C", "H", "W", "D"]
    free = [builder.chance(40), False, *[builder.chance(20)] * (rank - 2)]
    dims: list[Dim] = [s if f else e for s, f, e in zip(symbols, free, extents, strict=False)]
    other = [e + 1 if f else e for e, f in zip(extents, free, strict=True)]
    first, second = {}, {}
    for _ in range(2 if builder.chance(20) else 1):
        tensor = builder.input(extents, dims)
        first[tensor.name], second[tensor.name] = tuple(extents), tuple(other)
    return (first, second) if any(free) else (first,)


def _stem(builder: Builder) -> None:
    """A first contraction with dead rows, most of the time."""
    if not builder.chance(80):
        return
    x = builder.tensors[0]
    try:
        graph_layout_steps.stem(builder, x)
    except Rejected:
        return


def _grow(builder: Builder) -> None:
    for _ in range(_TRIES):
        mark = builder.mark()
        try:
            draw_step(builder)(builder)
        except Rejected:
            builder.rewind(mark)
        else:
            return
    builder.one("Relu", [builder.tensors[-1]])


def _make_outputs(builder: Builder) -> list[Tensor]:
    """Every tensor that nothing reads, most of them after a last contraction; a few more."""
    loose = [t for t in builder.tensors if t.name not in builder.used and t not in builder.inputs]
    merged = builder.integer(1, 3)
    outputs = [_finished(builder, x) for x in loose[-merged:]]
    outputs += [x for x in loose[:-merged] if builder.chance(15)]
    names = {t.name for t in (*outputs, *builder.inputs)}
    if builder.chance(10):
        outputs += [t for t in builder.tensors if t.name not in names][:1]
    return outputs


def _finished(builder: Builder, x: Tensor) -> Tensor:
    mark = builder.mark()
    try:
        return graph_layout_steps.finish(builder, x) if builder.chance(85) else x
    except Rejected:
        builder.rewind(mark)
        return x
