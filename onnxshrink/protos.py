"""Protobuf messages, copied in part."""

from __future__ import annotations

from google.protobuf.message import Message  # type: ignore[import-untyped]


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
