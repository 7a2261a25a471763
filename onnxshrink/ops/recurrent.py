"""Recurrent layers: LSTM, GRU, RNN. A hidden unit leaves with its row in every gate and its column in every state.

Both directions have the same number of hidden units and their outputs share one axis of them, so a unit stays while
either direction needs it; a direction that nothing needs leaves whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxshrink.facts import Known, everything, uniform
from onnxshrink.notation import Relation, UnresolvedError, resolve
from onnxshrink.registry import Keep, Rewrite, Rule, register
from onnxshrink.view import Fold, View, vector
from onnxshrink.weights import Array, BoolArray, all_along, any_along

# Activations that give zero for zero, whatever their parameters.
_KEEP_ZERO = frozenset({"tanh", "relu", "leakyrelu", "thresholdedrelu", "scaledtanh", "elu", "softsign"})


@dataclass(frozen=True)
class Cell:
    """How an operator lays out its gates.

    Attributes:
        gates: number of gates.
        candidate: the gate that proposes the new state; where it is zero, a state of zero stays zero.
        activations: activations per direction, as they are by default.
        odd: those among them that must give zero for zero.
        states: number of states that a step hands to the next: the hidden one, and a cell.
        linear: whether the state is the activation of the candidate itself.
    """

    gates: int
    candidate: int
    activations: tuple[str, ...]
    odd: tuple[int, ...]
    states: int = 1
    linear: bool = False


_CELLS = {
    "LSTM": Cell(4, 3, ("Sigmoid", "Tanh", "Tanh"), (1, 2), states=2),
    "GRU": Cell(3, 2, ("Sigmoid", "Tanh"), (1,)),
    "RNN": Cell(1, 0, ("Tanh",), (0,), linear=True),
}
# The input, the output of all steps, and a state; steps first or the batch first.
_NOTATION = ("[t] n i", "[t] d n h", "d n h"), ("n [t] i", "n [t] d h", "n d h")
_WEIGHTS, _RECURRENT, _BIAS, _LENGTHS, _STATE, _PEEPHOLES = 1, 2, 3, 4, 5, 7


class Layer:
    """One recurrent node, its weights seen as `[direction, gate, unit, input]`."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.cell = _CELLS[view.node.op]
        self.batch_first = bool(view.attribute("layout", 0))
        shape = view.data(_RECURRENT).static_shape() or (1, 1, 1)
        self.directions, self.units = shape[0], shape[2]
        self.features = view.data(_WEIGHTS).extent(2) or 1

    # --- weights ------------------------------------------------------------------------------------------------

    def gates(self, array: Array) -> Array:
        return array.reshape(self.directions, -1, self.units, *array.shape[2:])

    @cached_property
    def reads(self) -> BoolArray:
        """`[direction, gate, unit, feature]`: where the input is weighted."""
        weights = self.view.data(_WEIGHTS).constant
        assert weights is not None
        return self.gates(weights.nonzero((0, 1, 2)))

    @cached_property
    def recurs(self) -> BoolArray:
        """`[direction, gate, unit, unit before]`: where the state is weighted."""
        weights = self.view.data(_RECURRENT).constant
        assert weights is not None
        return self.gates(weights.nonzero((0, 1, 2)))

    def bias(self) -> Array | None:
        """`[direction, 2 gates, unit]`: biases of the input, then of the state."""
        operand = self.view.input(_BIAS)
        return None if operand is None else self.gates(operand.known.value)

    def _candidate_bias(self) -> BoolArray:
        """Units whose candidate has a bias."""
        bias = self.bias()
        if bias is None:
            return np.zeros((self.directions, self.units), np.bool_)
        first, second = bias[:, self.cell.candidate], bias[:, self.cell.gates + self.cell.candidate]
        if self.view.attribute("linear_before_reset", 0):
            return np.asarray((first != 0) | (second != 0))
        return np.asarray(first.astype(np.float64) + second != 0)

    # --- the input ----------------------------------------------------------------------------------------------

    def constants(self) -> tuple[BoolArray, Array]:
        """Features that hold one known value at every step, and the values."""
        known = uniform(self.view.data().known, (0, 1))
        return vector(known.mask, 2, self.features), vector(known.value, 2, self.features)

    def _zero_features(self) -> BoolArray:
        mask, value = self.constants()
        return np.asarray(mask & (value == 0))

    def needed_features(self) -> BoolArray:
        """Features that some unit reads that matters."""
        return any_along(self.reads & self.alive[:, None, :, None], (0, 1, 2))

    # --- units --------------------------------------------------------------------------------------------------

    def _starts_at_zero(self) -> BoolArray:
        result = np.ones((self.directions, self.units), np.bool_)
        for slot in range(_STATE, _STATE + self.cell.states):
            operand = self.view.input(slot)
            if operand is not None:
                zero = all_along(operand.zero(), 0 if self.batch_first else 1)
                result &= np.broadcast_to(zero, result.shape)
        return result

    def _keeps_zero(self) -> bool:
        names = self.activations()
        return all(name.lower() in _KEEP_ZERO for group in names for name in (group[i] for i in self.cell.odd))

    def activations(self) -> list[list[str]]:
        """Names of the activations, one list per direction."""
        given = [a.decode() if isinstance(a, bytes) else str(a) for a in self.view.attribute("activations", [])]
        count = len(self.cell.activations)
        given = given or list(self.cell.activations) * self.directions
        return [given[d * count : (d + 1) * count] for d in range(self.directions)]

    @cached_property
    def silent(self) -> BoolArray:
        """`[direction, unit]`: units that are zero at every step, for every input.

        By induction over time: a state of zero stays zero where the candidate is zero, and the candidate of these units
        reads nothing but zeros and units among themselves.
        """
        if not self._keeps_zero():
            return np.zeros((self.directions, self.units), np.bool_)
        candidate = self.cell.candidate
        reads = any_along(self.reads[:, candidate] & ~self._zero_features(), 2)
        silent = np.asarray(~reads & ~self._candidate_bias() & self._starts_at_zero())
        while True:
            disturbed = silent & any_along(self.recurs[:, candidate] & ~silent[:, None, :], 2)
            if not disturbed.any():
                return silent
            silent &= ~disturbed

    @cached_property
    def steady(self) -> BoolArray:
        """`[direction, unit]`: units of a layer without gates that give one constant from the first step on."""
        if not self.cell.linear or self.view.input(_LENGTHS) is not None:
            return self.silent
        mask, _ = self.constants()
        moved = any_along(self.reads & ~mask, (1, 3)) | any_along(self.recurs & ~self.silent[:, None, None, :], (1, 3))
        return np.asarray(self.silent | ~moved)

    @cached_property
    def alive(self) -> BoolArray:
        """`[direction, unit]`: units with a live output, and those that they read."""
        result = np.zeros((self.directions, self.units), np.bool_)
        for index, operand in enumerate(self.view.outputs):
            if operand is not None:
                result |= self._of_output(index, self.view.live(index))
        reached = any_along(self.recurs, 1) & ~self.silent[:, None, :]
        while True:
            more = any_along(reached & result[:, :, None], 1) & ~result
            if not more.any():
                return result
            result |= more

    # --- outputs ------------------------------------------------------------------------------------------------

    def output_axes(self, index: int) -> tuple[int, int]:
        """The axes of directions and of units."""
        if index == 0:
            return (2, 3) if self.batch_first else (1, 3)
        return (1, 2) if self.batch_first else (0, 2)

    def _of_output(self, index: int, mask: BoolArray) -> BoolArray:
        axes = self.output_axes(index)
        reduced = any_along(mask, tuple(a for a in range(mask.ndim) if a not in axes))
        return np.broadcast_to(reduced, (self.directions, self.units))

    def as_output(self, index: int, array: Array) -> Array:
        """`[direction, unit]` as a compressed array of an output."""
        shape = [1] * (4 if index == 0 else 3)
        for axis, extent in zip(self.output_axes(index), array.shape, strict=True):
            shape[axis] = extent
        return array.reshape(shape)

    def steady_values(self) -> Array:
        """Values of the steady units, from one step of the operator itself."""
        values = np.zeros((self.directions, self.units), self.view.data().dtype)
        if not (self.steady & ~self.silent).any():
            return values
        mask, value = self.constants()
        step = np.where(mask, value, 0).astype(value.dtype).reshape(1, 1, -1)
        inputs: list[Array | None] = [step]
        for slot in (_WEIGHTS, _RECURRENT, _BIAS):
            operand = self.view.input(slot)
            inputs.append(None if operand is None else operand.known.value)
        found = self.view.run(inputs)
        return values if found is None else np.where(self.steady, found[0].reshape(values.shape), 0)


# --- Relation ---------------------------------------------------------------------------------------------------


def _relate(view: View) -> Relation:
    """X `[t] n i`, W `d ([g] h) i`, R `d ([g] h) h`, B `d ([b] h)`, states `d n h`, Y `[t] d n h`"""
    for slot, what in ((_WEIGHTS, "weights"), (_RECURRENT, "recurrent weights")):
        if view.data(slot).constant is None:
            raise UnresolvedError(f"its {what} are computed")
    for slot, what in ((_BIAS, "biases"), (_PEEPHOLES, "peepholes")):
        operand = view.input(slot)
        if operand is not None and operand.constant is None:
            raise UnresolvedError(f"its {what} are computed")
    x, y, state = (
        ("n [t] i", "n [t] d h", "n d h") if view.attribute("layout", 0) else ("[t] n i", "[t] d n h", "d n h")
    )
    notation = f"{x}, d ([g] h) i, d ([g] h) h, d ([b] h), n, {state}, {state}, d ([p] h) -> {y}, {state}, {state}"
    relation = resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs))
    parameters = {"activation_alpha", "activation_beta"} & set(view.node.attributes)
    return relation.pin("d") if parameters else relation


# --- Facts ------------------------------------------------------------------------------------------------------


def _forward(view: View) -> list[Known | None]:
    layer = Layer(view)
    if not layer.steady.any():
        return [None] * len(view.outputs)
    values = layer.steady_values()
    return [
        None if operand is None else Known(layer.as_output(index, layer.steady), layer.as_output(index, values))
        for index, operand in enumerate(view.outputs)
    ]


def _backward(view: View) -> list[BoolArray | None]:
    layer = Layer(view)
    needed: list[BoolArray | None] = [None if o is None else everything(o.rank) for o in view.inputs]
    needed[0] = layer.needed_features().reshape(1, 1, -1)
    for slot in range(_STATE, min(_STATE + layer.cell.states, len(view.inputs))):
        if view.inputs[slot] is not None:
            needed[slot] = layer.as_output(1, layer.alive)
    return needed


# --- Plan -------------------------------------------------------------------------------------------------------


def _retain(view: View) -> Iterable[Keep]:
    layer = Layer(view)
    keeps = []
    for index, operand in enumerate(view.outputs):
        if operand is not None:
            directions, units = layer.output_axes(index)
            reason = "other units of the layer read it"
            keeps.append(Keep(-1 - index, directions, any_along(layer.alive, 1), reason))
            keeps.append(Keep(-1 - index, units, any_along(layer.alive, 0), reason))
    mask, _ = layer.constants()
    wanted = np.asarray(layer.needed_features() & ~mask)
    return [*keeps, Keep(0, 2, wanted, "its value is constant but not the same at every step")]


def _kept_weights(layer: Layer, slot: int) -> list[BoolArray]:
    """Directions, units and (for the input) features that stay."""
    found = [layer.view.kept[_RECURRENT][0], layer.view.kept[_RECURRENT][2], layer.view.kept[slot][2]]
    return [mask for mask in found if mask is not None]


def _leaving(layer: Layer) -> BoolArray:
    """Features that leave with a constant that some unit would miss."""
    mask, value = layer.constants()
    constant, kept = np.asarray(mask & (value != 0)), layer.view.kept[0][2]
    if kept is None or not constant.any():
        return np.zeros(layer.features, np.bool_)
    directions, units, _ = _kept_weights(layer, _WEIGHTS)
    read = any_along(layer.reads & directions[:, None, None, None] & units[:, None], (0, 1, 2))
    return np.asarray(constant & ~kept & read)


def _represent(view: View) -> Iterable[Keep]:
    """New biases are two vectors per gate, more than the column of a single feature."""
    layer = Layer(view)
    leaving = _leaving(layer)
    if view.input(_BIAS) is not None or leaving.sum() > 1:
        return []
    return [Keep(0, 2, leaving, "its constant is smaller than the biases that would have to be made for it")]


def _fold(view: View) -> Mapping[int, Fold]:
    layer = Layer(view)
    indices = np.flatnonzero(_leaving(layer))
    _, value = layer.constants()
    return {0: Fold(2, indices, value[indices].astype(np.float64))} if indices.size else {}


def _rewrite(view: View) -> Rewrite:
    layer = Layer(view)
    directions, units, _ = _kept_weights(layer, _RECURRENT)
    attributes: dict[str, object] = {}
    if not units.all():
        attributes["hidden_size"] = int(units.sum())
    if not directions.all():
        attributes.update(_one_direction(layer, int(np.flatnonzero(directions)[0])))
    fold = view.folds.get(0)
    return Rewrite(attributes=attributes, constants={} if fold is None else {_BIAS: _new_bias(layer, fold)})


def _one_direction(layer: Layer, direction: int) -> dict[str, object]:
    """Attributes of a bidirectional layer of which one direction is left."""
    attributes: dict[str, object] = {"direction": ("forward", "reverse")[direction]}
    if "activations" in layer.view.node.attributes:
        attributes["activations"] = layer.activations()[direction]
    return attributes


def _new_bias(layer: Layer, fold: Fold) -> Array:
    """Biases with the constants of `fold` added to those of the input, then sliced."""
    weights = layer.gates(layer.view.data(_WEIGHTS).known.value)
    offset = weights[..., fold.indices].astype(np.float64) @ fold.values
    bias = layer.bias()
    whole = np.zeros((layer.directions, 2 * layer.cell.gates, layer.units)) if bias is None else bias.astype(np.float64)
    whole[:, : layer.cell.gates] += offset
    directions, units, _ = _kept_weights(layer, _RECURRENT)
    sliced = whole[directions][:, :, units].astype(weights.dtype)
    return sliced.reshape(sliced.shape[0], -1)


for _op in _CELLS:
    register(
        Rule(
            _op,
            since=7,
            relate=_relate,
            forward=_forward,
            backward=_backward,
            retain=_retain,
            represent=_represent,
            fold=_fold,
            rewrite=_rewrite,
        )
    )
