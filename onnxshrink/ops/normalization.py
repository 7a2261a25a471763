"""Operators that mix an axis and keep the shape: normalisations and softmaxes."""

from __future__ import annotations

import numpy as np

from onnxshrink.facts import Known, partial
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.registry import Rule, register
from onnxshrink.view import View


# --- BatchNormalization: an affine map per channel --------------------------------------------------------------


def _batch_norm(view: View) -> Relation:
    if view.attribute("training_mode", 0) or any(output is not None for output in view.outputs[1:]):
        raise UnresolvedError("batch normalisation in training mode")
    return resolve("n c *x, c, c, c, c -> n c *x", view.shapes(view.inputs), view.shapes(view.outputs[:1]))


def _batch_norm_forward(view: View) -> list[Known | None]:
    """Known where the input is; constant where the scale is zero."""
    parameters = [view.data(slot).value() for slot in range(1, 5)]
    rest: list[Known | None] = [None] * (len(view.outputs) - 1)
    if any(value is None for value in parameters):
        return [None, *rest]
    shape = [1, -1] + [1] * (view.data().rank - 2)
    scale, shift, mean, variance = (np.asarray(value, np.float64).reshape(shape) for value in parameters)
    known = view.data().known
    mask = known.mask | (scale == 0)
    if not mask.any():
        return [None, *rest]
    factor = scale / np.sqrt(variance + view.attribute("epsilon", 1e-5))
    value = np.where(known.mask, known.value, 0).astype(np.float64)
    result = np.where(scale == 0, shift, (value - mean) * factor + shift)
    return [partial(mask, np.where(mask, result, 0).astype(view.output().dtype)), *rest]


register(Rule("BatchNormalization", since=9, relate=_batch_norm, forward=_batch_norm_forward))


# --- Softmax: all or nothing along its axis ---------------------------------------------------------------------


def _softmax(view: View) -> Relation:
    rank = view.data().rank
    old = view.version < 13
    axis = int(view.attribute("axis", 1 if old else -1)) % max(rank, 1)
    mixed = range(axis, rank) if old else [axis]
    axes = " ".join(f"[a{a}]" if a in mixed else f"a{a}" for a in range(rank))
    return resolve(f"{axes} -> {axes}", view.shapes(view.inputs), view.shapes(view.outputs))


for _op in ("Softmax", "LogSoftmax", "Hardmax"):
    register(Rule(_op, relate=_softmax))


# --- Kept whole along what they mix -----------------------------------------------------------------------------


def _layer_norm(view: View) -> Relation:
    rank = view.data().rank
    axis = int(view.attribute("axis", -1)) % rank
    axes = " ".join(f"[a{a}]" if a >= axis else f"a{a}" for a in range(rank))
    scale = " ".join(f"[a{a}]" for a in range(axis, rank))
    statistics = " ".join("1" if a >= axis else f"a{a}" for a in range(rank))
    notation = f"{axes}, {scale}, {scale} -> {axes}, {statistics}, {statistics}"
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))


register(Rule("LayerNormalization", since=17, relate=_layer_norm))


def _instance_norm(view: View) -> Relation:
    return resolve("n c [*x], c, c -> n c [*x]", view.shapes(view.inputs), view.shapes(view.outputs))


register(Rule("InstanceNormalization", since=6, relate=_instance_norm))
