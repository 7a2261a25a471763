"""Gemm: a matrix product with a bias and two scalars."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from onnxshrink.facts import Known, along, partial
from onnxshrink.notation import Relation, resolve
from onnxshrink.ops._linear import Linear, collapsed, lined
from onnxshrink.ops.contraction import Product, reduce_to
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import Fold, View
from onnxshrink.weights import Array, BoolArray


def _transposed(view: View) -> tuple[bool, bool]:
    return bool(view.attribute("transA", 0)), bool(view.attribute("transB", 0))


def _gemm_relation(view: View) -> Relation:
    a, b = _transposed(view)
    left, right = "k m" if a else "m k", "n k" if b else "k n"
    bias = view.input(2)
    third = "1" if bias is None else ["1", "n", "m n"][bias.rank] if bias.rank else "*s"
    return resolve(f"{left}, {right}, {third} -> m n", view.shapes(view.inputs), view.shapes(view.outputs))


def _gemm_product(view: View) -> Product:
    return Product(view, transposed=_transposed(view))


def _bias_vector(view: View) -> bool:
    """Whether a constant may be added to the bias: there is none, or it is a constant along the columns."""
    bias = view.input(2)
    return bias is None or bias.constant is not None


def gemm_linear(view: View) -> Linear | None:
    """The product as one with constant weights; None when the second matrix is not constant."""
    a, b = _transposed(view)
    data, weights = view.data(0), view.data(1)
    axis = 0 if a else 1
    if weights.constant is None or data.extent(axis) is None:
        return None
    grid = weights.constant.pattern(0, 1)
    pattern = grid if b else grid.T
    return Linear(view, 0, axis, 1, pattern, border=False, bias=_bias_vector(view), follows=True)


def _scalars(view: View) -> tuple[float, float]:
    return float(view.attribute("alpha", 1.0)), float(view.attribute("beta", 1.0))


def _gemm_forward(view: View) -> list[Known | None]:
    alpha, beta = _scalars(view)
    found = _gemm_product(view).forward(alpha)
    bias = view.input(2)
    if found is None or bias is None:
        return [found]
    known = bias.known
    mask = found.mask & known.mask
    value = found.value.astype(np.float64) + beta * known.value.astype(np.float64)
    return [partial(mask, np.where(mask, value, 0).astype(found.value.dtype))]


def _gemm_backward(view: View) -> list[BoolArray | None]:
    left, right = _gemm_product(view).backward()
    bias = view.input(2)
    return [left, right, *([reduce_to(view.live(), bias)] if bias is not None else [None] * (len(view.inputs) - 2))]


def _gemm_retain(view: View) -> Iterable[Keep]:
    linear = gemm_linear(view)
    return linear.retain() if linear is not None else _gemm_product(view).retain()


def _gemm_represent(view: View) -> Iterable[Keep]:
    linear = gemm_linear(view)
    return linear.represent() if linear is not None else []


def _gemm_fold(view: View) -> Mapping[int, Fold]:
    linear = gemm_linear(view)
    return linear.fold() if linear is not None else {}


def _columns(view: View, indices: Array) -> Array:
    """Weights of some inputs, `[out, input]`, in double precision."""
    weights = view.data(1).known.value
    part = weights[:, indices] if _transposed(view)[1] else weights[indices].T
    return part.astype(np.float64)


def _gemm_lined(view: View) -> tuple[int, ...]:
    return lined(gemm_linear(view))


def _gemm_rewrite(view: View) -> Rewrite:
    fold = view.folds.get(0)
    if fold is None:
        return Rewrite()
    weights = {} if fold.into is None else {1: lambda: _collapsed(view, fold)}
    if fold.biases is None:
        return Rewrite(constants=weights)
    offset, attributes = _new_bias(view, _columns(view, fold.indices) @ fold.biases)
    return Rewrite(constants=weights | {2: offset}, attributes=attributes)


def _new_bias(view: View, offset: Array) -> tuple[Array, dict[str, float]]:
    """The bias with something added, and the attributes that go with it."""
    alpha, beta = _scalars(view)
    offset = alpha * offset
    bias = view.input(2)
    if bias is not None and beta != 0:
        offset = offset / beta + bias.known.value.astype(np.float64)
    kept = view.kept[-1][1]
    assert kept is not None
    offset = along(offset, offset.ndim - 1, kept.size).compress(kept, axis=-1)
    rows = view.kept[-1][0]
    if offset.ndim == 2 and rows is not None and offset.shape[0] == rows.size:
        offset = offset.compress(rows, axis=0)
    return offset.astype(view.output().dtype), {} if bias is not None and beta != 0 else {"beta": 1.0}


def _collapsed(view: View, fold: Fold) -> Array:
    """Weights with the columns of `fold` added to those that stand for them, then sliced."""
    transposed = _transposed(view)[1]
    weights = view.data(1).known.value
    whole = collapsed(weights if transposed else weights.T, fold)
    rows, columns = view.kept[-1][1], view.kept[0][fold.axis]
    assert rows is not None
    assert columns is not None
    whole = whole[rows][:, columns].astype(weights.dtype)
    return np.ascontiguousarray(whole if transposed else whole.T)


register(
    Rule(
        "Gemm",
        since=7,
        relate=_gemm_relation,
        forward=_gemm_forward,
        backward=_gemm_backward,
        retain=_gemm_retain,
        represent=_gemm_represent,
        fold=_gemm_fold,
        lined=_gemm_lined,
        rewrite=_gemm_rewrite,
    )
)
