"""Writing files: whole or not at all, beside their target and then in its place."""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Set
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from onnxshrink.errors import InputError
from onnxshrink.lazy import FIELDS_OF_DATA, LARGEST, LazyModel, data_blocks
from onnxshrink.protos import copy_fields
from onnxshrink.reading import data_files
from onnxshrink.weights import Values

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

_INLINE = 1024  # smaller tensors stay in the model, as onnx does it
_PAGE = 4096  # the specification's advice for mapping


def check_target(path: str | os.PathLike[str], what: str) -> Path:
    """The path, if a file can be written there. Raises InputError; writes nothing."""
    target = Path(path)
    folder = target.parent
    if target.is_dir():
        raise InputError(f"{what} {target}: is a folder, not a file name")
    if not folder.is_dir():
        raise InputError(f"{what} {target}: the folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{what} {target}: the folder {folder} is not writable")
    if target.exists() and not target.is_file():
        raise InputError(f"{what} {target}: is not a regular file")
    return target


class _Temporary:
    """A new file beside its target. It is locked while it is in use, so that nobody takes it for a leftover."""

    def __init__(self, target: Path, kind: str = "") -> None:
        while True:
            self.path = target.with_name(f".{target.name[:150]}.{secrets.token_hex(8)}{kind}.tmp")
            self.file = self.path.open("xb")
            _lock(self.file)
            if self.path.exists():
                return
            self.file.close()  # swept away before it was locked

    def finish(self, durable: bool) -> None:
        """Nothing more is to come; `durable` waits until it would outlast a loss of power."""
        self.file.flush()
        if durable:
            os.fsync(self.file.fileno())
        if fcntl is None:
            self.file.close()  # an open file cannot be moved there

    def move(self, place: Path) -> None:
        """Let it take the place of another file, which it replaces as a whole, with that one's permissions."""
        if place.exists():
            self.path.chmod(stat.S_IMODE(place.stat().st_mode))
        os.replace(self.path, place)
        self.file.close()

    def remove(self) -> None:
        """Remove it, unless it has been moved."""
        with contextlib.suppress(OSError):  # what is still in its buffer does not fit on a full disk either
            self.file.close()
        self.path.unlink(missing_ok=True)


def _lock(file: BinaryIO) -> bool:
    """Whether nobody else holds the file; where locks do not work, nobody can tell."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def sweep(target: Path) -> None:
    """Remove what runs that were killed have left beside a target."""
    pattern = re.compile(re.escape(f".{target.name[:150]}.") + r"[0-9a-f]{16}(\.data)?\.tmp")
    for name in os.listdir(target.parent):
        if pattern.fullmatch(name):
            with contextlib.suppress(OSError), target.with_name(name).open("rb") as file:
                if _lock(file):
                    target.with_name(name).unlink()


@contextlib.contextmanager
def _refusals(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` once it is complete (and on disk, where it replaces a file).

    When anything goes wrong `path` is as it was. Raises InputError where the system refuses to write.
    """
    path = Path(os.path.realpath(path))
    with _refusals(path):
        sweep(path)
        durable = path.exists()
        temporary = _Temporary(path)
        try:
            yield temporary.file
            temporary.finish(durable)
            temporary.move(path)
        finally:
            temporary.remove()
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can; the file itself is on disk
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(text: str, path: Path) -> None:
    """Write text, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def write_model(
    model: onnx.ModelProto | LazyModel, path: Path, *, external: bool = False, keep: Set[Path] = frozenset()
) -> None:
    """Write a model, whole or not at all; the arguments are those of `Staged`."""
    with Staged(model, path, external=external, keep=keep) as staged:
        staged.commit()


class Staged:
    """A model that is complete on disk, beside the file whose place it takes once it is told to.

    Used as a context: what is not committed when it ends is removed, and the target is as it was. InputError is raised
    where the system refuses to write.

    Args:
        model: a model that holds all its weights, or one that reads them when they are written; it is not changed.
        path: the file.
        external: put the weights in a file of their own, `NAME.data`; forced beyond 2 GB.
        keep: data files that are not to be removed, although the model that is at `path` refers to them.

    Attributes:
        target: the file whose place the model takes, links resolved.
    """

    def __init__(
        self, model: onnx.ModelProto | LazyModel, path: Path, *, external: bool = False, keep: Set[Path] = frozenset()
    ) -> None:
        self.target = Path(os.path.realpath(path))
        self._keep = keep
        self._temporaries: list[_Temporary] = []
        self._data: _Temporary | None = None
        self._light = onnx.ModelProto()
        # What replaces nothing need not wait for the disk: losing it would lose nothing that was there before.
        self._durable = self.target.exists()
        with self._writing():
            sweep(self.target)
            if external or weight_bytes(model) > LARGEST:
                self._write_external(LazyModel.of(model) if isinstance(model, onnx.ModelProto) else model)
            else:
                self._write_whole(LazyModel(model) if isinstance(model, onnx.ModelProto) else model)

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        self._discard()

    @property
    def path(self) -> Path:
        """The complete model, under a name of its own."""
        return self._temporaries[-1].path

    def commit(self) -> None:
        """Put the model in its place: a reader finds the old one or the new one; its weights go first."""
        stale = _own_data(self.target) - self._keep
        place = None
        with self._writing():
            try:
                if self._data is not None:
                    place = _free_name(self.target)
                    self._write_light(place.name)
                    self._data.move(place)
                self._temporaries[-1].move(self.target)
            except BaseException:
                if place is not None:
                    place.unlink(missing_ok=True)
                raise
        self._discard()
        if self._durable:
            _sync_folder(self.target.parent)
        for data in stale - {place}:
            data.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with _refusals(self.target):
            try:
                yield
            except BaseException:
                self._discard()
                raise

    def _discard(self) -> None:
        for temporary in self._temporaries:
            temporary.remove()

    def _new(self, kind: str = "") -> _Temporary:
        temporary = _Temporary(self.target, kind)
        self._temporaries.append(temporary)
        return temporary

    def _write_whole(self, model: LazyModel) -> None:
        temporary = self._new()
        for piece in model.pieces():
            temporary.file.write(piece)
        temporary.finish(self._durable)

    def _write_external(self, model: LazyModel) -> None:
        self._data = self._new(".data")
        copy_fields(model.proto, self._light, frozenset({"graph"}))
        copy_fields(model.proto.graph, self._light.graph, frozenset({"initializer"}))
        for tensor in model.proto.graph.initializer:
            _move(tensor, model.values.get(tensor.name), self._light.graph.initializer.add(), self._data.file)
        self._data.finish(self._durable)
        self._write_light(self._data.path.name)

    def _write_light(self, location: str) -> None:
        """The model that refers to a data file by this name."""
        for tensor in self._light.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        temporary = self._new()
        temporary.file.write(self._light.SerializeToString())
        temporary.finish(self._durable)


def _free_name(path: Path) -> Path:
    """A name for the data of the model at `path` that no file has yet."""
    data = path.with_name(f"{path.name}.data")
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.data") if data.exists() else data


def weight_bytes(model: onnx.ModelProto | LazyModel) -> int:
    """Bytes of the initializers of the main graph."""
    proto = model if isinstance(model, onnx.ModelProto) else model.proto
    return sum(tensor_bytes(tensor) for tensor in proto.graph.initializer)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of the elements of a tensor, one each at least; none for text."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0
    elements: int = math.prod(tensor.dims)
    return elements * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _own_data(path: Path) -> set[Path]:
    """Data files of the model that lies at `path` now, as far as their names say that they are its own."""
    own = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{8})?\.data")
    if not path.is_file() or not any(own.fullmatch(name) for name in os.listdir(path.parent)):
        return set()
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError):
        return set()
    return {data for data in data_files(model, path.parent) if data.parent == path.parent and own.fullmatch(data.name)}


def _raw(tensor: onnx.TensorProto) -> bytes:
    if not tensor.HasField("raw_data"):
        tensor = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor))
    data: bytes = tensor.raw_data
    return data


def _move(tensor: onnx.TensorProto, values: Values | None, light: onnx.TensorProto, file: BinaryIO) -> None:
    """Put the data of a tensor in a file, unless it is small, and in the model a reference to it."""
    if tensor_bytes(tensor) < _INLINE:
        light.CopyFrom(tensor)
        return
    copy_fields(tensor, light, FIELDS_OF_DATA)
    light.data_location = onnx.TensorProto.EXTERNAL
    file.write(b"\0" * (-file.tell() % _PAGE))
    blocks = [_raw(tensor)] if values is None else data_blocks(values)
    entries = {"location": "", "offset": file.tell(), "length": sum(map(file.write, blocks))}
    for key, value in entries.items():
        light.external_data.add(key=key, value=str(value))
