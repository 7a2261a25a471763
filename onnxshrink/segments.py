"""Models that are too large to be in memory at once, run a few nodes at a time.

A model is cut into segments, runs of nodes whose weights fit in memory together. Each becomes a model of its own, which
hands its results on to the next. The whole graph is computed, and no more than one segment's weights are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from onnxshrink.flatten import outer_names, subgraphs
from onnxshrink.inputs import Feed, PartError, RunError
from onnxshrink.lazy import data_blocks
from onnxshrink.protos import copy_fields
from onnxshrink.roles import fed
from onnxshrink.runtime import Model, Session, load_error
from onnxshrink.save import tensor_bytes
from onnxshrink.weights import Values

_SEGMENT = 1 << 27  # bytes of weights in one segment; a single larger weight has a segment of its own
_FOLDER = "session.model_external_initializers_file_folder_path"
_STREAMED = 1 << 29  # bytes of weights; a model with more is run in segments
# Weights are used where they lie; packed copies of them would double what they take.
_ENTRIES = {"session.disable_prepacking": "1"}


@dataclass
class Segment:
    """Some nodes.

    Attributes:
        nodes: the nodes, in order.
        weights: names of the initializers that they read.
        inputs: what they read of the model's inputs and of earlier segments.
        outputs: what later segments read of their results, and the model's outputs among these.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def make_session(model: Model, optimised: bool = True, exposed: Sequence[str] = ()) -> Session | StreamedSession:
    """A session whose outputs also are the tensors in `exposed`; of a large model, one that runs it in segments.

    Raises RunError where onnxruntime does not take the model; in segments, it is raised when that runs.
    """
    if model.nbytes <= _STREAMED:
        return Session(model, optimised, exposed)
    return StreamedSession(model, optimised, exposed)


def open_session(model: Model) -> Session | StreamedSession:
    """A session of a model that has to load. Raises LoadError."""
    try:
        return make_session(model)
    except RunError as error:
        raise load_error(model, error) from error


def cut(model: onnx.ModelProto, wanted: Iterable[str], limit: int) -> list[Segment]:
    """The segments of a model, in order.

    Args:
        model: the model; of its initializers names, types and shapes are enough.
        wanted: tensors that are needed in the end.
        limit: bytes of weights in one segment; a single larger weight has a segment of its own.
    """
    graph = model.graph
    sizes = {tensor.name: tensor_bytes(tensor) for tensor in graph.initializer}
    sizes |= {sparse.values.name: tensor_bytes(sparse.values) for sparse in graph.sparse_initializer}
    segments, room = [Segment()], limit
    for node in graph.node:
        weights = {name for name in _reads(node) if name in sizes}
        more = sum(sizes[name] for name in weights - segments[-1].weights)
        if more and more > room and segments[-1].nodes:
            segments.append(Segment())
            room, more = limit, sum(sizes[name] for name in weights)
        segments[-1].nodes.append(node)
        segments[-1].weights |= weights
        room -= more
    _connect(segments, set(sizes), set(wanted))
    return segments


def _reads(node: onnx.NodeProto) -> set[str]:
    captured = {name for graph in subgraphs(node) for name in outer_names(graph)}
    return {name for name in node.input if name} | captured


def _connect(segments: list[Segment], weights: set[str], wanted: set[str]) -> None:
    """What each segment takes and gives."""
    later = set(wanted)
    for segment in reversed(segments):
        made = [name for node in segment.nodes for name in node.output if name]
        read = {name for node in segment.nodes for name in _reads(node)}
        segment.outputs = [name for name in made if name in later]
        segment.inputs = sorted(read - set(made) - weights)
        later |= set(segment.inputs)


class StreamedSession:
    """As `Session`, for a model of which only one segment at a time is in memory.

    Where the runtime does not take a segment, or a value cannot be handed on, the model is loaded as a whole after all.

    Args:
        model: the model.
        optimised: with graph optimisations, within each segment.
        exposed: tensors that are outputs besides those of the model.

    Attributes:
        names: of the outputs.
        types: of the outputs, as onnxruntime writes them; known once it has run.
    """

    def __init__(self, model: Model, optimised: bool = True, exposed: Sequence[str] = ()) -> None:
        self._source = model
        self._model = model.lazy()
        self._optimised = optimised
        self._exposed = list(exposed)
        self._whole: Session | None = None
        proto = self._model.proto
        self.names = [value.name for value in proto.graph.output] + self._exposed
        self._segments = cut(proto, self.names, _SEGMENT)
        self._initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._types = {value.name: value.type for value in fed(proto.graph)}
        self._texts: dict[str, str] = {}

    @property
    def types(self) -> list[str]:
        return [self._texts[name] for name in self.names] if self._whole is None else self._whole.types

    @property
    def folder(self) -> Path | None:
        """Where files of weights lie."""
        return None if self._source.path is None else self._source.path.parent.resolve()

    def run(self, feed: Feed) -> list[Any]:
        """The outputs on one set of inputs. Raises RunError."""
        (outputs,) = self.run_all([feed])
        return outputs

    def run_all(self, feeds: Sequence[Feed]) -> list[list[Any]]:
        """The outputs on some sets of inputs; every segment is loaded once. Raises RunError."""
        if self._whole is None:
            try:
                return self._run_segments(feeds)
            except PartError:
                self._whole = self._open_whole()
        return self._whole.run_all(feeds)

    def _run_segments(self, feeds: Sequence[Feed]) -> list[list[Any]]:
        alive = [dict(feed) for feed in feeds]
        for number, segment in enumerate(self._segments):
            if not segment.outputs:
                continue
            session = self._open(segment)
            for values in alive:
                given = {name: values[name] for name in segment.inputs}
                values.update(zip(session.names, session.run(given), strict=True))
            for name, text in zip(session.names, session.types, strict=True):
                self._texts[name] = text
                self._types[name] = _type_of(text)
            del session  # before the next one is loaded
            needed = {name for later in self._segments[number + 1 :] for name in later.inputs}.union(self.names)
            alive = [{name: value for name, value in values.items() if name in needed} for values in alive]
        missing = [name for name in self.names if name not in self._texts]
        if missing:
            raise PartError(f"output {missing[0]!r} is no result of a node")
        return [[values[name] for name in self.names] for values in alive]

    def _open(self, segment: Segment) -> Session:
        try:
            return Session(_Part(self, segment), self._optimised, entries=_ENTRIES)
        except RunError as error:
            raise PartError(str(error)) from error

    def _open_whole(self) -> Session:
        try:
            return Session(self._source, self._optimised, self._exposed)
        except RunError as error:
            raise PartError(str(error)) from error

    def make(self, segment: Segment) -> onnx.ModelProto:
        """One segment as a model of its own."""
        whole, made = self._model.proto, onnx.ModelProto()
        copy_fields(whole, made, frozenset({"graph"}))
        made.graph.name = whole.graph.name
        made.graph.node.extend(segment.nodes)
        for name in segment.inputs:
            made.graph.input.add(name=name).type.CopyFrom(self._types[name])
        made.graph.output.extend(onnx.ValueInfoProto(name=name) for name in segment.outputs)
        for name in sorted(segment.weights & self._initializers.keys()):
            self._add_weight(made.graph.initializer.add(), self._initializers[name], self._model.values.get(name))
        sparse = whole.graph.sparse_initializer
        made.graph.sparse_initializer.extend(tensor for tensor in sparse if tensor.values.name in segment.weights)
        return made

    def _add_weight(self, target: onnx.TensorProto, tensor: onnx.TensorProto, values: Values | None) -> None:
        target.CopyFrom(tensor)
        if values is None:
            return
        if values.place is None or self.folder is None:
            target.raw_data = b"".join(data_blocks(values))
            return
        target.data_location = onnx.TensorProto.EXTERNAL
        location = values.place.path.relative_to(self.folder)
        entries = {"location": location, "offset": values.place.offset, "length": values.nbytes}
        for key, value in entries.items():
            target.external_data.add(key=key, value=str(value))


@dataclass(frozen=True)
class _Part:
    """A segment as onnxruntime can load it."""

    session: StreamedSession
    segment: Segment

    def load(self, options: Any, exposed: Sequence[str]) -> Any:
        import onnxruntime

        if self.session.folder is not None:
            options.add_session_config_entry(_FOLDER, str(self.session.folder))
        data = self.session.make(self.segment).SerializeToString()
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _type_of(text: str) -> onnx.TypeProto:
    """The type that onnxruntime writes as `tensor(float)` or `seq(tensor(int64))`. Raises PartError for others."""
    outer, _, inner = text.removesuffix(")").partition("(")
    made, kinds = onnx.TypeProto(), dict(onnx.TensorProto.DataType.items())
    if outer == "tensor" and inner.upper() in kinds:
        made.tensor_type.elem_type = kinds[inner.upper()]
    elif outer == "seq":
        made.sequence_type.elem_type.CopyFrom(_type_of(inner))
    else:
        raise PartError(f"a value of type {text} cannot be handed on from one part of a model to the next")
    return made
