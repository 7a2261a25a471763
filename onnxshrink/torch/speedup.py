"""In the place of NNI's `ModelSpeedup`: a module and its masks become a smaller ONNX model, at once or step by step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import onnx
import torch
from torch import nn

from onnxshrink import parts
from onnxshrink.analyse import Analysis, analyse, begin, update_known, update_needed
from onnxshrink.errors import InputError
from onnxshrink.graph import Graph, Node
from onnxshrink.inferred import LazyMasks, WeightMasks, module_masks, tensor_masks
from onnxshrink.masks import MaskTree, load_masks
from onnxshrink.plan import make_plan
from onnxshrink.registry import Lookup
from onnxshrink.replacement import ReplaceFunction
from onnxshrink.result import ShrinkResult
from onnxshrink.shrink import Options, conclude, lookup_for
from onnxshrink.source import open_source
from onnxshrink.torch.dummy import DummyInput
from onnxshrink.torch.export import export_onnx, masked_copy
from onnxshrink.torch.keywords import further_keywords
from onnxshrink.torch.rebuild import Origin

PathLike = str | os.PathLike[str]
_SMALLEST_BATCH = 2


@dataclass(frozen=True)
class Further:
    """Options of `ModelSpeedup` that NNI does not have.

    Attributes:
        probe: look for constant outputs of operators without a rule, on `confidence` random samples each.
        align: how wide the layers become, as in `onnxshrink.shrink`; "none" removes all that can go.
        dynamo: which exporter of PyTorch to take; only the newer one tells the classes of modules.
        opset_version: of the exported model; None: the exporter's choice.
        seed: of random inputs.
    """

    probe: bool = False
    align: str | int = "none"
    dynamo: bool = True
    opset_version: int | None = None
    seed: int = 0


class ModelSpeedup:
    """Remove what masks leave without effect from a PyTorch module, exactly; the result is an ONNX model.

    `speedup_model()` does it all. Its steps can be called one by one, in this order: `initialize_speedup`,
    `infer_modules_masks` (or `update_direct_sparsity` and `update_indirect_sparsity` of each node), then
    `replace_compressed_modules`, or `replace_submodule` for some. The module itself is not touched.

    Args:
        model: the module. Pruning by `torch.nn.utils.prune` counts as well as the masks.
        dummy_input: a tensor, a tuple or list of arguments, or a dictionary of keyword arguments. The batch is a free
            dimension of the result.
        masks_file: a file of masks (`.pth`, `.pt`, `.npz`, `.safetensors`), or the masks: `{module: {"weight": mask,
            "bias": mask, "_input_NAME": mask, "_output_0": mask}}` in 0 and 1. Those of inputs and outputs multiply
            activations; NAME is a parameter of the module's `forward`, or its position. Also called `masks_or_file`.
        map_location: where tensors in a file are put while they are read, as in `torch.load`.
        batch_dim: the axis of the batch in the tensors of `dummy_input`.
        confidence: how many random samples the outputs are compared on, in one batch, and operators without a rule are
            run on where that is asked for. At least 2. Also called `batch_size`.
        customized_replace_func: functions that write nodes anew, by operator type (`Op`, `domain::Op`) or class of
            module: `function(node, (in_masks, out_mask, weight_masks))` returns an
            `onnxshrink.replacement.Replacement`, or new constants by name.

    Keywords besides these are those of `Further`: `probe`, `align`, `dynamo`, `opset_version`, `seed`.

    Attributes:
        model: the exported model, masks applied; None before `initialize_speedup`.
        inferred_masks: full-size 0/1 arrays by module, then by name: `_input_0`, `_output_0` and the module's own
            parameters, as far as the exporter left them whole.
        tensor_masks: full-size 0/1 arrays by tensor of the exported model.
        result: what was replaced last.

    Raises:
        InputError: the module cannot be exported, or an argument cannot be used. MaskError: a mask does not fit.
        OutputsDiffer: the result does not compute what the masked module does.
    """

    _further: Further

    @overload
    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_file: PathLike | MaskTree,
        map_location: Any = None,
        batch_dim: int = 0,
        confidence: int = 8,
        customized_replace_func: Mapping[str, ReplaceFunction] | None = None,
        **further: Any,
    ) -> None: ...

    @overload
    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        *,
        masks_or_file: PathLike | MaskTree,
        map_location: Any = None,
        batch_dim: int = 0,
        confidence: int = 8,
        customized_replace_func: Mapping[str, ReplaceFunction] | None = None,
        **further: Any,
    ) -> None: ...

    @further_keywords({"masks_or_file": "masks_file", "batch_size": "confidence"}, Further, "_further")
    def __init__(
        self,
        model: nn.Module,
        dummy_input: Any,
        masks_file: PathLike | MaskTree,
        map_location: Any = None,
        batch_dim: int = 0,
        confidence: int = 8,
        customized_replace_func: Mapping[str, ReplaceFunction] | None = None,
    ) -> None:
        if isinstance(confidence, bool) or not isinstance(confidence, int) or confidence < _SMALLEST_BATCH:
            raise InputError(f"confidence {confidence}: give a whole number of samples, at least {_SMALLEST_BATCH}")
        self.bound_model: nn.Module = model
        self.batch_dim: int = batch_dim
        self.confidence: int = confidence
        self.customized_replace_func: dict[str, ReplaceFunction] = dict(customized_replace_func or {})
        self.dummy_input = DummyInput(dummy_input, batch_dim, confidence)
        self.masks: MaskTree = _read(masks_file, map_location)
        self.model: onnx.ModelProto | None = None
        self.result: ShrinkResult | None = None
        self._parts: list[set[str]] = []

    # --- the steps --------------------------------------------------------------------------------------------------

    def initialize_speedup(self) -> None:
        """Export the module with its masks; nothing is known of the tensors yet."""
        further = self._further
        self.model = export_onnx(
            self.bound_model,
            self.dummy_input.args,
            self.masks,
            kwargs=self.dummy_input.kwargs,
            dynamo=further.dynamo,
            opset_version=further.opset_version,
            **self.dummy_input.free_batch(further.dynamo),
        )
        self._source = open_source(self.model, keep=tuple(self.customized_replace_func))
        self._begin(self._source.graph)
        self.result = None

    def _begin(self, graph: Graph) -> None:
        self._analysis = begin(graph, self._lookup())
        modules = [name for name, _ in self.bound_model.named_modules(remove_duplicate=False)]
        self._modules = parts.Parts(graph, modules)
        self._backward_done: set[int] = set()

    def _lookup(self) -> Lookup:
        probe = self.confidence if self._further.probe else 0
        return lookup_for(probe, self.customized_replace_func, self.confidence)

    def _initialized(self) -> Analysis:
        if self.model is None:
            self.initialize_speedup()
        return self._analysis

    def infer_modules_masks(self) -> None:
        """Work out the masks of all tensors, forward and backward, until nothing changes."""
        graph = self._initialized().graph
        self._analysis = analyse(graph, self._lookup())
        self._backward_done = {node.index for node in graph.nodes}

    def direct_order(self) -> Iterator[str]:
        """Names of the nodes, each after those that it reads."""
        yield from (node.label for node in self._initialized().graph.nodes)

    def indirect_order(self) -> Iterator[str]:
        """Names of the nodes, each before those that it reads."""
        yield from (node.label for node in reversed(self._initialized().graph.nodes))

    def update_direct_sparsity(self, node: str) -> None:
        """Work out again what is constant in the outputs of a node or module, from its inputs and weights."""
        for found in self._nodes(node):
            update_known(self._analysis, found)

    def update_indirect_sparsity(self, node: str) -> None:
        """Work out again what is without effect in the inputs of a node or module, from its outputs."""
        for found in reversed(self._nodes(node)):
            for reader in self._analysis.graph.nodes:
                if reader.index not in self._analysis.rules:
                    update_known(self._analysis, reader)
            update_needed(self._analysis, found)
            self._backward_done.add(found.index)

    def _nodes(self, name: str) -> list[Node]:
        self._initialized()
        return self._modules.nodes(name)

    # --- what was inferred ------------------------------------------------------------------------------------------

    @property
    def tensor_masks(self) -> LazyMasks:
        """1 where an element can influence an output and is not constant, per tensor; a free dimension has extent 1."""
        return tensor_masks(self._inferred())

    @property
    def inferred_masks(self) -> dict[str, LazyMasks]:
        """The masks of every module: of the tensors that enter and leave it, and of its own parameters."""
        analysis = self._inferred()
        weights = WeightMasks(analysis, make_plan(analysis))
        return module_masks(self._modules, analysis, weights, self._parameters())

    def _inferred(self) -> Analysis:
        """The facts, all of them: what was not worked out step by step is now."""
        self._initialized()
        if len(self._backward_done) < len(self._analysis.graph.nodes):
            self.infer_modules_masks()
        return self._analysis

    def _parameters(self) -> dict[str, tuple[str, bool]]:
        """The stored weight of each parameter, and whether it is stored transposed."""
        constants = self._analysis.graph.constants
        found: dict[str, tuple[str, bool]] = {}
        for name, parameter in masked_copy(self.bound_model, self.masks).named_parameters(remove_duplicate=False):
            if name in constants and constants[name].shape == tuple(parameter.shape):
                found[name] = name, False
                continue
            values = parameter.detach().cpu().double().numpy()
            for node in self._modules.nodes(name.rpartition(".")[0]):
                for read in node.inputs:
                    if read in constants and values.ndim > 1 and np.array_equal(constants[read].array(), values.T):
                        found[name] = read, True
        return found

    # --- replacing --------------------------------------------------------------------------------------------------

    def replace_compressed_modules(self) -> ShrinkResult:
        """Make every weight smaller that can be, and compare the outputs with those of the masked module."""
        self.result = self._conclude(self._inferred())
        if not self._parts:
            further = self._further
            options = {"dynamo": further.dynamo, "opset_version": further.opset_version}
            options |= self.dummy_input.free_batch(further.dynamo)
            self.result.origin = Origin(self.dummy_input.args, self.dummy_input.kwargs, self.masks, options)
        return self.result

    def replace_submodule(self, unique_name: str, reindex_dim: int | None = None, reindex: Any = None) -> ShrinkResult:
        """Make one module smaller, besides those for which that was done already, and compare the outputs.

        Without `reindex`, what reads or makes the same channels follows: a model whose parts do not fit is never made.
        With it, the rest of the model stays as it is: the output keeps the channels that `reindex` names, and is put
        back in these places along axis `reindex_dim`, among zeros (or the constants that the others hold).

        Args:
            unique_name: of a module, or of a node of the exported model.
            reindex_dim: axis of the output.
            reindex: a mask of that axis, or positions in it; all live ones must be among them.

        Returns:
            the model as far as it is replaced now.

        Raises:
            InputError: there is no such part, or `reindex` does not fit it.
        """
        analysis = self._inferred()
        if (reindex_dim is None) != (reindex is None):
            raise InputError("reindex_dim and reindex go together; give both or neither")
        nodes = self._modules.nodes(unique_name)
        if reindex_dim is None:
            self._parts.append(parts.hanging_together(analysis, make_plan(analysis), nodes))
        else:
            self._reindex(unique_name, reindex_dim, reindex)
        inside = set().union(*self._parts)
        self.result = self._conclude(parts.only(self._inferred(), inside))
        return self.result

    def _reindex(self, name: str, axis: int, reindex: Any) -> None:
        analysis, outputs = self._analysis, self._modules.outputs(name)
        if len(outputs) != 1:
            raise InputError(f"{name!r} gives {len(outputs)} tensors; only one can be put back with reindex")
        (output,) = outputs
        wanted = np.asarray(reindex.detach().cpu() if isinstance(reindex, torch.Tensor) else reindex)
        mask = parts.positions_of(analysis, output, axis, wanted, f"the output of {name!r}")
        made = {n for node in self._modules.nodes(name) for n in node.outputs if n and n != output}
        changed = parts.put_back(analysis.graph.proto, analysis, output, axis, mask)
        self._parts.append({*made, f"{output}_whole", f"{output}_padded"})
        self._begin(Graph(changed, tuple(self.customized_replace_func)))

    def _conclude(self, analysis: Analysis) -> ShrinkResult:
        assert self.model is not None
        feed = self.dummy_input.feed(self.model, self._further.seed)
        options = Options(inputs=feed, seed=self._further.seed, align=self._further.align)
        return conclude(self._source, analysis, options)

    def speedup_model(self, output: PathLike | None = None) -> ShrinkResult:
        """All steps: export, infer, replace, compare; and write the result to `output`, if that is given."""
        self.initialize_speedup()
        self.infer_modules_masks()
        result = self.replace_compressed_modules()
        if output is not None:
            result.save(output)
        return result


def _read(masks: Any, map_location: Any) -> MaskTree:
    if isinstance(masks, (str, os.PathLike)):
        return load_masks(Path(masks), map_location)
    if not isinstance(masks, Mapping):
        raise InputError(f"masks_file is a {type(masks).__name__}; give a file, or masks by module")
    return masks
