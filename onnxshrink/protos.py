"""Protobuf messages: read, and copied in part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
from google.protobuf.message import Message  # type: ignore[import-untyped]

# What onnx's shape inference calls an extent that it cannot tell.
UNTOLD = "unk__"


@dataclass(frozen=True, eq=False)
class BareNode:
    """A node of a model, before it is a node of a graph."""

    proto: onnx.NodeProto

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute that the node has, else the default."""
        for attribute in self.proto.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return default

    def given(self, slot: int) -> bool:
        """Whether the node has an input there."""
        return slot < len(self.proto.input) and bool(self.proto.input[slot])


def dims_of(value: onnx.ValueInfoProto) -> tuple[int | str | None, ...] | None:
    """Extents of a tensor as a graph declares them, None when it declares none."""
    return extents_of(value.type.tensor_type)


def extents_of(kind: onnx.TypeProto.Tensor) -> tuple[int | str | None, ...] | None:
    """Extents of a type of tensors, None when it has none.

    A negative extent is unknown: some converters write -1, and onnx's inference finds such in branches that never run.
    """
    if not kind.HasField("shape"):
        return None
    dims = kind.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else d.dim_param or None for d in dims)


def copy_fields(source: Message, target: Message, leave: frozenset[str]) -> None:
    """Copy every field that is set, except those in `leave`."""
    for descriptor, value in source.ListFields():
        if descriptor.name in leave:
            continue
        if isinstance(value, Message):
            getattr(target, descriptor.name).CopyFrom(value)
        elif isinstance(value, (str, bytes, int, float)):
            setattr(target, descriptor.name, value)
        else:
            getattr(target, descriptor.name).MergeFrom(value)


def split_at(message: Message, name: str) -> tuple[Message, Message]:
    """Two messages: the fields whose numbers are below that of the named field, and those whose numbers are above."""
    fields = message.DESCRIPTOR.fields
    number = message.DESCRIPTOR.fields_by_name[name].number
    before, after = type(message)(), type(message)()
    copy_fields(message, before, frozenset(field.name for field in fields if field.number >= number))
    copy_fields(message, after, frozenset(field.name for field in fields if field.number <= number))
    return before, after
