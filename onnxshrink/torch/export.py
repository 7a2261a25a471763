"""From a PyTorch module and its masks to an ONNX model, leaving the module as it was."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import nn
from torch.nn.utils import prune

from onnxshrink.errors import InputError, MaskError
from onnxshrink.mask_arrays import kept_elements, near_names
from onnxshrink.mask_names import fitted, select_masks, spellings
from onnxshrink.masks import MaskTree, flatten_masks
from onnxshrink.torch.activations import is_activation_mask, mask_activations

if TYPE_CHECKING:
    import os

    from onnxshrink import ShrinkResult

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, *_TRANSPOSED)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
_ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


# --- the masked module ---------------------------------------------------------------------------------------------


def masked_copy(module: nn.Module, masks: MaskTree | None = None) -> nn.Module:
    """Deep-copy a module, with its masks written into the parameters as zeros, in evaluation mode.

    `masks` is `{module name: {"weight": mask, "bias": mask}}` or `{"module.weight": mask}`, in 0 and 1. Those named
    `_input_NAME` and `_output_0` are for activations: the copy multiplies them (`activations.mask_activations`).
    Pruning by `torch.nn.utils.prune` becomes permanent in the copy. A parameter that several modules share is masked
    once, under whichever of its names the mask comes. The given module keeps its parameters, buffers, hooks and
    training flag.

    Raises MaskError for an unknown module, parameter or input, another shape, values other than 0 and 1, and two
    different masks for one shared parameter; InputError for a module that cannot be copied.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"expected a torch.nn.Module, not a {type(module).__name__}")
    duplicate = _deep_copy(module)
    _make_pruning_permanent(duplicate)
    flat = flatten_masks(masks or {})
    activations = {name: mask for name, mask in flat.items() if is_activation_mask(name)}
    _mask_parameters(duplicate, select_masks({n: m for n, m in flat.items() if n not in activations}))
    mask_activations(duplicate, activations)
    return duplicate.eval()


def _deep_copy(module: nn.Module) -> nn.Module:
    """copy.deepcopy, also for modules that keep computed tensors, such as the `weight` of a pruned module.

    PyTorch refuses to copy tensors with a history; here they are put in the memo beforehand, copied without it.
    """
    memo = {id(tensor): tensor.detach().clone() for tensor in _computed_tensors(module)}
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # whatever the attributes of the caller's classes raise
        raise InputError(f"cannot copy the module {type(module).__name__}: {_reason(error)}") from error


def _computed_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for part in module.modules():
        for value in (*vars(part).values(), *part.buffers(recurse=False)):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                yield value


def _make_pruning_permanent(module: nn.Module) -> None:
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod):
                _remove_pruning(part, key, hook)


def _remove_pruning(part: nn.Module, key: int, hook: prune.BasePruningMethod) -> None:
    """What prune.remove does, but with a new parameter: another module that shares the original keeps its values."""
    name = hook._tensor_name
    original, mask = getattr(part, f"{name}_orig"), getattr(part, f"{name}_mask")
    with torch.no_grad():
        value = (mask.to(original.dtype) * original).masked_fill(mask == 0, 0)
    del part._forward_pre_hooks[key], part._parameters[f"{name}_orig"], part._buffers[f"{name}_mask"]
    if name in vars(part):
        delattr(part, name)
    setattr(part, name, nn.Parameter(value, requires_grad=original.requires_grad))


def _mask_parameters(module: nn.Module, masks: Mapping[str, np.ndarray]) -> None:
    parts = dict(module.named_modules(remove_duplicate=False))
    applied: dict[int, tuple[str, np.ndarray]] = {}
    for name, mask in masks.items():
        owner, parameter, in_blocks = _parameter(parts, name)
        shape = tuple(parameter.shape)
        arranged = fitted(_of_channels(owner, name, mask, shape), shape, in_blocks)
        kept = kept_elements(name, arranged, shape)
        first, before = applied.setdefault(id(parameter), (name, kept))
        if not np.array_equal(before, kept):
            raise MaskError(f"masks {first!r} and {name!r} differ, but they are for one shared parameter")
        if first == name:
            with torch.no_grad():
                parameter.masked_fill_(torch.from_numpy(~kept).to(parameter.device), 0)


def _of_channels(owner: nn.Module, name: str, mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of output channels, one number each, in the shape of the weight; any other as it is."""
    if mask.ndim != 1 or len(shape) < 2 or not isinstance(owner, _LAYERS):
        return mask
    if isinstance(owner, nn.Embedding):
        return np.broadcast_to(mask, shape) if mask.size == shape[1] else mask
    if isinstance(owner, _TRANSPOSED):
        groups, outputs = owner.groups, shape[1]
        if mask.size != groups * outputs:
            return mask
        rows = mask.reshape(groups, outputs).repeat(shape[0] // groups, axis=0)
        return np.broadcast_to(rows.reshape(*rows.shape, *[1] * (len(shape) - 2)), shape)
    rows = mask.reshape(-1, *[1] * (len(shape) - 1))
    return np.broadcast_to(rows, shape) if mask.size == shape[0] else mask


def _parameter(parts: Mapping[str, nn.Module], name: str) -> tuple[nn.Module, nn.Parameter, bool]:
    """The module and the parameter that a mask is for, and whether it may be in blocks: the name is the module's."""
    for wish, of_module in spellings(name):
        path, _, leaf = wish.rpartition(".")
        if path in parts:
            parameter = dict(parts[path].named_parameters(recurse=False)).get(leaf)
            if parameter is not None:
                return parts[path], parameter, of_module
    owner, _, leaf = name.rpartition(".")
    if owner not in parts:
        raise MaskError(f"mask {name!r}: there is no module {owner!r}{near_names(owner, parts)}")
    parameters = [parameter for parameter, _ in parts[""].named_parameters(remove_duplicate=False)]
    raise MaskError(f"mask {name!r}: the module has no parameter {leaf!r}{near_names(name, parameters)}")


# --- the ONNX model ------------------------------------------------------------------------------------------------


def export_onnx(
    module: nn.Module,
    args: Any,
    masks: MaskTree | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamo: bool = True,
    dynamic_shapes: Any = None,
    dynamic_axes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
) -> onnx.ModelProto:
    """Export a module with its masks applied, by `torch.onnx.export`; the module itself is untouched.

    `args` is the example input: a tensor, or a tuple or list of arguments; `kwargs` are more of them by name (not
    keyword-only ones with `dynamo=False`: that exporter passes all by position). `masks` as in `masked_copy`. The other
    options go to `torch.onnx.export` unchanged: free dimensions are `dynamic_shapes` (with `dynamo=True`) or
    `dynamic_axes`. What the exporter prints, logs and warns is dropped, except for the tracer's warning that a value
    became a constant.

    Raises MaskError as `masked_copy` does, and InputError with the exporter's reason when the export fails or does not
    reach `opset_version`.
    """
    options = {
        "kwargs": dict(kwargs) if kwargs else None,
        "dynamic_shapes": dynamic_shapes,
        "dynamic_axes": dynamic_axes,
        "input_names": input_names,
        "output_names": output_names,
        "opset_version": opset_version,
    }
    model = _run_exporter(masked_copy(module, masks), args, options, dynamo)
    _check_opset(model, opset_version)
    return model


def export_plain(masked: nn.Module, args: Any, options: Mapping[str, Any]) -> onnx.ModelProto:
    """Export a module as it is, without optimisations: every weight is one of its parameters, by its name.

    `options` are those of `export_onnx`. Raises InputError when the export fails.
    """
    rest = {name: value for name, value in options.items() if name != "dynamo" and value}
    if options.get("dynamo", True):
        return _without_sequences(_run_exporter(masked, args, {**rest, "optimize": False}, True, told=True))
    plain = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    return _without_sequences(_run_exporter(masked, args, {**rest, **plain}, False, told=True))


def _without_sequences(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with arithmetic on shapes carried out, and sequences resolved; no weight is touched."""
    from onnxscript import optimizer

    weights = [tensor for tensor in model.graph.initializer if tensor.data_type in _FLOATS]
    rest = [tensor for tensor in model.graph.initializer if tensor.data_type not in _FLOATS]
    del model.graph.initializer[:]
    model.graph.initializer.extend(rest)
    # As inputs, weights are nothing that could be folded.
    own = len(model.graph.input)
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in weights
    )
    model = optimizer.optimize(model)
    del model.graph.input[own:]
    model.graph.initializer.extend(weights)
    return model


def _run_exporter(
    module: nn.Module, args: Any, options: Mapping[str, Any], dynamo: bool, told: bool = False
) -> onnx.ModelProto:
    """Run an exporter; `told`: the user knows its warnings already."""
    run = _export_dynamo if dynamo else _export_traced
    try:
        with _quiet("ignore" if told else "default"):
            return run(module, _as_tuple(args), options)
    except Exception as error:  # exporters raise whatever the module's code leads them to
        own = next((cause for cause in _causes(error) if isinstance(cause, MaskError)), None)
        if own is not None:
            raise own from error
        raise InputError(f"torch.onnx.export cannot export {type(module).__name__}: {_reason(error)}") from error


def export(
    module: nn.Module,
    args: Any,
    masks: MaskTree | None = None,
    output: str | os.PathLike[str] | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamo: bool = True,
    dynamic_shapes: Any = None,
    dynamic_axes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset_version: int | None = None,
    **shrink_options: Any,
) -> ShrinkResult:
    """Export a module with its masks applied, and shrink the model: `export_onnx`, then `onnxshrink.shrink`.

    `output` is the file to write, if any; `shrink_options` go to `onnxshrink.shrink`.

    Raises what these two raise.
    """
    from onnxshrink import shrink
    from onnxshrink.torch.rebuild import Origin

    options = {
        "dynamo": dynamo,
        "dynamic_shapes": dynamic_shapes,
        "dynamic_axes": dynamic_axes,
        "input_names": input_names,
        "output_names": output_names,
        "opset_version": opset_version,
    }
    model = export_onnx(module, args, masks, kwargs=kwargs, **options)
    result = shrink(model, output=output, **shrink_options)
    result.origin = Origin(_as_tuple(args), dict(kwargs or {}), masks, options)
    return result


def _as_tuple(args: Any) -> tuple[Any, ...]:
    return tuple(args) if isinstance(args, (tuple, list)) else (args,)


def _export_dynamo(module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> onnx.ModelProto:
    program = torch.onnx.export(module, args, dynamo=True, verbose=False, **options)
    model: onnx.ModelProto = program.model_proto
    return model


def _export_traced(module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> onnx.ModelProto:
    # Through a file, because beyond 2 GB this exporter writes the weights beside the model.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(module, args, str(path), dynamo=False, verbose=False, **options)
        return onnx.load(path)


def _check_opset(model: onnx.ModelProto, wanted: int | None) -> None:
    actual = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if wanted is not None and actual is not None and actual != wanted:
        raise InputError(f"torch.onnx.export gave opset {actual}, not {wanted}; ask for {actual}, or use dynamo=False")


@contextlib.contextmanager
def _quiet(tracer: Literal["ignore", "default"] = "default") -> Iterator[None]:
    """Drop what the exporters print, log and warn; what goes wrong comes as an exception."""
    disabled = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        warnings.simplefilter(tracer, torch.jit.TracerWarning)  # a value became a constant: the user must know
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def _reason(error: BaseException) -> str:
    """One line: the first one of the deepest cause, without terminal colours."""
    *_, deepest = _causes(error)
    lines = _ANSI_COLOUR.sub("", str(deepest)).strip().splitlines()
    return lines[0].strip() if lines else type(deepest).__name__


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, the deepest last."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__
