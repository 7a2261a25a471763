"""Functions of the user that say how a node becomes smaller: `{operator: function(node, masks) -> replacement}`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn

import numpy as np
import onnx

from onnxshrink import coupling
from onnxshrink.errors import InputError
from onnxshrink.evaluate import run_nodes
from onnxshrink.graph import Node
from onnxshrink.mask_arrays import near_names
from onnxshrink.probe import constant_outputs, draw
from onnxshrink.registry import Lookup, Rewrite, Rule, rule_of
from onnxshrink.scopes import module_classes, module_path
from onnxshrink.view import Operand, View
from onnxshrink.weights import Array

_EXTENT = 2  # of free dimensions, where a replacement is tried
# Between a node and its replacement: sums of fewer terms, in another order.
_TOLERANCE = 1e-4


@dataclass(frozen=True, eq=False)
class ReplaceableNode:
    """A node as a replacement function sees it.

    Attributes:
        name: of the node.
        op_type, domain: its operator; the default domain is "".
        attributes: values by name.
        inputs: names of the inputs, constants among them; "" for one left out.
        outputs: names of the outputs.
        constants: whole constant inputs by name; a parameter of the module goes by its own name ("weight").
        proposal: the constants as they would be written without the function, where the operator has a rule.
        module: name of the module that the node was exported from, None when nobody says.
    """

    name: str
    op_type: str
    domain: str
    attributes: Mapping[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: Mapping[str, Array]
    proposal: Mapping[str, Array]
    module: str | None


@dataclass(frozen=True, eq=False)
class Replacement:
    """What a replacement function returns; a mapping alone stands for `constants`.

    Attributes:
        constants: new values of constant inputs, by the names that `ReplaceableNode.constants` has.
        attributes: new attribute values; None removes one.
        nodes: nodes that take the place of this one. They name its inputs and outputs as it does; the constants among
            its inputs are as in `constants`, else whole. Other names are those of `weights`, or their own.
        weights: further constants of `nodes`.
    """

    constants: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    nodes: Sequence[onnx.NodeProto] = ()
    weights: Mapping[str, Any] = field(default_factory=dict)


Masks = tuple[list[Array], Any, dict[str, Array]]
ReplaceFunction = Callable[[ReplaceableNode, Masks], Any]


def replacer(functions: Mapping[str, ReplaceFunction], samples: int, otherwise: Lookup = rule_of) -> Lookup:
    """Rules that let functions write the nodes that they are for.

    A key is an operator type (`"Conv"`), one with its domain (`"com.acme::Scale"`), or the class of a PyTorch module
    (`"Conv2d"`), which stands for all nodes that such a module was exported to. Where an operator has a rule, that
    decides what leaves, and the function writes what is left. Where it has none, what leaves is found by trial: the
    node is run alone on `samples` random inputs (`onnxshrink.coupling`).
    """
    for name, function in functions.items():
        if not callable(function):
            raise InputError(f"customized_replace_func[{name!r}] is a {type(function).__name__}, not a function")

    def lookup(node: Node) -> Rule | None:
        rule = otherwise(node)
        found = _function_for(node, functions)
        if found is None:
            return rule
        writer = _Writer(*found)
        if rule is not None and rule.refusal is None and not rule.unproven:
            return replace(rule, rewrite=partial(writer.amend, rule), unproven=writer.words)
        return Rule(
            node.op,
            node.domain,
            relate=lambda view: coupling.couple(view, samples),
            forward=lambda view: constant_outputs(view, samples),
            backward=lambda view: coupling.needed(view, samples),
            retain=coupling.retain,
            rewrite=writer.write,
            decodes=True,
            unproven=f"{writer.words}, {samples} random samples",
        )

    return lookup


def _function_for(node: Node, functions: Mapping[str, ReplaceFunction]) -> tuple[str, ReplaceFunction] | None:
    keys = [f"{node.domain}::{node.op}", node.op, *reversed(module_classes(node.flat.source))]
    return next(((key, functions[key]) for key in keys if key in functions), None)


@dataclass(frozen=True, eq=False)
class _Writer:
    """One function, and the key that it goes by."""

    key: str
    function: ReplaceFunction

    @property
    def words(self) -> str:
        """How a report names the function."""
        return f"replaced by {getattr(self.function, '__name__', type(self.function).__name__)}"

    def amend(self, rule: Rule, view: View) -> Rewrite:
        """What the rule writes, with what the function changes of it."""
        base = rule.rewrite(view) if rule.rewrite is not None else Rewrite()
        if not _shrinks(view):
            return base
        names = _constant_names(view)
        proposal = {name: _proposed(view, base, slot) for name, slot in names.items()}
        answer = self._ask(view, names, proposal)
        if answer is None:
            return base
        for name, value in answer.constants.items():
            if np.shape(value) != proposal[name].shape:
                self._fail(view, f"{name!r} has shape {list(np.shape(value))}, not {list(proposal[name].shape)}")
        return self._rewrite(view, base, answer, names)

    def write(self, view: View) -> Rewrite:
        """What the function writes."""
        if not _shrinks(view):
            return Rewrite()
        names = _constant_names(view)
        answer = self._ask(view, names, {})
        if answer is None:
            self._fail(view, "nothing was returned, and the operator has no rule")
        rewrite = self._rewrite(view, Rewrite(), answer, names)
        self._try(view, rewrite)
        return rewrite

    def _ask(self, view: View, names: Mapping[str, int], proposal: Mapping[str, Array]) -> Replacement | None:
        answer = self.function(_node_view(view, names, proposal), _masks(view, names))
        if answer is None or isinstance(answer, Replacement):
            found = answer
        elif isinstance(answer, Mapping):
            found = Replacement(constants=answer)
        else:
            self._fail(view, f"it returned a {type(answer).__name__}, not a Replacement or a mapping of constants")
        for name in found.constants if found is not None else ():
            if name not in names:
                self._fail(view, f"the node has no constant {name!r}{near_names(name, names)}")
        return found

    def _rewrite(self, view: View, base: Rewrite, answer: Replacement, names: Mapping[str, int]) -> Rewrite:
        given = {names[name]: self._array(view, names[name], value) for name, value in answer.constants.items()}
        nodes = tuple(_with_attributes(node) for node in answer.nodes)
        weights = {name: np.asarray(value) for name, value in answer.weights.items()}
        constants = {**base.constants, **given}
        return replace(
            base,
            constants=constants,
            attributes={**base.attributes, **answer.attributes},
            nodes=nodes,
            weights=weights,
            bypass=None if nodes or given else base.bypass,
        )

    def _array(self, view: View, slot: int, value: Any) -> Array:
        array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
        dtype = view.data(slot).dtype
        if dtype is not None and array.dtype != dtype:
            self._fail(view, f"{view.data(slot).name!r} is of {array.dtype}, not of {dtype}")
        return array

    def _try(self, view: View, rewrite: Rewrite) -> None:
        """Run the node and its replacement alone: the same shapes as what is kept, and the same numbers."""
        whole = draw(view, np.random.default_rng(0), _EXTENT)
        expected = coupling.outputs_of(view, whole)
        cut = [_cut(view, slot, value) for slot, value in enumerate(whole)]
        for slot, constant in rewrite.constants.items():
            cut[slot] = constant() if callable(constant) else constant
        actual = _run_replacement(view, rewrite, cut)
        for index, operand in enumerate(view.outputs):
            if operand is None:
                continue
            wanted = _cut(view, -1 - index, expected[-1 - index])
            found = None if actual is None else actual[index]
            assert wanted is not None
            if found is None:
                shapes = [list(value.shape) for value in cut if value is not None]
                self._fail(view, f"what it returned does not run on inputs and constants of the shapes {shapes}")
            elif found.shape != wanted.shape:
                self._fail(view, f"output {operand.name!r} has shape {list(found.shape)}, not {list(wanted.shape)}")
            elif not np.allclose(found, wanted, rtol=_TOLERANCE, atol=_TOLERANCE * _range(wanted), equal_nan=True):
                self._fail(view, f"output {operand.name!r} has other values than the node has there")

    def _fail(self, view: View, reason: str) -> NoReturn:
        name = getattr(self.function, "__name__", type(self.function).__name__)
        raise InputError(f"customized_replace_func[{self.key!r}] ({name}), node {view.node.label}: {reason}")


def _range(array: Array) -> float:
    finite = np.abs(array[np.isfinite(array)]) if array.dtype.kind == "f" else np.zeros(0)
    return float(finite.max(initial=0.0))


# --- what the function sees ------------------------------------------------------------------------------------------


def _slots(view: View) -> Iterator[tuple[int, Operand]]:
    yield from ((slot, o) for slot, o in enumerate(view.inputs) if o is not None)
    yield from ((-1 - index, o) for index, o in enumerate(view.outputs) if o is not None)


def _shrinks(view: View) -> bool:
    return any(mask is not None and not mask.all() for kept in view.kept.values() for mask in kept)


def _constant_names(view: View) -> dict[str, int]:
    """Slots of the constant inputs by name: that of the module's parameter, the whole one where that is ambiguous."""
    whole = {o.name: slot for slot, o in enumerate(view.inputs) if o is not None and o.constant is not None}
    short = [name.rpartition(".")[2] for name in whole]
    if len(set(short)) < len(short):
        return whole
    return dict(zip(short, whole.values(), strict=True))


def _node_view(view: View, names: Mapping[str, int], proposal: Mapping[str, Array]) -> ReplaceableNode:
    node = view.node
    constants = {}
    for name, slot in names.items():
        value = view.data(slot).value()
        assert value is not None
        constants[name] = value
    attributes = {name: view.attribute(name) for name in node.attributes}
    module = module_path(node.flat.source)
    return ReplaceableNode(
        node.label, node.op, node.domain, attributes, node.inputs, node.outputs, constants, proposal, module
    )


def _masks(view: View, names: Mapping[str, int]) -> Masks:
    """Full-size arrays of zeros and ones; a free dimension has extent one."""
    constants = set(names.values())
    inputs = [_mask(view, slot, o) for slot, o in _slots(view) if slot >= 0 and slot not in constants]
    outputs = [_mask(view, slot, o) for slot, o in _slots(view) if slot < 0]
    weights = {}
    for name, slot in names.items():
        operand = view.data(slot)
        assert operand.constant is not None
        nonzero = operand.constant.nonzero(tuple(range(operand.rank)))
        weights[name] = _mask(view, slot, operand) & nonzero.astype(np.uint8)
    return inputs, outputs[0] if len(outputs) == 1 else outputs, weights


def _mask(view: View, slot: int, operand: Operand) -> Array:
    mask = np.ones([operand.extent(axis) or 1 for axis in range(operand.rank)], np.uint8)
    for axis, kept in enumerate(view.kept.get(slot, ())):
        if kept is not None:
            shape = [1] * operand.rank
            shape[axis] = kept.size
            mask = mask & kept.reshape(shape).astype(np.uint8)
    return mask


def _proposed(view: View, base: Rewrite, slot: int) -> Array:
    """A constant input as it is written without the function."""
    if slot in base.constants:
        made = base.constants[slot]
        return made() if callable(made) else made
    value = _cut(view, slot, view.data(slot).value())
    assert value is not None
    return value


def _cut(view: View, slot: int, value: Array | None) -> Array | None:
    """What is kept of an operand."""
    if value is None:
        return None
    for axis, kept in enumerate(view.kept.get(slot, ())):
        if kept is not None and not kept.all() and value.shape[axis] == kept.size:
            value = value.compress(kept, axis)
    return value


# --- trying a replacement --------------------------------------------------------------------------------------------


def _with_attributes(node: onnx.NodeProto) -> onnx.NodeProto:
    if not isinstance(node, onnx.NodeProto):
        raise InputError(f"a replacement's nodes are onnx.NodeProto, not {type(node).__name__}")
    return node


def _run_replacement(view: View, rewrite: Rewrite, inputs: list[Array | None]) -> list[Array | None] | None:
    """Outputs of what takes the place of a node, None when it does not run."""
    proto = onnx.NodeProto()
    proto.CopyFrom(view.node.proto)
    kept = [a for a in proto.attribute if a.name not in rewrite.attributes]
    del proto.attribute[:]
    proto.attribute.extend(kept)
    new = {name: value for name, value in rewrite.attributes.items() if value is not None}
    proto.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in new.items())
    values = {name: value for name, value in zip(view.node.inputs, inputs, strict=True) if value is not None}
    values.update(rewrite.weights)
    names = [name for name in view.node.outputs if name]
    results = run_nodes(rewrite.nodes or (proto,), view.opsets, values, names, view.node.functions)
    if results is None:
        return None
    found = dict(zip(names, results, strict=True))
    return [found.get(name) for name in view.node.outputs]
