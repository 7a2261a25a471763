"""A thin typed view of an ONNX model: nodes, tensors, constants. Nothing here changes a model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnx.inliner

from onnxshrink.errors import InputError
from onnxshrink.flatten import FlatNode, flatten
from onnxshrink.protos import copy_fields as copy_fields
from onnxshrink.protos import dims_of
from onnxshrink.reading import ModelLike as ModelLike
from onnxshrink.reading import first_line, read_model
from onnxshrink.reading import load_proto as load_proto
from onnxshrink.shapes import infer, with_knowledge
from onnxshrink.stand_ins import checkable
from onnxshrink.symbols import is_invented
from onnxshrink.weights import Array, Constant, Values, dtype_of, stored


class Period(int):
    """The extent of an axis that is a free dimension times a fixed one: the fixed one, which indices count modulo.

    A batch of N sentences with h heads each, merged in one axis of extent N * h, say. Notation treats it as an axis of
    extent h; where the true extent matters, it is unknown.
    """


Dim = int | str | None
Shape = tuple[Dim, ...]

# Larger constants are left out of the skeleton: shape inference needs the small integer ones only.
_INLINE_ELEMENTS = 256


@dataclass(frozen=True, eq=False)
class Node:
    """One node, control flow laid flat. `version` is the opset of its domain; "" stands for the default domain.

    `functions` are those of the model, which the node may call.
    """

    index: int
    flat: FlatNode = field(repr=False)
    version: int
    functions: tuple[onnx.FunctionProto, ...] = field(default=(), repr=False)

    @property
    def proto(self) -> onnx.NodeProto:
        """The node with flat names and without bodies."""
        return self.flat.proto

    @property
    def op(self) -> str:
        """Operator type."""
        return self.proto.op_type

    @cached_property
    def domain(self) -> str:
        """Operator domain, "" for the default one."""
        return "" if self.proto.domain == "ai.onnx" else self.proto.domain

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs, then of its bodies' outputs and of what its subgraphs capture; "" for an omitted one."""
        return tuple(self.proto.input)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the outputs; an omitted optional output is ""."""
        return tuple(self.proto.output)

    @cached_property
    def attributes(self) -> Mapping[str, Any]:
        """Attribute values by name; subgraphs and tensors as protos."""
        return {a.name: onnx.helper.get_attribute_value(a) for a in self.proto.attribute if not a.ref_attr_name}

    @cached_property
    def label(self) -> str:
        """What messages call the node: its name, or its operator and first output."""
        return label_of(self.proto, self.index)


def label_of(node: onnx.NodeProto, index: int = 0) -> str:
    """What messages call a node."""
    return node.name or f"{node.op_type}({node.output[0] if node.output else index})"


def _elements(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)


def constant_tensor(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The dense value of a `Constant` node, whichever attribute holds it."""
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx") or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    if attribute.ref_attr_name:  # inside a function, whose caller gives it
        return None
    if attribute.name == "value":
        tensor: onnx.TensorProto = attribute.t
        return tensor
    value = onnx.helper.get_attribute_value(attribute)
    types = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in types:
        return None
    return onnx.numpy_helper.from_array(np.asarray(value, types[attribute.name]))


def _as_input(name: str, tensor: onnx.TensorProto) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims))


def make_skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without large weights: each stands as a graph input, so that checking and inference still work."""
    skeleton = onnx.ModelProto()
    copy_fields(model, skeleton, frozenset({"graph"}))
    copy_fields(model.graph, skeleton.graph, frozenset({"node", "initializer"}))
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if _elements(tensor) <= _INLINE_ELEMENTS:
            skeleton.graph.initializer.append(tensor)
        elif tensor.name not in inputs:
            skeleton.graph.input.append(_as_input(tensor.name, tensor))
    for node in model.graph.node:
        value = constant_tensor(node)
        if value is not None and _elements(value) > _INLINE_ELEMENTS and node.output[0] not in inputs:
            skeleton.graph.input.append(_as_input(node.output[0], value))
        else:
            skeleton.graph.node.append(node)
    for described in (*skeleton.graph.input, *skeleton.graph.value_info, *skeleton.graph.output):
        for dim in described.type.tensor_type.shape.dim:
            if dim.dim_value < 0:
                # What some converters write for a free dimension.
                dim.Clear()
    return skeleton


def _check_structure(skeleton: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(checkable(skeleton))
    except onnx.checker.ValidationError as error:
        # Some operators were deprecated at the opset that brought them in; runtimes run them all the same.
        if "is deprecated" not in str(error):
            raise InputError(f"invalid model: {first_line(error)}") from None


def _is_open(shape: Shape | None) -> bool:
    return shape is None or not all(isinstance(extent, int) for extent in shape)


def _tells_more(shape: Shape | None, before: Shape | None) -> bool:
    if shape is None or before is None:
        return shape is not None
    return any(_rank_of(a) > _rank_of(b) for a, b in zip(shape, before, strict=False))


def _rank_of(extent: Dim) -> int:
    """How much an extent tells: a number more than a symbol of the model, and that more than one of inference's own."""
    if isinstance(extent, int):
        return 2
    return int(extent is not None and not is_invented(extent))


def _type_of(value: onnx.ValueInfoProto) -> tuple[Shape | None, int]:
    kind = value.type.tensor_type.elem_type if value.type.HasField("tensor_type") else 0
    return dims_of(value), kind


def _inlined(model: onnx.ModelProto, keep: frozenset[str]) -> onnx.ModelProto:
    """The model without functions, but for those that have a rule of their own or are named in `keep`."""
    from onnxshrink.registry import find  # rules are written in terms of this module

    versions = {opset.domain: opset.version for opset in model.opset_import}
    rules = [(f.domain, f.name, find(f.name, f.domain, versions.get(f.domain, 1))) for f in model.functions]
    named = [
        (domain, name)
        for domain, name, rule in rules
        if (rule is not None and rule.named) or not keep.isdisjoint((name, f"{domain}::{name}"))
    ]
    if not named:
        return onnx.inliner.inline_local_functions(model)
    return onnx.inliner.inline_selected_functions(model, named, exclude=True)


class Graph:
    """The main graph of a model, read-only: its nodes in order, and for each tensor its shape, type and constant.

    Args:
        model: a path, a `ModelProto`, or a model without its larger weights; it is not changed.
        keep: model-local functions that stay nodes, by name (`Op` or `domain::Op`); all others are inlined.

    Raises:
        InputError: a missing, truncated or invalid file, or external data that is missing or outside its folder.
    """

    def __init__(self, model: ModelLike, keep: Collection[str] = ()) -> None:
        self.model, _ = read_model(model)
        self.proto = self.model.proto
        skeleton = make_skeleton(self.proto)
        _check_structure(skeleton)
        if self.proto.functions:
            skeleton = _inlined(skeleton, frozenset(keep))
        self.skeleton = skeleton
        self.flat = flatten(skeleton.graph)
        self.constants: dict[str, Constant] = {}
        self._collect_constants()
        self.opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in skeleton.opset_import}
        self.nodes = self._make_nodes()
        self.inputs = self._interface()
        self.outputs = tuple(value.name for value in skeleton.graph.output)
        self._inferences = 0
        self.refined: dict[str, tuple[Shape | None, int]] = {}  # shapes and types that `refine` found
        self._types = self._infer_types()

    def _interface(self) -> tuple[str, ...]:
        """Graph inputs, and what loops hand to their bodies."""
        listed = tuple(value.name for value in self.proto.graph.input if value.name not in self.constants)
        return (*listed, *(name for name in self.flat.body_inputs if name not in self.constants))

    def _collect_constants(self) -> None:
        # From IR version 4 on, an initializer that is also an input may be replaced by the caller.
        overridable = {v.name for v in self.proto.graph.input} if self.proto.ir_version >= 4 else set()
        for tensor in self.proto.graph.initializer:
            if tensor.name not in overridable:
                self._add_constant(tensor.name, tensor, self.model.values.get(tensor.name))
        for name, tensor in self.flat.constants.items():
            self._add_constant(name, tensor)
        for node in (*self.proto.graph.node, *(flat.proto for flat in self.flat.nodes)):
            value = constant_tensor(node)
            if value is not None and node.output[0] not in self.constants:
                self._add_constant(node.output[0], value)

    def _add_constant(self, name: str, tensor: onnx.TensorProto, values: Values | None = None) -> None:
        if tensor.data_type != onnx.TensorProto.STRING:
            self.constants[name] = Constant.named(name, values or stored(tensor, None))

    def _make_nodes(self) -> list[Node]:
        nodes: list[Node] = []
        functions = tuple(self.skeleton.functions)
        for flat in self.flat.nodes:
            proto = flat.proto
            if proto.op_type == "Constant" and proto.output[0] in self.constants:
                continue
            version = self.opsets.get("" if proto.domain == "ai.onnx" else proto.domain, 1)
            nodes.append(Node(len(nodes), flat, version, functions))
        return nodes

    def refine(self, values: Mapping[str, Array], shapes: Mapping[str, Shape]) -> bool:
        """Infer shapes again with integer tensors that are constant after all, and shapes. True if that told more."""
        if not any(_is_open(shape) for shape, _ in self._types.values()):
            return False
        self._inferences += 1
        found = {name: (self._own(shape), kind) for name, (shape, kind) in self._infer_types(values, shapes).items()}
        better = {n: t for n, t in found.items() if t[1] and _tells_more(t[0], self._types.get(n, (None, 0))[0])}
        self.recall(better)
        return bool(better)

    def recall(self, types: Mapping[str, tuple[Shape | None, int]]) -> None:
        """Take over shapes and types that `refine` found, here or elsewhere."""
        self.refined.update(types)
        self._types.update(types)

    def _own(self, shape: Shape | None) -> Shape | None:
        """A shape whose invented symbols differ from those of other rounds of inference."""
        if shape is None:
            return None
        return tuple(f"{e}.{self._inferences}" if isinstance(e, str) and is_invented(e) else e for e in shape)

    def _infer_types(
        self, values: Mapping[str, Array] = MappingProxyType({}), shapes: Mapping[str, Shape] = MappingProxyType({})
    ) -> dict[str, tuple[Shape | None, int]]:
        typed = {name: (shape, self.element_type(name)) for name, shape in shapes.items()}
        graph = infer(with_knowledge(self.skeleton, values, typed) if values or shapes else self.skeleton)
        types = {v.name: _type_of(v) for v in (*graph.value_info, *graph.input, *graph.output)}
        if self.flat.names:
            found: dict[int, dict[str, tuple[Shape | None, int]]] = {}
            for name, (body, local) in flatten(graph).names.items():
                if id(body) not in found:
                    listed = (*body.value_info, *body.input, *body.output)
                    found[id(body)] = {value.name: _type_of(value) for value in listed}
                if local in found[id(body)]:
                    types[name] = found[id(body)][local]
        return types

    def shape(self, name: str) -> Shape | None:
        """Extents of a tensor: a number, a symbol or None per axis; None when the rank is unknown."""
        constant = self.constants.get(name)
        if constant is not None:
            return constant.shape
        return self._types.get(name, (None, 0))[0]

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """Element type of a tensor, None when unknown or not numeric."""
        constant = self.constants.get(name)
        if constant is not None:
            return constant.dtype
        code = self._types.get(name, (None, 0))[1]
        if code in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
            return None
        return dtype_of(code)

    def element_type(self, name: str) -> int:
        """Element type of a tensor as ONNX numbers it, 0 when unknown."""
        constant = self.constants.get(name)
        if constant is not None:
            return int(onnx.helper.np_dtype_to_tensor_dtype(constant.dtype))
        return self._types.get(name, (None, 0))[1]
