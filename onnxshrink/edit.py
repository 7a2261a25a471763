"""Editing a model's graph: the only module that imports onnx_graphsurgeon.

graph-surgeon gets the wiring alone (nodes and tensor names, no attributes, no weights), rewires it and drops what
nothing uses. Attributes, metadata, doc strings and weights stay in their protos and are put back on export, since
graph-surgeon's own round trip would lose some of them and break four-bit types.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxshrink.flatten import Scope
from onnxshrink.graph import Graph, Node
from onnxshrink.lazy import LazyModel
from onnxshrink.protos import copy_fields
from onnxshrink.weights import Array, Values, same

Read = Callable[[], Array]


@dataclass
class _Edit:
    """What changes at a node besides its wiring. `extra` counts the inputs that stand for bodies and captures."""

    proto: onnx.NodeProto
    scope: Scope | None
    bodies: tuple[Scope, ...] = ()
    extra: int = 0
    attributes: dict[str, Any] = field(default_factory=dict)


class Editor:
    """A model being changed. Nothing happens to the graph it was made from."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        G_LOGGER.severity = G_LOGGER.CRITICAL
        self._wiring = gs.import_onnx(_wiring_model(graph))
        self._edits: dict[int, _Edit] = {}
        self._by_output: dict[str, gs.Node] = {}
        for node, flat in zip(self._wiring.nodes, graph.flat.nodes, strict=True):
            extra = len(node.inputs) - flat.formal
            self._edits[id(node)] = _Edit(flat.source, flat.scope, flat.bodies, extra)
            for name in flat.proto.output:
                if name:
                    self._by_output[name] = node
        self._tensors: dict[str, gs.Tensor] = self._wiring.tensors()
        self._arrays: dict[str, Read | Values] = {}
        self._shared: dict[Any, gs.Tensor] = {}
        self._additions: list[tuple[gs.Node, Array]] = []
        self._before: dict[int, list[gs.Node]] = {}
        self._after: dict[int, list[gs.Node]] = {}
        self._scopes: defaultdict[Scope | None, list[gs.Node]] = defaultdict(list)
        self._names = set(self._tensors) | {node.name for node in self._wiring.nodes}

    # --- finding ------------------------------------------------------------------------------------------------

    def find(self, node: Node) -> gs.Node:
        """graph-surgeon's node for a node of the graph."""
        return self._by_output[next(name for name in node.outputs if name)]

    def _name(self, wish: str) -> str:
        name, number = wish, 0
        while name in self._names:
            number += 1
            name = f"{wish}_{number}"
        self._names.add(name)
        return name

    # --- changing -----------------------------------------------------------------------------------------------

    def constant(self, wish: str, read: Read | Values, key: Any = None) -> gs.Tensor:
        """A new constant tensor, one and the same for equal keys.

        What it holds is asked for when the model is exported, of `Values` the elements when they are written.
        """
        if key is not None and key in self._shared:
            return self._shared[key]
        tensor = gs.Variable(self._name(wish))
        self._arrays[tensor.name] = read
        if key is not None:
            self._shared[key] = tensor
        return tensor

    def set_input(self, node: gs.Node, slot: int, tensor: gs.Tensor) -> None:
        """Connect an input, adding omitted ones before it where needed."""
        formal = len(node.inputs) - self._edits[id(node)].extra
        while formal <= slot:
            node.inputs.insert(formal, gs.Variable.empty())
            formal += 1
        node.inputs[slot] = tensor

    def drop_inputs(self, node: gs.Node, slots: Iterable[int]) -> None:
        """Take inputs away; those behind move up."""
        for slot in sorted(slots, reverse=True):
            del node.inputs[slot]

    def drop_outputs(self, node: gs.Node, indices: Iterable[int]) -> None:
        """Take outputs away; those behind move up."""
        for index in sorted(indices, reverse=True):
            del node.outputs[index]

    def set_attributes(self, node: gs.Node, values: Mapping[str, Any]) -> None:
        """Change attributes; None removes one."""
        self._edits[id(node)].attributes.update(values)

    def after(self, node: gs.Node, output: int, op: str, operands: list[gs.Tensor], position: int = 0) -> gs.Node:
        """Insert a node between an output and all its readers; the output's name goes to the new node's output."""
        tensor = node.outputs[output]
        raw = gs.Variable(self._name(f"{tensor.name}_raw"))
        node.outputs[output] = raw
        inputs = list(operands)
        inputs.insert(position, raw)
        return self._insert(op, inputs, tensor, node, self._after)

    def settle(self, node: gs.Node, index: int, value: Array) -> None:
        """Put a constant in the place of an output."""
        output = node.outputs[index]
        made = self.constant(f"{output.name}_constant", partial(same, value))
        if any(output is other for other in self._wiring.outputs) or self._is_extra(output):
            node.outputs[index] = gs.Variable(self._name(f"{output.name}_raw"))
            self._insert("Identity", [made], output, node, self._after)
            return
        for reader in list(output.outputs):
            for slot, tensor in enumerate(reader.inputs):
                if tensor is output:
                    reader.inputs[slot] = made

    def fix_input(self, node: gs.Node, slot: int, mask: Array, value: Array) -> None:
        """Give some elements of an input a fixed value."""
        self.before(node, slot, "Where", self._fixed(node.inputs[slot].name, mask, value), position=2)

    def fix_output(self, node: gs.Node, mask: Array, value: Array) -> None:
        """Give some elements of the first output a fixed value."""
        self.after(node, 0, "Where", self._fixed(node.outputs[0].name, mask, value), position=2)

    def _fixed(self, name: str, mask: Array, value: Array) -> list[gs.Tensor]:
        wanted = self.constant(f"{name}_fixed", partial(same, mask))
        return [wanted, self.constant(f"{name}_values", partial(same, value))]

    def scale(self, node: gs.Node, factor: Array) -> gs.Node:
        """Multiply the first output by a constant; the node that does."""
        name = f"{node.outputs[0].name}_mul"
        return self.after(node, 0, "Mul", [self.constant(name, partial(same, factor))])

    def select(self, node: gs.Node, output: int, axis: int, indices: Array) -> None:
        """Let the readers of an output see some indices of one axis only."""
        wanted = self.constant(f"{node.outputs[output].name}_indices", partial(same, indices.astype(np.int64)))
        self.set_attributes(self.after(node, output, "Gather", [wanted]), {"axis": axis})

    def replace(
        self, node: gs.Node, names: onnx.NodeProto, nodes: Sequence[onnx.NodeProto], weights: Mapping[str, Array]
    ) -> None:
        """Put other nodes in the place of one.

        Args:
            node: what goes.
            names: what its inputs and outputs are called in `nodes`.
            nodes: in topological order; other names in them are those of `weights`, or stay among themselves.
            weights: constants.
        """
        tensors = {name: self.constant(name, partial(same, value)) for name, value in weights.items()}
        tensors.update(zip(names.input, node.inputs, strict=False))
        for index, name in enumerate(names.output):
            if name:
                tensors[name] = node.outputs[index]
                node.outputs[index] = gs.Variable(self._name(f"{name}_gone"))
        for proto in reversed(nodes):
            for name in (*proto.input, *proto.output):
                if name and name not in tensors:
                    tensors[name] = gs.Variable(self._name(name))
            inputs, outputs = (
                [tensors[n] if n else gs.Variable.empty() for n in s] for s in (proto.input, proto.output)
            )
            made = gs.Node(proto.op_type, self._name(proto.name or proto.op_type), inputs=inputs, outputs=outputs)
            made.domain = proto.domain
            self._after.setdefault(id(node), []).append(made)
            self._edits[id(made)] = _Edit(proto, self._edits[id(node)].scope)

    def add(self, node: gs.Node, value: Array) -> None:
        """Add a constant to the first output: in the constant of an Add that follows, where there is one."""
        self._additions.append((node, value))

    def _carry_out_additions(self) -> None:
        # Not before every other edit is made: the constant that follows may be sliced too.
        for node, value in self._additions:
            if not self._merge(node.outputs[0], value):
                name = f"{node.outputs[0].name}_add"
                self.after(node, 0, "Add", [self.constant(name, partial(same, value))])
        self._additions.clear()

    def _merge(self, tensor: gs.Tensor, value: Array) -> bool:
        readers = tensor.outputs
        if len(readers) != 1 or readers[0].op != "Add" or any(tensor is output for output in self._wiring.outputs):
            return False
        (reader,) = readers
        slot = next((i for i, t in enumerate(reader.inputs) if t is not tensor), None)
        read = self._reader(reader.inputs[slot].name) if slot is not None else None
        if slot is None or read is None:
            return False
        before = read()
        if np.broadcast_shapes(before.shape, value.shape) != before.shape:
            return False
        merged = (before.astype(np.float64) + value).astype(before.dtype)
        wish = reader.inputs[slot].name
        wish = wish if "_shrunk" in wish else f"{wish}_shrunk"
        reader.inputs[slot] = self.constant(wish, lambda: merged)
        return True

    def _reader(self, name: str) -> Read | None:
        """How to read a constant tensor, None when the name is no constant."""
        if name in self._arrays:
            found = self._arrays[name]
            return found.array if isinstance(found, Values) else found
        constant = self._graph.constants.get(name)
        return None if constant is None else constant.array

    def before(self, node: gs.Node, slot: int, op: str, operands: list[gs.Tensor], position: int = 0) -> gs.Node:
        """Insert a node between a tensor and one input."""
        tensor = node.inputs[slot]
        made = gs.Variable(self._name(f"{tensor.name}_{op.lower()}"))
        inputs = list(operands)
        inputs.insert(position, tensor)
        new = self._insert(op, inputs, made, node, self._before)
        node.inputs[slot] = made
        return new

    def append_ones(
        self, node: gs.Node, slot: int, axis: int, rank: int, dtype: np.dtype[Any] | None, framed: bool = False
    ) -> None:
        """Give an input one more index, of ones, at the end of one axis. Readers of one tensor share the result.

        With `framed`, the ones get the frame of the others: they are appended to what the node reads that makes the
        input, and that node is repeated.
        """
        tensor = node.inputs[slot]
        if framed:
            key = ("framed ones", tensor.name, axis)
            if key not in self._shared:
                again = self._again(tensor.inputs[0], node)
                self.append_ones(again, 0, axis, rank, dtype)
                self._shared[key] = again.outputs[0]
            node.inputs[slot] = self._shared[key]
            return
        key = ("ones", tensor.name, axis)
        if key not in self._shared:
            pads = np.zeros(2 * rank, np.int64)
            pads[rank + axis] = 1
            one = np.ones((), dtype or np.float32)
            operands = [self.constant("pads", lambda: pads, ("pads", rank, axis))]
            operands.append(self.constant("one", lambda: one, ("one", str(one.dtype))))
            self._shared[key] = self.before(node, slot, "Pad", operands).outputs[0]
        node.inputs[slot] = self._shared[key]

    def _again(self, node: gs.Node, near: gs.Node) -> gs.Node:
        """A copy of a node with one output, right before another."""
        edit, name = self._edits[id(node)], self._name(f"{node.name or node.op}_again")
        output = gs.Variable(self._name(f"{node.outputs[0].name}_again"))
        made = gs.Node(node.op, name, inputs=list(node.inputs), outputs=[output], domain=node.domain)
        self._edits[id(made)] = _Edit(edit.proto, self._edits[id(near)].scope, attributes=edit.attributes)
        self._before.setdefault(id(near), []).append(made)
        return made

    def _insert(
        self, op: str, inputs: list[gs.Tensor], output: gs.Tensor, near: gs.Node, side: dict[int, list[gs.Node]]
    ) -> gs.Node:
        """A new node right before or right after another, closer to it than those inserted there earlier."""
        name = self._name(f"{near.name or near.op}_{op.lower()}")
        node = gs.Node(op, name, inputs=inputs, outputs=[output])
        side.setdefault(id(near), []).append(node)
        self._edits[id(node)] = _Edit(onnx.NodeProto(op_type=op, name=name), self._edits[id(near)].scope)
        return node

    def _placed(self, node: gs.Node) -> Iterator[gs.Node]:
        """A node among those inserted around it."""
        for other in self._before.get(id(node), ()):
            yield from self._placed(other)
        yield node
        for other in reversed(self._after.get(id(node), ())):
            yield from self._placed(other)

    def bypass(self, node: gs.Node, slot: int) -> None:
        """Let the readers of a node's output read one of its inputs. The name of a model output stays."""
        source, output = node.inputs[slot], node.outputs[0]
        if any(output is value for value in self._wiring.outputs) or self._is_extra(output):
            return
        for reader in list(output.outputs):
            for index, tensor in enumerate(reader.inputs):
                if tensor is output:
                    reader.inputs[index] = source

    def _is_extra(self, tensor: gs.Tensor) -> bool:
        """Whether a body hands the tensor on, or a subgraph that is not laid flat reads it by name."""
        return any(
            tensor is value
            for reader in tensor.outputs
            for value in reader.inputs[len(reader.inputs) - self._edits[id(reader)].extra :]
        )

    # --- writing ------------------------------------------------------------------------------------------------

    def export(self, extents: Mapping[str, list[int | None]]) -> LazyModel:
        """The changed model.

        Args:
            extents: new extents per computed tensor, for its value_info; None leaves an axis as it was.
        """
        self._carry_out_additions()
        self._wiring.nodes = [placed for node in self._wiring.nodes for placed in self._placed(node)]
        self._wiring.inputs.clear()  # cleaning up looks for each of them among all tensors
        self._wiring.cleanup()
        for node in self._wiring.nodes:
            self._scopes[self._edits[id(node)].scope].append(node)
        skeleton = self._graph.skeleton
        model = onnx.ModelProto()
        copy_fields(skeleton, model, frozenset({"graph"}))
        left = frozenset({"node", "initializer", "sparse_initializer", "value_info", "input"})
        copy_fields(self._graph.proto.graph, model.graph, left)
        read = {tensor.name for node in self._wiring.nodes for tensor in node.inputs} | set(self._graph.outputs)
        renamed = self._restore_names(read)
        nodes = self._scope_nodes(None, renamed, extents)
        model.graph.node.extend(self._constant_nodes(read, renamed))
        model.graph.node.extend(nodes)
        lazy = LazyModel(model)
        self._export_weights(lazy, read, renamed)
        self._export_inputs(model)
        made = {tensor.name for node in self._wiring.nodes for tensor in node.outputs} & read
        copies = [v for v in self._graph.proto.graph.value_info if v.name in made]
        model.graph.value_info.extend(_resized(value, value.name, extents) for value in copies)
        return lazy

    def _scope_nodes(
        self, scope: Scope | None, renamed: Mapping[str, str], extents: Mapping[str, list[int | None]]
    ) -> list[onnx.NodeProto]:
        return [self._node_proto(node, renamed, extents) for node in self._scopes[scope]]

    def _body(
        self, scope: Scope, outputs: list[str], renamed: Mapping[str, str], extents: Mapping[str, list[int | None]]
    ) -> onnx.GraphProto:
        """A body with the nodes that are left of it; its constants now stand in the main graph."""
        body = onnx.GraphProto()
        copy_fields(scope.graph, body, frozenset({"node", "initializer", "value_info", "input", "output"}))
        body.node.extend(self._scope_nodes(scope, renamed, extents))
        for value, name in zip(scope.graph.input, scope.inputs, strict=True):
            body.input.append(_resized(value, name, extents))
        made = {name for node in body.node for name in node.output} | set(scope.inputs)
        for value, flat, name in zip(scope.graph.output, scope.outputs, outputs, strict=True):
            result = renamed.get(name, name)
            if result not in made:
                # What a body hands out must be made in it.
                node = onnx.helper.make_node("Identity", [result], [self._name(f"{result}_out")])
                body.node.append(node)
                result = node.output[0]
            resized = _resized(value, result, {result: extents[flat]} if flat in extents else {})
            body.output.append(resized)
        return body

    def _restore_names(self, read: set[str]) -> dict[str, str]:
        """A changed weight takes back the name of the weight that it stands for, when that one is gone."""
        renamed: dict[str, str] = {}
        taken: set[str] = set()
        for name in self._arrays:
            wish = name.rpartition("_shrunk")[0]
            if name in read and wish in self._graph.constants and wish not in read and wish not in taken:
                renamed[name] = wish
                taken.add(wish)
        return renamed

    def _node_proto(
        self, node: gs.Node, renamed: Mapping[str, str], extents: Mapping[str, list[int | None]]
    ) -> onnx.NodeProto:
        edit = self._edits[id(node)]
        proto = onnx.NodeProto()
        copy_fields(edit.proto, proto, frozenset({"input", "output", "attribute"}))
        formal = len(node.inputs) - edit.extra
        proto.input.extend(renamed.get(tensor.name, tensor.name) for tensor in node.inputs[:formal])
        proto.output.extend(tensor.name for tensor in node.outputs)
        bodies = {scope.attribute for scope in edit.bodies}
        proto.attribute.extend(
            a for a in edit.proto.attribute if a.name not in edit.attributes and a.name not in bodies
        )
        for name, value in edit.attributes.items():
            if value is not None:
                proto.attribute.append(onnx.helper.make_attribute(name, value))
        inner = [tensor.name for tensor in node.inputs[formal:]]
        for scope in edit.bodies:
            outputs, inner = inner[: len(scope.outputs)], inner[len(scope.outputs) :]
            body = self._body(scope, outputs, renamed, extents)
            proto.attribute.append(onnx.helper.make_attribute(scope.attribute, body))
        return proto

    def _constant_nodes(self, read: set[str], renamed: Mapping[str, str]) -> list[onnx.NodeProto]:
        """`Constant` nodes whose weights were left out of the skeleton."""
        there = {tensor.name for node in self._wiring.nodes for tensor in node.outputs} | set(renamed.values())
        return [
            node
            for node in self._graph.proto.graph.node
            if node.op_type == "Constant" and node.output[0] in read and node.output[0] not in there
        ]

    def _export_weights(self, model: LazyModel, read: set[str], renamed: Mapping[str, str]) -> None:
        replaced = set(renamed.values())
        graph = self._graph.proto.graph
        overridable = {value.name for value in graph.input} - set(self._graph.constants)
        for tensor in graph.initializer:
            if (tensor.name in read or tensor.name in overridable) and tensor.name not in replaced:
                model.add_again(tensor, self._graph.model.values.get(tensor.name))
        for name, tensor in self._graph.flat.constants.items():
            if name in read and name not in replaced:
                model.add_again(tensor, name=name)
        for sparse in graph.sparse_initializer:
            if sparse.values.name in read:
                model.proto.graph.sparse_initializer.append(sparse)
        for name, found in self._arrays.items():
            if name in read:
                model.add(renamed.get(name, name), found if isinstance(found, Values) else Values.of(found()))

    def _export_inputs(self, model: onnx.ModelProto) -> None:
        """The interface as it was; before IR version 4 every initializer is listed among the inputs too."""
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        listed = set()
        for value in self._graph.proto.graph.input:
            if value.name in self._graph.constants and value.name not in weights:
                continue
            copy = model.graph.input.add()
            copy.CopyFrom(value)
            listed.add(value.name)
            if value.name in self._graph.constants:
                _set_dims(copy, list(weights[value.name].dims))
        if self._graph.proto.ir_version < 4:
            for name, tensor in weights.items():
                if name not in listed:
                    info = onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))
                    model.graph.input.append(info)


def _resized(value: onnx.ValueInfoProto, name: str, extents: Mapping[str, list[int | None]]) -> onnx.ValueInfoProto:
    """A value_info under a new name, with the extents that its tensor has now."""
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    copy.name = name
    if name in extents:
        _set_dims(copy, extents[name])
    return copy


def _set_dims(value: onnx.ValueInfoProto, extents: list[int | None] | list[int]) -> None:
    if not value.type.tensor_type.HasField("shape"):
        return
    for dim, extent in zip(value.type.tensor_type.shape.dim, extents, strict=True):
        if extent is not None and dim.HasField("dim_value"):
            dim.dim_value = extent


def _wiring_model(graph: Graph) -> onnx.ModelProto:
    """Nodes and names alone, control flow laid flat."""
    source = graph.skeleton.graph
    model = onnx.ModelProto(ir_version=graph.skeleton.ir_version)
    model.opset_import.extend(graph.skeleton.opset_import)
    model.graph.name = source.name or "graph"
    for flat in graph.flat.nodes:
        node = model.graph.node.add()
        node.op_type, node.name, node.domain = flat.proto.op_type, flat.proto.name, flat.proto.domain
        node.input.extend(flat.proto.input)
        node.output.extend(flat.proto.output)
    names = {value.name for value in source.input} | {tensor.name for tensor in source.initializer}
    names |= set(graph.flat.body_inputs) | set(graph.flat.constants)
    model.graph.input.extend(onnx.ValueInfoProto(name=name) for name in names)
    model.graph.output.extend(onnx.ValueInfoProto(name=value.name) for value in source.output)
    return model
