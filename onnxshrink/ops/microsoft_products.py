"""com.microsoft products: matrix products with a factor, and products with an activation behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
import onnx

from onnxshrink.evaluate import evaluate
from onnxshrink.facts import Known, partial
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.ops._linear import Linear
from onnxshrink.ops.contraction import Product
from onnxshrink.registry import Keep, Rewrite, Rule, find, register
from onnxshrink.view import Fold, Operand, View
from onnxshrink.weights import BoolArray

_DOMAIN = "com.microsoft"

# --- FusedMatMul ------------------------------------------------------------------------------------------------


def _transposed(view: View) -> tuple[bool, bool]:
    return bool(view.attribute("transA", 0)), bool(view.attribute("transB", 0))


def _matmul(view: View) -> Relation:
    if view.attribute("transBatchA", 0) or view.attribute("transBatchB", 0):
        raise UnresolvedError("axes of the batch are transposed")
    if min(view.data(0).rank, view.data(1).rank) < 2:
        raise UnresolvedError("a product with a vector")
    a, b = _transposed(view)
    text = f"*b {'k m' if a else 'm k'}, *b {'n k' if b else 'k n'} -> *b m n"
    return resolve(text, view.shapes(view.inputs), view.shapes(view.outputs))


def _product(view: View) -> Product:
    return Product(view, transposed=_transposed(view))


def _linear(view: View) -> Linear | None:
    """The product as one with constant weights on the right, None when they are computed."""
    a, b = _transposed(view)
    data, weights = view.data(0), view.data(1)
    axis = data.rank - (2 if a else 1)
    if weights.constant is None or weights.rank != 2 or data.extent(axis) is None:
        return None
    grid = weights.constant.pattern(0, 1)
    return Linear(view, 0, axis, view.output().rank - 1, grid if b else grid.T, border=False, bias=True)


def _alpha(view: View) -> float:
    return float(view.attribute("alpha", 1.0))


def _matmul_retain(view: View) -> Iterable[Keep]:
    linear = _linear(view)
    return linear.retain() if linear is not None else _product(view).retain()


def _matmul_fold(view: View) -> Mapping[int, Fold]:
    linear = _linear(view)
    return linear.fold() if linear is not None else {}


def _matmul_rewrite(view: View) -> Rewrite:
    fold = view.folds.get(0)
    if fold is None:
        return Rewrite()
    weights = view.data(1).known.value
    part = (weights if _transposed(view)[1] else weights.T)[:, fold.indices]
    offset = _alpha(view) * (part.astype(np.float64) @ fold.values)
    kept = view.kept[-1][view.output().rank - 1]
    offset = offset if kept is None else offset[kept]
    return Rewrite(add=offset.astype(view.output().dtype))


register(
    Rule(
        "FusedMatMul",
        _DOMAIN,
        relate=_matmul,
        forward=lambda view: [_product(view).forward(_alpha(view))],
        backward=lambda view: list(_product(view).backward()),
        retain=_matmul_retain,
        fold=_matmul_fold,
        rewrite=_matmul_rewrite,
    )
)


# --- FusedGemm, FusedConv: as the plain operator, then an activation --------------------------------------------

_PLAIN = {"FusedGemm": "Gemm", "FusedConv": "Conv"}
_NAMED = {"activation_alpha": "alpha", "activation_beta": "beta", "activation_gamma": "gamma"}
# What `activation_params` holds, in order.
_PARAMETERS = {"LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Clip": ("min", "max")}


def _plain(view: View) -> Rule:
    rule = find(_PLAIN[view.node.op], "", view.opset())
    assert rule is not None
    return rule


# What a fused convolution adds before its activation, of the shape of the output.
_ADDED = 3


def _added(view: View) -> Operand | None:
    return view.input(_ADDED) if view.node.op == "FusedConv" else None


def _relate(view: View) -> Relation:
    if _added(view) is None:
        return _plain(view).relation(view)
    relation = _plain(view).relation(replace(view, inputs=view.inputs[:_ADDED]))
    return replace(relation, inputs=(*relation.inputs, relation.outputs[0]))


def _activated(view: View, known: Known) -> Known | None:
    """The activation run on what is known."""
    op = view.attribute("activation")
    if not op:
        return known
    values = {new: view.attribute(old) for old, new in _NAMED.items() if old in view.node.attributes}
    values.update(zip(_PARAMETERS.get(op, ()), view.attribute("activation_params", []), strict=False))
    # Limits are attributes of Clip before opset 11.
    opset = 6 if op == "Clip" else view.opset()
    node = onnx.helper.make_node(op, ["x"], ["y"], **values)
    found = evaluate(node, (("", opset),), [known.value])
    return None if found is None else partial(known.mask, found[0])


def _forward(view: View) -> list[Known | None]:
    forward = _plain(view).forward
    (found,) = forward(view) if forward is not None else [None]
    added = _added(view)
    if found is not None and added is not None:
        known = added.known
        found = partial(found.mask & known.mask, found.value + known.value) if known.anything else None
    return [found if found is None else _activated(view, found)]


def _backward(view: View) -> list[BoolArray | None]:
    backward = _plain(view).backward
    assert backward is not None
    if _added(view) is None:
        return backward(view)
    plain = backward(replace(view, inputs=view.inputs[:_ADDED]))
    return [*plain, *[None] * (_ADDED - len(plain)), view.live()]


def _retain(view: View) -> Iterable[Keep]:
    retain = _plain(view).retain
    return retain(view) if retain is not None else ()


def _represent(view: View) -> Iterable[Keep]:
    represent = _plain(view).represent
    return represent(view) if represent is not None else ()


def _fold(view: View) -> Mapping[int, Fold]:
    fold = _plain(view).fold
    return fold(view) if fold is not None else {}


def _rewrite(view: View) -> Rewrite:
    rewrite = _plain(view).rewrite
    return rewrite(view) if rewrite is not None else Rewrite()


for _op in _PLAIN:
    register(
        Rule(
            _op,
            _DOMAIN,
            relate=_relate,
            forward=_forward,
            backward=_backward,
            retain=_retain,
            represent=_represent,
            fold=_fold,
            rewrite=_rewrite,
        )
    )
