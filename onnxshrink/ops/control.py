"""Operators with subgraphs or sequences. Their bodies are laid flat; what passes between is related here."""

from __future__ import annotations

import numpy as np

from onnxshrink.facts import Known, everything, partial
from onnxshrink.notation import Relation, TensorSpec, UnresolvedError
from onnxshrink.registry import Rule, register
from onnxshrink.view import Operand, View
from onnxshrink.weights import BoolArray


def _branches(view: View) -> list[tuple[int, int, int]]:
    """Slots of both branches' value and of the output that is one of them."""
    count = len(view.outputs)
    if len(view.inputs) != 1 + 2 * count:
        raise UnresolvedError("the branches have other outputs than the node")
    return [(1 + k, 1 + count + k, -1 - k) for k in range(count)]


def _if_relation(view: View) -> Relation:
    """Both branches and the output share their axes."""
    specs: dict[int, TensorSpec] = {}
    sizes: dict[str, int | None] = {}
    pinned: set[str] = set()
    for slots in _branches(view):
        operands = [view.operand(slot) for slot in slots]
        ranks = {operand.rank for operand in operands if operand is not None}
        if len(ranks) != 1 or any(operand is None for operand in operands):
            raise UnresolvedError("the branches give values of different ranks")
        names = [f"o{-1 - slots[2]}_{axis}" for axis in range(ranks.pop())]
        for axis, name in enumerate(names):
            extents = {operand.extent(axis) for operand in operands if operand is not None}
            sizes[name] = extents.pop() if len(extents) == 1 else None
            if sizes[name] is None:
                pinned.add(name)
        specs.update({slot: tuple((name,) for name in names) for slot in slots})
    count = len(view.outputs)
    inputs = [specs.get(slot) for slot in range(len(view.inputs))]
    outputs = [specs.get(-1 - k) for k in range(count)]
    _pin_unequal(inputs, view, sizes, pinned)
    return Relation(tuple(inputs), tuple(outputs), sizes, frozenset(pinned))


def _pin_unequal(inputs: list[TensorSpec | None], view: View, sizes: dict[str, int | None], pinned: set[str]) -> None:
    """An axis whose extents differ between the branches stays whole in each."""
    for slot, spec in enumerate(inputs):
        operand = view.input(slot)
        if spec is None or operand is None:
            continue
        renamed = list(spec)
        for axis, (name,) in enumerate(spec):
            if sizes[name] is None and operand.extent(axis) is not None:
                own = f"b{slot}_{axis}"
                sizes[own] = operand.extent(axis)
                pinned.add(own)
                renamed[axis] = (own,)
        inputs[slot] = tuple(renamed)


def _if_forward(view: View) -> list[Known | None]:
    """Known where both branches know the same value."""
    found: list[Known | None] = []
    for then_slot, else_slot, _ in _branches(view):
        first, second = view.data(then_slot), view.data(else_slot)
        if _unlike(first, second):
            found.append(None)
            continue
        a, b = first.known, second.known
        mask: BoolArray = np.asarray(a.mask & b.mask & (a.value == b.value))
        found.append(partial(mask, np.broadcast_to(a.value, np.broadcast_shapes(a.value.shape, b.value.shape))))
    return found


def _unlike(first: Operand, second: Operand) -> bool:
    return first.shape != second.shape or first.dtype != second.dtype


def _if_backward(view: View) -> list[BoolArray | None]:
    needed: list[BoolArray | None] = [everything(view.data(0).rank), *[None] * (len(view.inputs) - 1)]
    for k, (then_slot, else_slot, _) in enumerate(_branches(view)):
        for slot in (then_slot, else_slot):
            alike = view.data(slot).shape == view.output(k).shape
            needed[slot] = view.live(k) if alike else everything(view.data(slot).rank)
    return needed


register(Rule("If", relate=_if_relation, forward=_if_forward, backward=_if_backward))
