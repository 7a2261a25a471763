"""Einsum: the equation is the notation."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce

import numpy as np

from onnxshrink.facts import Known, along, partial
from onnxshrink.families import whole
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.registry import Keep, Rule, register
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array, BoolArray, any_along

# Letters that stand for the axes of an ellipsis, counted from the right.
_ELLIPSIS = "!@#$%^&*"
Terms = tuple[list[str], str]


def terms(view: View) -> Terms:
    """Letters of each input and of the output, one per axis. Raises UnresolvedError for a diagonal."""
    equation = str(view.attribute("equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    given = left.split(",")
    extra = max((o.rank - len(t.replace("...", "")) for t, o in zip(given, view.inputs, strict=True) if o), default=0)
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    spelled = [_spell(t, o.rank if o is not None else 0) for t, o in zip(given, view.inputs, strict=True)]
    output = _spell(right, len(right.replace("...", "")) + (extra if "..." in right else 0))
    if any(len(set(term)) != len(term) for term in (*spelled, output)):
        raise UnresolvedError("a diagonal is taken")
    return spelled, output


def _spell(term: str, rank: int) -> str:
    """A term with its ellipsis spelled out."""
    extra = rank - len(term.replace("...", ""))
    if extra > len(_ELLIPSIS):
        raise UnresolvedError("an ellipsis of that many axes")
    return term.replace("...", _ELLIPSIS[:extra][::-1])


def _factor(letter: str) -> str:
    return f"e{_ELLIPSIS.index(letter)}" if letter in _ELLIPSIS else f"f_{letter}"


def _notation(term: str) -> str:
    return " ".join(_factor(letter) for letter in term)


def _relate(view: View) -> Relation:
    """its equation"""
    inputs, output = terms(view)
    text = f"{', '.join(_notation(term) for term in inputs)} -> {_notation(output)}"
    return resolve(text, view.shapes(view.inputs), view.shapes(view.outputs))


# --- Products of masks ------------------------------------------------------------------------------------------


def _squeezed(array: Array, term: str) -> tuple[Array, str]:
    """A compressed array without its axes of extent one."""
    axes = tuple(axis for axis, extent in enumerate(array.shape) if extent == 1)
    return np.squeeze(array, axes), "".join(letter for axis, letter in enumerate(term) if axis not in axes)


def contract(arrays: list[Array], inputs: list[str], output: str) -> Array:
    """The sum of products of compressed arrays, compressed; a letter that none of them varies along is left out."""
    parts = [_squeezed(array, term) for array, term in zip(arrays, inputs, strict=True)]
    there = {letter for _, term in parts for letter in term}
    numbers = {letter: number for number, letter in enumerate(sorted(there))}
    wanted = [letter for letter in output if letter in there]
    operands: list[object] = []
    for array, term in parts:
        operands += [array, [numbers[letter] for letter in term]]
    result = np.einsum(*operands, [numbers[letter] for letter in wanted], optimize=True)  # type: ignore[call-overload]
    extents = dict(zip(wanted, result.shape, strict=True))
    return np.asarray(result).reshape([extents.get(letter, 1) for letter in output])


def _any(masks: list[BoolArray], inputs: list[str], output: str) -> BoolArray:
    return np.asarray(contract([mask.astype(np.float32) for mask in masks], inputs, output) > 0)


def _not_zero(operand: Operand) -> BoolArray:
    if operand.constant is not None:
        return operand.constant.nonzero(tuple(range(operand.rank)))
    return np.asarray(~operand.zero())


def _operands(view: View) -> list[Operand]:
    return [operand for operand in view.inputs if operand is not None]


def _unknown_output(view: View) -> BoolArray:
    """Elements that depend on an unknown element and only on factors that may not be zero."""
    inputs, output = terms(view)
    operands = _operands(view)
    nonzero = [_not_zero(operand) for operand in operands]
    found = []
    for slot, operand in enumerate(operands):
        unknown = ~operand.known.mask if operand.constant is None else np.zeros((1,) * operand.rank, np.bool_)
        if unknown.any():
            masks = [unknown if other == slot else mask for other, mask in enumerate(nonzero)]
            found.append(_any(masks, inputs, output))
    return reduce(np.logical_or, found, np.zeros((1,) * len(output), np.bool_))


def _products(view: View) -> BoolArray:
    """Elements to which some product of known factors contributes something other than zero."""
    inputs, output = terms(view)
    return _any([np.asarray(o.known.nonzero()) for o in _operands(view)], inputs, output)


def _forward(view: View) -> list[Known | None]:
    mask = ~(_unknown_output(view) | _products(view))
    if not mask.any():
        return whole(view)
    return [partial(np.asarray(mask), np.zeros((1,) * mask.ndim, view.output().dtype))]


def _backward(view: View) -> list[BoolArray | None]:
    """An element is needed where a live output is made from it and from factors that may not be zero."""
    inputs, output = terms(view)
    operands = _operands(view)
    nonzero = [_not_zero(operand) for operand in operands]
    needed: list[BoolArray | None] = []
    for slot, operand in enumerate(operands):
        others = [index for index in range(len(operands)) if index != slot]
        masks = [view.live(), *(nonzero[index] for index in others)]
        found = _any(masks, [output, *(inputs[index] for index in others)], inputs[slot])
        needed.append(_reduced(found, operand))
    return needed


def _reduced(mask: BoolArray, operand: Operand) -> BoolArray:
    """Undo broadcasting of an ellipsis."""
    axes = tuple(a for a in range(operand.rank) if operand.extent(a) == 1 and mask.shape[a] > 1)
    return any_along(mask, axes, keepdims=True) if axes else mask


def _retain(view: View) -> Iterable[Keep]:
    """Summed indices at which known factors multiply to something other than zero."""
    inputs, output = terms(view)
    operands = _operands(view)
    known = [np.asarray(operand.known.nonzero()) for operand in operands]
    keeps = []
    for slot, operand in enumerate(operands):
        if operand.constant is not None or not known[slot].any():
            continue
        for axis, letter in enumerate(inputs[slot]):
            extent = operand.extent(axis)
            if letter in output or extent is None:
                continue
            wanted = along(_any(known, inputs, letter), 0, extent).copy()
            keeps.append(Keep(slot, axis, wanted, "its constant is multiplied by another constant"))
    return keeps


register(Rule("Einsum", since=12, relate=_relate, forward=_forward, backward=_backward, retain=_retain))
