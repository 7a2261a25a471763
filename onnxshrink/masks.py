"""Pruning masks: reading them from files, and writing them into the weights of a model as zeros.

After `apply_masks` a mask *is* zeros in the weights; nothing later in the pipeline knows that masks exist.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from onnxshrink.errors import InputError, MaskError
from onnxshrink.mask_arrays import kept_elements
from onnxshrink.mask_names import Matcher, select_masks

MaskTree: TypeAlias = Mapping[str, ArrayLike | None] | Mapping[str, Mapping[str, ArrayLike | None]]
"""Masks by parameter name (`{"conv1.weight": m}`) or by module (`{"conv1": {"weight": m, "bias": None}}`)."""

# Bytes per element of the types in which all-zero bits are +0. 4-bit types are packed; float8e8m0 has no zero.
_WIDTHS = {
    **dict.fromkeys(("BOOL", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), 1),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 2),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 4),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64", "COMPLEX64"), 8),
    "COMPLEX128": 16,
}
_REALS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_TYPED_FIELDS = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
_LITERALS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


# --- reading -------------------------------------------------------------------------------------------------------


def load_masks(path: str | Path, map_location: Any = None) -> dict[str, Any]:
    """Read a mask file: `.npz`, `.pt` or `.pth` (needs PyTorch), or `.safetensors` (needs that package).

    Returns the dictionary as stored, flat or by module: `flatten_masks` brings both into one form. Nothing in the file
    is executed: `.npz` is read without pickles and PyTorch files with `weights_only=True`. `map_location` says where
    PyTorch puts its tensors while it reads; None: in main memory.

    Raises InputError for a missing or broken file, an unknown suffix, a missing package, and pickled objects.
    """
    path = Path(path)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise InputError(f"mask file {path}: unknown format {path.suffix!r}; use one of {', '.join(_READERS)}")
    if not path.is_file():
        raise InputError(f"mask file {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = read(path, map_location)
    except InputError:
        raise
    except Exception as error:  # the parsers raise whatever broken bytes lead them to
        reason = _first_line(error)
        raise InputError(f"mask file {path}: broken, or not plain tensors ({type(error).__name__}{reason})") from error
    if not isinstance(masks, Mapping):
        raise InputError(f"mask file {path}: holds a {type(masks).__name__}, not a dictionary of masks")
    return dict(masks)


def _read_npz(path: Path, _: Any) -> Mapping[str, Any]:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise InputError(f"mask file {path}: holds a single array without a name; write it with numpy.savez")
        return {name: archive[name] for name in archive.files}


def _read_torch(path: Path, map_location: Any) -> Any:
    torch = _optional("torch", path, "PyTorch (pip install 'onnxshrink[torch]')")
    return torch.load(path, map_location="cpu" if map_location is None else map_location, weights_only=True)


def _read_safetensors(path: Path, _: Any) -> Any:
    return _optional("safetensors.numpy", path, "the package safetensors").load_file(path)


def _optional(module: str, path: Path, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"mask file {path}: reading it needs {package}") from error


_READERS: Mapping[str, Callable[[Path, Any], Any]] = {
    ".npz": _read_npz,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".safetensors": _read_safetensors,
}


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f": {lines[0][:120].strip()}" if lines else ""


# --- one form ------------------------------------------------------------------------------------------------------


def flatten_masks(masks: MaskTree) -> dict[str, np.ndarray]:
    """Bring masks into the form `{"module.parameter": array}`.

    `{module: {"weight": m}}` becomes `{"module.weight": m}`, and what is flat stays flat. Entries that are None (NNI
    writes them for parameters without a mask) are left out. PyTorch tensors become numpy arrays.

    Raises MaskError for keys that are not text, values that are not arrays, and two masks for one name.
    """
    flat: dict[str, np.ndarray] = {}
    for name, mask in _leaves(masks):
        if name in flat:
            raise MaskError(f"mask {name!r} is given twice")
        flat[name] = _to_numpy(name, mask)
    return flat


def _leaves(masks: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if not isinstance(masks, Mapping):
        raise MaskError(f"masks must be a dictionary of arrays by name, not a {type(masks).__name__}")
    for outer, value in masks.items():
        entries = value.items() if isinstance(value, Mapping) else [(None, value)]
        for inner, mask in entries:
            name = _join(outer, inner)
            if isinstance(mask, Mapping):
                raise MaskError(f"mask {name!r} is a dictionary; masks go two levels deep: module, parameter")
            if mask is not None:
                yield name, mask


def _join(outer: Any, inner: Any) -> str:
    parts = [outer] if inner is None else [outer, inner]
    for part in parts:
        if not isinstance(part, str):
            raise MaskError(f"mask names must be text, not {part!r}")
    return ".".join(part for part in parts if part)


def _to_numpy(name: str, mask: Any) -> np.ndarray:
    if hasattr(mask, "detach"):  # a PyTorch tensor, recognised without importing PyTorch
        mask = mask.detach().cpu()
        try:
            return np.asarray(mask.numpy())
        except TypeError:  # numpy has no such type (bfloat16); 0 and 1 stay 0 and 1 in float32
            return np.asarray(mask.float().numpy())
    try:
        return np.asarray(mask)
    except ValueError as error:
        raise MaskError(f"mask {name!r} is not an array: {error}") from error


# --- writing into a model ------------------------------------------------------------------------------------------


def apply_masks(model: onnx.ModelProto, masks: MaskTree, base_dir: str | Path | None = None) -> onnx.ModelProto:
    """Copy a model with the masked elements of its weights set to +0.

    Weights are initializers, dense or sparse, and Constant nodes (by the name of their output), in the graph, in
    subgraphs and in functions; a name that several of them use is masked everywhere. Masked weights that lie in
    external files below `base_dir` are read and become part of the model (that their paths stay inside the folder is
    for the caller to check); all other external weights stay where they are.

    Raises MaskError for a mask that matches no weight, has another shape, holds values other than 0 and 1, or belongs
    to a weight whose type cannot be masked; InputError when external data cannot be read.
    """
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    flat = select_masks(flatten_masks(masks))
    if not flat:
        return masked
    weights = _weights(masked)
    shapes = {name: _tensor_of(group[0]) for name, group in weights.items()}
    for match in Matcher(masked, shapes).match(flat):
        for weight in weights[match.weight]:
            _mask_weight(match.mask, weight, match.values, base_dir)
    return masked


def zero_near(
    model: onnx.ModelProto, tolerance: float, base_dir: str | Path | None = None
) -> tuple[onnx.ModelProto, int]:
    """Copy a model with every floating-point weight of magnitude up to `tolerance` set to +0. This is lossy.

    Scalars are left alone: they are epsilons and bounds, not weights.

    Returns the copy and how many weights that were not zero became zero. Raises InputError for a tolerance that is
    negative or no number.
    """
    if not tolerance >= 0:
        raise InputError(f"zero tolerance {tolerance}: give a number that is not negative")
    copy, zeroed = onnx.ModelProto(), 0
    copy.CopyFrom(model)
    for name, weight in _named_weights(copy):
        tensor = _tensor_of(weight)
        if not isinstance(tensor, onnx.TensorProto) or tensor.data_type not in _REALS or prod(tensor.dims) < 2:
            continue
        if tensor.data_location == TensorProto.EXTERNAL:
            _load_external(name, tensor, base_dir)
        values = numpy_helper.to_array(tensor).astype(np.float64).ravel()
        near = (np.abs(values) <= tolerance) & (values != 0)
        if near.any():
            zeroed += int(near.sum())
            _zero(name, tensor, near)
    return copy, zeroed


_Weight: TypeAlias = onnx.TensorProto | onnx.SparseTensorProto | onnx.AttributeProto


def _weights(model: onnx.ModelProto) -> dict[str, list[_Weight]]:
    weights: dict[str, list[_Weight]] = {}
    for name, weight in _named_weights(model):
        weights.setdefault(name, []).append(weight)
    return weights


def _tensor_of(weight: _Weight) -> _Weight:
    return weight.t if isinstance(weight, onnx.AttributeProto) and weight.name == "value" else weight


def _named_weights(model: onnx.ModelProto) -> Iterator[tuple[str, _Weight]]:
    bodies: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    while bodies:
        body = bodies.pop()
        if isinstance(body, onnx.GraphProto):
            yield from ((tensor.name, tensor) for tensor in body.initializer)
            yield from ((sparse.values.name, sparse) for sparse in body.sparse_initializer)
        for node in body.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                yield from ((node.output[0], attribute) for attribute in node.attribute)
            for attribute in node.attribute:
                bodies += [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs


def _mask_weight(name: str, weight: _Weight, mask: np.ndarray, base_dir: str | Path | None) -> None:
    if isinstance(weight, onnx.AttributeProto):
        weight = _constant_value(name, weight)
    kept = kept_elements(name, mask, tuple(weight.dims))
    if isinstance(weight, onnx.SparseTensorProto):
        kept, weight = _kept_values(kept, weight), weight.values
    if kept.all():
        return
    if weight.data_location == TensorProto.EXTERNAL:
        _load_external(name, weight, base_dir)
    _zero(name, weight, ~kept.ravel())


def _constant_value(name: str, attribute: onnx.AttributeProto) -> onnx.TensorProto | onnx.SparseTensorProto:
    """The tensor in an attribute of a Constant node; a literal such as `value_floats` is turned into one in place."""
    if attribute.name == "sparse_value":
        return attribute.sparse_tensor
    if attribute.name in _LITERALS:
        value = np.array(helper.get_attribute_value(attribute), _LITERALS[attribute.name])
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))
    elif attribute.name != "value":
        raise MaskError(f"mask {name!r} is for a constant without numbers ({attribute.name})")
    return attribute.t


def _kept_values(kept: np.ndarray, sparse: onnx.SparseTensorProto) -> np.ndarray:
    indices = numpy_helper.to_array(sparse.indices)
    return np.asarray(kept.ravel()[indices] if indices.ndim == 1 else kept[tuple(indices.T)])


def _load_external(name: str, tensor: onnx.TensorProto, base_dir: str | Path | None) -> None:
    if base_dir is None:
        raise InputError(f"mask {name!r}: the weight lies in an external file, and the model's folder is not known")
    try:
        external_data_helper.load_external_data_for_tensor(tensor, str(base_dir))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise InputError(f"mask {name!r}: cannot read the weight's external data{_first_line(error)}") from error
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _zero(name: str, tensor: onnx.TensorProto, dead: np.ndarray) -> None:
    """Clear the bits of the dead elements: +0 in every type, whatever stood there (inf, NaN, a negative number)."""
    type_name = TensorProto.DataType.Name(tensor.data_type)
    width = _WIDTHS.get(type_name)
    if width is None:
        raise MaskError(f"mask {name!r}: weights of type {type_name} cannot be masked")
    if tensor.HasField("raw_data"):
        data = bytearray(tensor.raw_data)
        _check_size(name, tensor, len(data), dead.size * width)
        np.frombuffer(data, f"V{width}")[dead] = np.zeros((), f"V{width}")
        tensor.raw_data = bytes(data)
        return
    field: Any = next((getattr(tensor, typed) for typed in _TYPED_FIELDS if len(getattr(tensor, typed))), [])
    per_element = 2 if type_name.startswith("COMPLEX") else 1
    _check_size(name, tensor, len(field), dead.size * per_element)
    values = np.array(field).reshape(dead.size, per_element)
    values[dead] = 0
    field[:] = values.ravel().tolist()


def _check_size(name: str, tensor: onnx.TensorProto, actual: int, expected: int) -> None:
    if actual != expected:
        shape = list(tensor.dims)
        raise InputError(f"mask {name!r}: the weight of shape {shape} ({prod(shape)} elements) is stored incompletely")
