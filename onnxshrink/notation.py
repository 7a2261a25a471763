"""Index notation: how the axes of an operator's inputs and outputs hang together, with no operator named.

A pattern such as ``n (g i) [*x], (g o) i [*k], (g o) -> n (g o) [*y]`` lists the axes of each input and output as
products of *factors*:

- a factor in inputs and outputs passes through: its axes lose the same indices;
- ``(a b)`` is a product, the last factor running fastest;
- ``*x`` stands for any number of axes, aligned from the right and broadcast as numpy does;
- ``[c]`` is pinned: it stays whole;
- ``1`` is an axis of extent one.

A `Relation` is a pattern resolved on shapes. Besides factors it may hold *links*, index maps along one axis, for
operators that pick, join or repeat positions. Slots number the inputs 0, 1, ... and the outputs -1, -2, ...
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxshrink.errors import RuleError
from onnxshrink.graph import Period, Shape
from onnxshrink.weights import Array

IndexArray = NDArray[np.int64]
AxisSpec = tuple[str, ...]
TensorSpec = tuple[AxisSpec, ...]
_TOKEN = re.compile(r"\s*(\*?[A-Za-z_]\w*|[()\[\]1])")


class UnresolvedError(Exception):
    """The notation does not fit these shapes; the message says why. The node is then kept whole."""


@dataclass(frozen=True)
class Axis:
    """One axis of a pattern: its factors; `variadic` if it stands for any number of axes."""

    factors: AxisSpec
    variadic: bool = False


@dataclass(frozen=True)
class Pattern:
    """A parsed notation."""

    text: str
    inputs: tuple[tuple[Axis, ...], ...]
    outputs: tuple[tuple[Axis, ...], ...]
    pinned: frozenset[str]


@dataclass(frozen=True, eq=False)
class Link:
    """An index map: element `target[k]` of the output's axis is element `source[k]` of the input's."""

    input: int
    output: int
    source: IndexArray
    target: IndexArray


@dataclass(frozen=True, eq=False)
class Relation:
    """How the axes of one node's operands hang together.

    Attributes:
        inputs: per input, per axis, the factors whose product the axis is; None for an operand left out.
        outputs: the same for the outputs.
        sizes: extent of each factor, None when it is not known.
        pinned: factors that stay whole.
        links: index maps by factor. A linked factor is the only one of its axis and has its own extent per operand,
            in `sizes` under "factor@slot".
        periods: per axis of the first output, the period that follows where its extent is a free dimension times a
            fixed one.
        ragged: outer factors of axes that need not keep a product: the blocks that stay keep equally many indices each.
    """

    inputs: tuple[TensorSpec | None, ...]
    outputs: tuple[TensorSpec | None, ...]
    sizes: Mapping[str, int | None]
    pinned: frozenset[str] = frozenset()
    links: Mapping[str, tuple[Link, ...]] = field(default_factory=dict)
    ragged: frozenset[str] = frozenset()
    periods: Mapping[int, int] = field(default_factory=dict)

    def spec(self, slot: int) -> TensorSpec | None:
        """The axes of an operand."""
        side, index = (self.inputs, slot) if slot >= 0 else (self.outputs, -1 - slot)
        return side[index] if index < len(side) else None

    def slots(self) -> Iterator[tuple[int, TensorSpec]]:
        """Every operand that takes part, inputs first."""
        for index, spec in enumerate(self.inputs):
            if spec is not None:
                yield index, spec
        for index, spec in enumerate(self.outputs):
            if spec is not None:
                yield -1 - index, spec

    def whole(self, shapes: Sequence[Shape | None]) -> Relation:
        """The same with every input that has a shape but no axes here pinned: it is read whole."""
        inputs, sizes, pinned = list(self.inputs), dict(self.sizes), set(self.pinned)
        inputs += [None] * (len(shapes) - len(inputs))
        for slot, shape in enumerate(shapes):
            if inputs[slot] is None and shape is not None:
                names = [f"whole{slot}_{axis}" for axis in range(len(shape))]
                sizes.update({n: e if isinstance(e, int) else None for n, e in zip(names, shape, strict=True)})
                inputs[slot] = tuple((name,) for name in names)
                pinned.update(names)
        return replace(self, inputs=tuple(inputs), sizes=sizes, pinned=frozenset(pinned))

    def pin(self, *factors: str) -> Relation:
        """The same with more factors pinned."""
        return replace(self, pinned=self.pinned | set(factors))


def _parse_axes(text: str, pinned: set[str]) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    product: list[str] | None = None
    bracket = False
    position = 0
    text = text.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise RuleError(f"notation {text!r}: cannot read {text[position:]!r}")
        token, position = match.group(1), match.end()
        if token == "(":
            product = []
        elif token == ")":
            axes.append(Axis(tuple(product or ())))
            product = None
        elif token in "[]":
            bracket = token == "["
        elif token == "1":
            axes.append(Axis(()))
        else:
            name = token.lstrip("*")
            if bracket:
                pinned.add(name)
            if product is None:
                axes.append(Axis((name,), variadic=token.startswith("*")))
            else:
                product.append(name)
    return tuple(axes)


@cache
def parse(text: str) -> Pattern:
    """Parse a notation. Raises RuleError when it is malformed."""
    if text.count("->") != 1:
        raise RuleError(f"notation {text!r}: needs exactly one '->'")
    left, right = text.split("->")
    pinned: set[str] = set()
    inputs = tuple(_parse_axes(part, pinned) for part in left.split(",")) if left.strip() else ()
    outputs = tuple(_parse_axes(part, pinned) for part in right.split(","))
    for axes in (*inputs, *outputs):
        if sum(axis.variadic for axis in axes) > 1:
            raise RuleError(f"notation {text!r}: two variadic axes in one operand")
    return Pattern(text, inputs, outputs, frozenset(pinned))


def _expand(axes: tuple[Axis, ...], rank: int) -> list[AxisSpec]:
    """Spell out the variadic axis: numbered from the right, so that broadcasting aligns."""
    extra = rank - sum(not axis.variadic for axis in axes)
    spelled: list[AxisSpec] = []
    for axis in axes:
        if not axis.variadic:
            spelled.append(axis.factors)
        else:
            spelled += [(f"{axis.factors[0]}{index}",) for index in range(extra, 0, -1)]
    if extra < 0 or len(spelled) != rank:
        raise UnresolvedError(f"a tensor of rank {rank} does not fit the operator's notation")
    return spelled


def resolve(
    pattern: Pattern | str,
    inputs: Sequence[Shape | None],
    outputs: Sequence[Shape | None],
    sizes: Mapping[str, int | None] | None = None,
) -> Relation:
    """Bind a pattern to shapes.

    Args:
        pattern: the notation.
        inputs, outputs: shapes; None for an operand that is left out or that takes no part.
        sizes: extents of factors that the shapes alone do not tell (a group count, say).

    Raises:
        UnresolvedError: ranks or extents do not fit.
    """
    if isinstance(pattern, str):
        pattern = parse(pattern)
    shapes = [*inputs, *outputs]
    axes = [*_padded(pattern.inputs, len(inputs)), *_padded(pattern.outputs, len(outputs))]
    specs = [
        _expand(axis, len(shape)) if shape is not None and axis is not None else None
        for axis, shape in zip(axes, shapes, strict=True)
    ]
    known: dict[str, int | None] = dict(sizes or {})
    variadic = {a.factors[0] for axis in axes if axis for a in axis if a.variadic}
    pinned = set(pattern.pinned)
    _bind_single(specs, shapes, known)
    _bind_products(specs, shapes, known)
    found = [_drop_broadcast(spec, shape, known, pinned) for spec, shape in zip(specs, shapes, strict=True)]
    spelled = {f for f in known if f.rstrip("0123456789") in variadic & pinned}
    whole = frozenset(pinned | spelled)
    return Relation(tuple(found[: len(inputs)]), tuple(found[len(inputs) :]), known, whole)


def _padded(operands: tuple[tuple[Axis, ...], ...], count: int) -> list[tuple[Axis, ...] | None]:
    return [operands[i] if i < len(operands) else None for i in range(count)]


def _bind_single(
    specs: list[list[AxisSpec] | None], shapes: Sequence[Shape | None], known: dict[str, int | None]
) -> None:
    for spec, shape in zip(specs, shapes, strict=True):
        for factors, extent in zip(spec or (), shape or (), strict=True):
            if len(factors) != 1:
                continue
            name = factors[0]
            size = extent if isinstance(extent, int) else None
            before = known.get(name)
            if name not in known or before in (None, 1):
                known[name] = size if size != 1 or name not in known else before
            elif size not in (None, 1, before):
                raise UnresolvedError(f"extents {before} and {size} do not agree")


def _bind_products(
    specs: list[list[AxisSpec] | None], shapes: Sequence[Shape | None], known: dict[str, int | None]
) -> None:
    for spec, shape in zip(specs, shapes, strict=True):
        for factors, extent in zip(spec or (), shape or (), strict=True):
            if len(factors) < 2 or not isinstance(extent, int):
                continue
            if isinstance(extent, Period):
                raise UnresolvedError("an axis that is a product has a free part")
            open_ones = [name for name in factors if known.get(name) is None]
            rest = math.prod(known[name] or 1 for name in factors if known.get(name) is not None)
            if len(open_ones) == 1 and rest and extent % rest == 0:
                known[open_ones[0]] = extent // rest
            elif open_ones or rest != extent:
                raise UnresolvedError(f"an extent of {extent} is not the product of its factors")


def _drop_broadcast(
    spec: list[AxisSpec] | None, shape: Shape | None, known: Mapping[str, int | None], pinned: set[str]
) -> TensorSpec | None:
    """An axis of extent one carries no factor; a factor met on an axis of unknown extent cannot shrink."""
    if spec is None or shape is None:
        return None
    result: list[AxisSpec] = []
    for factors, extent in zip(spec, shape, strict=True):
        result.append(() if extent == 1 else factors)
        if extent != 1 and not isinstance(extent, int):
            pinned.update(factors)
    return tuple(result)


def elementwise(inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> Relation:
    """Numpy broadcasting of any number of inputs into outputs of one shape."""
    text = ", ".join(["*a"] * len(inputs)) + " -> " + ", ".join(["*a"] * len(outputs))
    return resolve(text, inputs, outputs)


def opaque(inputs: Sequence[Shape | None], outputs: Sequence[Shape | None]) -> Relation:
    """Every axis of every operand pinned: nothing is known about the operator."""
    sizes: dict[str, int | None] = {}
    specs: list[TensorSpec | None] = []
    for slot, shape in enumerate((*inputs, *outputs)):
        for axis, extent in enumerate(shape or ()):
            sizes[f"t{slot}_{axis}"] = extent if isinstance(extent, int) else None
        specs.append(None if shape is None else tuple((f"t{slot}_{axis}",) for axis in range(len(shape))))
    return Relation(tuple(specs[: len(inputs)]), tuple(specs[len(inputs) :]), sizes, frozenset(sizes))


def axis_of(relation: Relation, slot: int, factor: str) -> int:
    """The axis of an operand that is one factor alone."""
    spec = relation.spec(slot)
    assert spec is not None
    return next(axis for axis, factors in enumerate(spec) if factors == (factor,))


def joined_inputs(relation: Relation) -> dict[int, int]:
    """Inputs laid end to end along a linked axis: one that keeps nothing there is left out of the node."""
    found: dict[int, int] = {}
    for factor, links in relation.links.items():
        inputs = {link.input for link in links}
        if len(inputs) > 1 and len({link.output for link in links}) == 1:
            found.update({slot: axis_of(relation, slot, factor) for slot in inputs})
    return found


# --- Moving broadcast-compressed arrays between operands -------------------------------------------------------


def _unfold(array: Array, spec: TensorSpec, sizes: Mapping[str, int | None]) -> tuple[Array, list[str]]:
    """Split each axis in its factors: one array axis per factor, extent one where the array is compressed."""
    shape: list[int] = []
    names: list[str] = []
    for factors, extent in zip(spec, array.shape, strict=True):
        if not factors:
            continue
        names += factors
        if extent == 1 or len(factors) == 1:
            shape += [extent] + [1] * (len(factors) - 1) if len(factors) == 1 else [1] * len(factors)
        else:
            shape += [sizes[name] or 1 for name in factors]
    return array.reshape(shape), names


def _fold(array: Array, spec: TensorSpec, sizes: Mapping[str, int | None]) -> Array:
    """The inverse of `_unfold` for an array whose axes follow `spec`."""
    position = 0
    shape: list[int] = []
    widths: list[int] = []
    for factors in spec:
        extents = array.shape[position : position + len(factors)]
        position += len(factors)
        if all(extent == 1 for extent in extents):
            shape.append(1)
            widths += extents
        else:
            full = extents if len(factors) == 1 else [sizes[name] or 1 for name in factors]
            shape.append(math.prod(full))
            widths += full
    return np.broadcast_to(array, widths).reshape(shape)


def transfer(
    relation: Relation, array: Array, source: int, target: int, reduce: Callable[..., Any] = np.any, fill: Any = False
) -> Array:
    """Move a compressed array from operand `source` to operand `target` (slots).

    Factors that the target lacks are reduced with `reduce`; those that the source lacks stay compressed. Along a
    link, positions that nothing maps to get `fill`.
    """
    from_spec, to_spec = relation.spec(source), relation.spec(target)
    if from_spec is None or to_spec is None:
        raise RuleError("an operand without notation takes no part in a transfer")
    unfolded, names = _unfold(array, from_spec, relation.sizes)
    wanted = [name for factors in to_spec for name in factors]
    gone = tuple(i for i, name in enumerate(names) if name not in wanted)
    if gone:
        unfolded = reduce(unfolded, axis=gone)
        names = [name for name in names if name in wanted]
    for axis, name in enumerate(names):
        if name in relation.links:
            unfolded = _follow(relation, name, unfolded, axis, source, target, fill)
    order = [names.index(name) for name in wanted if name in names]
    unfolded = unfolded.transpose(order)
    missing = [position for position, name in enumerate(wanted) if name not in names]
    for position in missing:
        unfolded = np.expand_dims(unfolded, position)
    return _fold(unfolded, to_spec, relation.sizes)


def _follow(relation: Relation, factor: str, array: Array, axis: int, source: int, target: int, fill: Any) -> Array:
    """Carry one axis of `array` across the links of `factor` between two operands."""
    links = [k for k in relation.links[factor] if {k.input, k.output} == {source, target}]
    extent = relation.sizes[f"{factor}@{target}"] or 0
    shape = (*array.shape[:axis], extent, *array.shape[axis + 1 :])
    result = np.full(shape, fill, array.dtype)
    moved, out = np.moveaxis(array, axis, 0), np.moveaxis(result, axis, 0)
    for link in links:
        take, put = (link.source, link.target) if link.input == source else (link.target, link.source)
        values = np.broadcast_to(moved, (1, *moved.shape[1:])) if moved.shape[0] == 1 else moved[take]
        if array.dtype == np.bool_:
            out[put] = False
            np.logical_or.at(out, put, values)
        else:
            out[put] = values
    return result
