"""PyTorch modules, pruned and exported by either exporter, end as small as a person would have built them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import onnxruntime
import torch
from torch import nn
from torch.nn.utils import prune

import onnxshrink
from onnxshrink.measure import parameters

# Every weight of magnitude about 1 and sums of at most 220 products, in float32.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}

# Dead channels. STREAM is one channel of each of the four groups that `grouped` reads; GROUPED two of each it writes.
STREAM = [0, 5, 10, 15]
INNER = [1, 2, 3, 5, 8, 13, 19, 21, 22, 23]
GROUPED = [1, 2, 5, 6, 9, 10, 13, 14]
SIDE = [0, 3, 7]


class Network(nn.Module):
    """A residual block, BatchNorm, a grouped convolution and a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.inner_norm = nn.BatchNorm2d(24)
        self.outer = nn.Conv2d(24, 16, 3, padding=1, bias=False)
        self.outer_norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.side = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        branch = torch.relu(self.inner_norm(self.inner(x)))
        x = torch.relu(x + self.outer_norm(self.outer(branch)))
        x = torch.cat([torch.relu(self.grouped(x)), torch.sigmoid(self.side(x))], 1)
        return self.head(x.mean((2, 3)))


# 3*12*9 stem, 12*14*9 inner, 14*12*9 outer, 8*3*9 + 8 grouped, 5*12 + 5 side, 10*(8 + 5) + 10 head
WEIGHTS = 324 + 1512 + 1512 + 224 + 65 + 140
NORMED = 12 + 14 + 12  # channels behind a BatchNorm: a bias each where the exporter folds it, else four numbers each


def expected(model: onnx.ModelProto) -> int:
    folded = all(node.op_type != "BatchNormalization" for node in model.graph.node)
    return WEIGHTS + NORMED * (1 if folded else 4)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(3)
    module = Network().eval()
    for norm in (module.stem_norm, module.inner_norm, module.outer_norm):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, 0, 0.3)
        norm.running_mean.normal_(0, 0.3)
        norm.running_var.uniform_(0.5, 1.5)
    return module


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(1))


def row_mask(weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
    mask = torch.ones_like(weight)
    mask[rows] = 0
    return mask.detach()


def layers(module: Network) -> list[tuple[str, list[int]]]:
    """What is pruned, silent: with the shift of a BatchNorm, or the bias."""
    inner = [("inner", INNER), ("inner_norm", INNER)]
    stream = [(name, STREAM) for name in ("stem", "stem_norm", "outer", "outer_norm")]
    return [*inner, *stream, ("grouped", GROUPED), ("side", SIDE)]


def masks(module: Network) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {kind: row_mask(value, rows) for kind, value in module.get_submodule(name).named_parameters()}
        for name, rows in layers(module)
    }


def pruned(module: Network) -> Network:
    """The same, by PyTorch's own pruning, which is left in place."""
    for name, rows in layers(module):
        part = module.get_submodule(name)
        for kind, value in list(part.named_parameters()):
            prune.custom_from_mask(part, kind, row_mask(value, rows))
    return module


def free_batch(dynamo: bool) -> dict[str, Any]:
    if dynamo:
        return {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    return {"dynamic_axes": {"image": {0: "batch"}}}


def run(model: onnx.ModelProto, image: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": image.numpy()})[0])


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
class TestExport:
    def test_masks(self, network: Network, image: torch.Tensor, dynamo: bool) -> None:
        before = copy.deepcopy(network.state_dict())
        result = onnxshrink.export(network, image, masks(network), dynamo=dynamo, input_names=["image"])
        assert parameters(result.model) == expected(result.model)
        assert result.report.after.parameters == expected(result.model)
        assert result.report.equivalence.error < 1e-6
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    def test_masks_do_what_pytorch_pruning_does(self, network: Network, image: torch.Tensor, dynamo: bool) -> None:
        named = onnxshrink.export(network, image, masks(network), dynamo=dynamo, input_names=["image"]).model
        module = pruned(copy.deepcopy(network))
        result = onnxshrink.export(module, image, dynamo=dynamo, input_names=["image"])
        assert parameters(result.model) == expected(result.model)
        with torch.no_grad():
            wanted = module(image).numpy()
        np.testing.assert_allclose(run(result.model, image), wanted, **TOLERANCE)
        np.testing.assert_allclose(run(named, image), wanted, **TOLERANCE)
        assert prune.is_pruned(module)

    def test_free_batch(self, network: Network, image: torch.Tensor, dynamo: bool, tmp_path: Path) -> None:
        path = tmp_path / "small.onnx"
        options = {"dynamo": dynamo, "input_names": ["image"], "align": "none", **free_batch(dynamo)}
        result = onnxshrink.export(network, image, masks(network), path, **options)
        assert onnx.load(path) == result.model
        assert parameters(result.model) == expected(result.model)
        assert result.model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
        module = pruned(copy.deepcopy(network))
        for count in (1, 5):
            batch = torch.randn(count, 3, 8, 6, generator=torch.Generator().manual_seed(count))
            with torch.no_grad():
                np.testing.assert_allclose(run(result.model, batch), module(batch).numpy(), **TOLERANCE)

    def test_constants_under_padding(self, network: Network, image: torch.Tensor, dynamo: bool) -> None:
        """With its shift, a dead inner channel is a constant; the convolution that reads it pads with zeros."""
        part = {"inner": {"weight": row_mask(network.inner.weight, INNER)}}
        result = onnxshrink.export(network, image, part, dynamo=dynamo, input_names=["image"])
        # Constants from 10 inner channels become one; whether that is one of them or a channel of ones is the same
        # for `outer`, and `inner` with its norm keeps one channel more if it is one of them.
        shapes = {tuple(t.dims) for t in result.model.graph.initializer}
        assert (16, 15, 3, 3) in shapes
        assert {(14, 16, 3, 3), (15, 16, 3, 3)} & shapes
        module = copy.deepcopy(network)
        with torch.no_grad():
            module.inner.weight[INNER] = 0
            np.testing.assert_allclose(run(result.model, image), module(image).numpy(), **TOLERANCE)

    def test_nothing_pruned(self, network: Network, image: torch.Tensor, dynamo: bool) -> None:
        result = onnxshrink.export(network, image, dynamo=dynamo, input_names=["image"])
        assert result.report.after == result.report.before
        assert result.report.equivalence is None

    def test_shrink_options_are_handed_on(self, network: Network, image: torch.Tensor, dynamo: bool) -> None:
        result = onnxshrink.export(network, image, masks(network), dynamo=dynamo, verify=False)
        assert result.report.equivalence is None
        assert result.report.after.parameters < result.report.before.parameters


def test_a_wrong_mask_writes_nothing(network: Network, image: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(onnxshrink.MaskError, match=r"stm"):
        onnxshrink.export(network, image, {"stm": {"weight": torch.ones(1)}}, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
