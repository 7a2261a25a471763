"""LayerNormalization of data of which many channels are zero: they leave, and come back as zeros for the statistics."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from onnxshrink.facts import Line, along
from onnxshrink.notation import Relation, resolve
from onnxshrink.ops.normalization import WHOLE_NORM
from onnxshrink.registry import Keep, Rewrite, register
from onnxshrink.view import View
from onnxshrink.weights import Array, BoolArray, all_along

# Fewer zeros are not worth the two operators that putting them back takes.
_LEAST_SHARE = 0.25


def _zeros(view: View) -> BoolArray | None:
    """Channels that are zero, as a vector; None where they are too few, or where the node is not of the common form."""
    data, scale, shift = view.data(), view.input(1), view.input(2)
    extent = data.extent(data.rank - 1) if data.rank else None
    if extent is None or int(view.attribute("axis", -1)) % data.rank != data.rank - 1:
        return None
    if any(output is not None for output in view.outputs[1:]):
        return None
    if any(given is not None and (given.constant is None or given.rank != 1) for given in (scale, shift)):
        return None
    zero = data.known.zero()
    found = along(all_along(zero, tuple(range(data.rank - 1))), 0, extent)
    return found if _LEAST_SHARE <= found.mean() < 1 else None


def _relate(view: View) -> Relation:
    if _zeros(view) is None:
        return WHOLE_NORM.relation(view)
    lead = " ".join(f"a{axis}" for axis in range(view.data().rank - 1))
    notation = f"{lead} i, [s], [s] -> {lead} o"
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs[:1]))


def _is_loose(view: View) -> bool:
    """Whether input and output keep channels of their own."""
    relation = view.relation
    return relation is not None and (relation.inputs[0] or ((),))[-1] == ("i",)


def _retain(view: View) -> list[Keep]:
    """The statistics read every channel; zeros can be put back."""
    zeros = _zeros(view)
    if zeros is None or not _is_loose(view):
        return []
    return [Keep(0, view.data().rank - 1, ~zeros, "the mean and variance of the norm read it")]


def _line(view: View) -> Line | None:
    """Channels that come in as zero go out as `scale * t + shift`, with one `t = -mean / deviation` per position."""
    zeros = _zeros(view)
    if zeros is None or not _is_loose(view):
        return None
    scale, shift = _parameter(view, 1), _parameter(view, 2)
    return Line(view.data().rank - 1, zeros & (scale != 0), scale.astype(np.float64), shift.astype(np.float64))


def _parameter(view: View, slot: int) -> Array:
    operand = view.input(slot)
    extent = view.data().extent(view.data().rank - 1) or 1
    return np.zeros(extent, np.float32) if operand is None else np.broadcast_to(operand.known.value, (extent,))


def _rewrite(view: View) -> Rewrite:
    last = view.data().rank - 1
    if not _is_loose(view) or not (view.shrinks(0, last) or view.shrinks(-1, last)):
        return Rewrite()
    came, wanted = view.kept[0][last], view.kept[-1][last]
    assert came is not None
    assert wanted is not None
    order = np.concatenate([np.flatnonzero(came), np.flatnonzero(~came)])
    taken = np.argsort(order)[np.flatnonzero(wanted)]
    pads = np.zeros(2 * (last + 1), np.int64)
    pads[-1] = np.count_nonzero(~came)
    weights = {"pads": pads, "taken": taken, "scale": _parameter(view, 1)[order]}
    if view.input(2) is not None:
        weights["shift"] = _parameter(view, 2)[order]
    return _rebuilt(view.node.proto, last, weights)


def _rebuilt(norm: onnx.NodeProto, axis: int, weights: dict[str, Array]) -> Rewrite:
    """Zeros behind the channels that came, the norm of all of them, and those that are wanted, in their old order."""
    # The names go by the output's, which no input of the node has.
    names = {name: f"{norm.output[0]}_{name}" for name in (*weights, "whole", "normed")}
    whole = onnx.NodeProto()
    whole.CopyFrom(norm)
    del whole.input[:], whole.output[:]
    whole.input.extend([names["whole"], *(names[name] for name in ("scale", "shift") if name in weights)])
    whole.output.append(names["normed"])
    nodes = (
        helper.make_node("Pad", [norm.input[0], names["pads"]], [names["whole"]]),
        whole,
        helper.make_node("Gather", [names["normed"], names["taken"]], [norm.output[0]], axis=axis),
    )
    return Rewrite(nodes=nodes, weights={names[name]: value for name, value in weights.items()})


register(
    replace(
        WHOLE_NORM,
        relate=_relate,
        retain=_retain,
        line=_line,
        rewrite=_rewrite,
        plain=WHOLE_NORM,
    )
)
