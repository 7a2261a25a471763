"""Projections of attention heads, with dead parts, for the tests of attention operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from models import draw, shapes

Array = np.ndarray[Any, Any]
HEADS, SIZE, WIDTH = 4, 8, 6
TOKENS = draw(2, 5, WIDTH, seed=3)


def attributes(model: onnx.ModelProto, op: str = "Attention") -> dict[str, Any]:
    """Attributes of the one node of an operator."""
    (node,) = [node for node in model.graph.node if node.op_type == op]
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def heads(values: Array, *which: int, count: int = HEADS) -> Array:
    """A copy of projection weights `[..., heads * size]` with whole heads zero."""
    values = values.copy()
    values.reshape(-1, count, values.shape[-1] // count)[:, list(which)] = 0
    return values


def dimensions(values: Array, *which: int, count: int = HEADS) -> Array:
    """A copy with the same dimensions of every head zero."""
    values = values.copy()
    values.reshape(-1, count, values.shape[-1] // count)[:, :, list(which)] = 0
    return values


def weights(groups: int = HEADS, value_size: int = SIZE) -> dict[str, Array]:
    """Projections of query, key, value and output."""
    return {
        "wq": draw(WIDTH, HEADS * SIZE, seed=1),
        "wk": draw(WIDTH, groups * SIZE, seed=2),
        "wv": draw(WIDTH, groups * value_size, seed=3),
        "wo": draw(HEADS * value_size, WIDTH, seed=4),
    }


def sizes(small: onnx.ModelProto) -> list[tuple[int, ...]]:
    """Shapes of the four projections."""
    found = shapes(small)
    return [found[name] for name in ("wq", "wk", "wv", "wo")]
