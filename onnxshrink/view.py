"""What a rule sees of a node: read-only operands with their shapes, constants and facts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxshrink.evaluate import evaluate
from onnxshrink.facts import Known, Line, along, constant, everything, nothing
from onnxshrink.graph import Node, Period, Shape
from onnxshrink.notation import Relation
from onnxshrink.weights import Array, BoolArray, Constant


@dataclass(frozen=True, eq=False)
class Operand:
    """One input or output of a node.

    Attributes:
        unit: axis along which the elements sum to one, as a softmax's do.
        infinite: elements that may be minus infinity by design, as in a mask; compressed; None: none.
        framed: elements that hold one value but for a frame of zeros, which is the same for all of them; None: none.
        line: indices of an axis that all follow one number per position; None: none.
    """

    name: str
    shape: Shape | None
    dtype: np.dtype[Any] | None
    fact: Known | None = None
    constant: Constant | None = None
    unit: int | None = None
    infinite: BoolArray | None = None
    framed: Known | None = None
    line: Line | None = None

    @property
    def known(self) -> Known:
        """What is known of the elements; a constant is read when this is asked."""
        if self.constant is not None:
            return constant(self.constant.array())
        return self.fact if self.fact is not None else nothing(self.rank, self.dtype)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape or ())

    def extent(self, axis: int) -> int | None:
        """Extent of one axis, None when it is free or has a free part."""
        size = self.shape[axis] if self.shape is not None else None
        return size if isinstance(size, int) and not isinstance(size, Period) else None

    def period(self, axis: int) -> int | None:
        """Fixed part of an extent that also has a free part, None for any other."""
        size = self.shape[axis] if self.shape is not None else None
        return int(size) if isinstance(size, Period) else None

    def static_shape(self) -> tuple[int, ...] | None:
        """The shape, when every extent is known."""
        found = tuple(extent for axis in range(self.rank) if (extent := self.extent(axis)) is not None)
        return found if self.shape is not None and len(found) == len(self.shape) else None

    def value(self) -> Array | None:
        """All elements at full extent, when every one of them is known."""
        if self.constant is not None:
            return self.constant.array()
        shape = self.static_shape()
        if shape is None or not self.known.everything:
            return None
        return np.broadcast_to(self.known.value, shape)

    def zero(self) -> BoolArray:
        """Elements known to be zero."""
        return self.known.zero()


APPENDED = -1


@dataclass(frozen=True, eq=False)
class Fold:
    """Indices of one axis of an input that leave although they hold a constant other than zero.

    Attributes:
        axis: the axis of the input.
        indices: what leaves.
        values: their values, in double precision.
        into: index that stays and takes their contribution, one per entry of `indices`; `APPENDED`: a channel of ones
            that is appended to the input; None: folded in a bias.
        scale: value of the index that takes them, one per entry.
        offsets: what goes into a bias besides, one per entry; None: nothing.
    """

    axis: int
    indices: Array
    values: Array
    into: Array | None = None
    scale: Array | None = None
    offsets: Array | None = None

    @property
    def biases(self) -> Array | None:
        """What is added to a bias, times the weights of each index; None: nothing."""
        return self.values if self.into is None else self.offsets

    @property
    def appends(self) -> bool:
        """Whether a channel of ones is appended to the input."""
        return self.into is not None and bool((self.into == APPENDED).any())


@dataclass(frozen=True, eq=False)
class View:
    """A node as a rule sees it.

    Attributes:
        node: the node.
        inputs: its inputs, then what its subgraphs capture; None for an omitted one.
        outputs: its outputs; None for an omitted one.
        opsets: pairs of domain and version.
        relation: how its axes hang together; None while that is being worked out.
        needed: per output, the elements that can influence an output of the model (backward analysis only).
        blind: per output, an axis along which one number may be added to all elements, as a softmax's readers do not
            notice (backward analysis and after).
        kept: per slot, per axis, what stays (planning and applying only).
        folds: per input, the constants that leave (applying only).
        frozen: inputs whose place a compressed constant takes (applying only).
        throughout: whether the inputs of a partial function are needed everywhere (backward analysis only).
        blocks: into how many blocks the groups fall, where the plan joins some (planning and applying only).
        free: per input, per axis, indices that cost nothing where they come from, such as padding (planning only).
    """

    node: Node
    inputs: tuple[Operand | None, ...]
    outputs: tuple[Operand | None, ...]
    opsets: tuple[tuple[str, int], ...]
    relation: Relation | None = None
    needed: tuple[BoolArray | None, ...] = ()
    blind: tuple[int | None, ...] = ()
    kept: dict[int, list[BoolArray | None]] = field(default_factory=dict)
    folds: dict[int, Fold] = field(default_factory=dict)
    free: dict[int, dict[int, BoolArray]] = field(default_factory=dict)
    frozen: frozenset[int] = frozenset()
    throughout: bool = False
    blocks: int | None = None

    @property
    def version(self) -> int:
        """Opset version of the node's domain."""
        return self.node.version

    def opset(self) -> int:
        """Opset version of the default domain."""
        return dict(self.opsets).get("", 1)

    def attribute(self, name: str, default: Any = None) -> Any:
        """Value of an attribute; strings decoded."""
        value = self.node.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def input(self, slot: int) -> Operand | None:
        """An input, None when omitted."""
        return self.inputs[slot] if slot < len(self.inputs) else None

    def data(self, slot: int = 0) -> Operand:
        """An input that must be there."""
        operand = self.inputs[slot]
        assert operand is not None
        return operand

    def output(self, index: int = 0) -> Operand:
        """An output that must be there."""
        operand = self.outputs[index]
        assert operand is not None
        return operand

    def operand(self, slot: int) -> Operand | None:
        """An operand by slot: inputs 0, 1, ...; outputs -1, -2, ..."""
        return self.inputs[slot] if slot >= 0 else self.outputs[-1 - slot]

    def shapes(self, side: Sequence[Operand | None]) -> list[Shape | None]:
        """Shapes of some operands; None for omitted ones."""
        return [operand.shape if operand is not None else None for operand in side]

    def live(self, index: int = 0) -> BoolArray:
        """Elements of an output that are needed and not known."""
        operand, needed = self.outputs[index], self.needed[index]
        assert operand is not None
        if needed is None:
            return ~everything(operand.rank)
        return needed & ~operand.known.mask

    def ints(self, slot: int, attribute: str | None = None) -> list[int] | None:
        """Integers given as an attribute (old opsets) or as an input whose elements are all known."""
        if attribute is not None and attribute in self.node.attributes:
            value = self.node.attributes[attribute]
            return [int(v) for v in value] if not isinstance(value, int) else [value]
        operand = self.input(slot)
        if operand is None:
            return None
        array = operand.value()
        return None if array is None else [int(v) for v in np.atleast_1d(array)]

    def run(self, inputs: Sequence[Array | None]) -> list[Array] | None:
        """The operator itself on given values; None when it cannot be run."""
        return evaluate(self.node.proto, self.opsets, inputs, self.node.functions)

    def free_indices(self, slot: int, axis: int) -> BoolArray:
        """Indices of one axis that cost nothing where they come from."""
        none = np.zeros(self.data(slot).extent(axis) or 0, np.bool_)
        return self.free.get(slot, {}).get(axis, none)

    def kept_indices(self, slot: int, axis: int) -> Array:
        """Indices of one axis that stay."""
        kept = self.kept[slot][axis]
        assert kept is not None
        return np.flatnonzero(kept)

    def kept_count(self, slot: int, axis: int) -> int | None:
        """Extent of one axis after shrinking, None when it is free."""
        kept = self.kept[slot][axis]
        return None if kept is None else int(np.count_nonzero(kept))

    def shrinks(self, slot: int, axis: int) -> bool:
        """Whether one axis loses indices."""
        kept = self.kept[slot][axis]
        return kept is not None and not bool(kept.all())


def vector(array: Array, axis: int, extent: int) -> Array:
    """A compressed array that varies along one axis only, as a vector of that axis."""
    return along(array, axis, extent).reshape(extent) if array.size in (1, extent) else _vary(array, axis, extent)


def _vary(array: Array, axis: int, extent: int) -> Array:
    raise ValueError(f"array of shape {array.shape} varies along more than axis {axis} of extent {extent}")
