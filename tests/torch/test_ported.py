"""What NNI tests its ModelSpeedup on, ported: the same kinds of networks, masks and activations, with exact results.

NNI allows sums of outputs to differ by a hundredth, and sets norms' shifts to zero. Here each output is compared, with
norms as after training.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import onnxruntime
import torch
from architectures import classic, light
from pruning import Masks, l1_channel_masks, l1_masks, live, unsettle
from torch import Tensor, nn
from torch.nn import functional

from onnxshrink import ShrinkResult
from onnxshrink.torch import ModelSpeedup, masked_copy

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# Sums in another order, in float32: relative to the range of the output.
TOLERANCE = 1e-5


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return unsettle(build())


def speed_up(module: nn.Module, example: Any, masks: Any, **options: Any) -> ShrinkResult:
    """The result, compared with the masked module on a batch of another size than the example's."""
    result = ModelSpeedup(module, example, masks, **{"dynamo": False, **options}).speedup_model()
    assert result.report.equivalence is not None
    image = torch.randn(3, *example.shape[1:], generator=torch.Generator().manual_seed(9))
    session = onnxruntime.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (name,) = [value.name for value in session.get_inputs()]
    outputs = session.run(None, {name: image.numpy()})
    with torch.no_grad():
        wanted = masked_copy(module, masks)(image)
    for found, expected in zip(outputs, [wanted] if isinstance(wanted, Tensor) else wanted, strict=True):
        scale = float(expected.abs().max())
        np.testing.assert_allclose(found / scale, expected.numpy() / scale, rtol=0, atol=TOLERANCE)
    return result


# --- networks --------------------------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "alexnet": light.Alexnet,
    "densenet": classic.Densenet,
    "efficientnet": light.Efficientnet,
    "inception": classic.Inception,
    "mnasnet": light.Mnasnet,
    "mobilenet": classic.Mobilenet,
    "resnet": classic.Resnet50,
    "resnext": classic.Resnext,
    "squeezenet": light.Squeezenet,
    "vgg": classic.Vgg,
}
# Parameters before and after, with half of every convolution's rows masked.
LEFT = {
    "alexnet": (9_173, 3_185),
    "densenet": (3_851, 1_254),
    "efficientnet": (4_117, 2_463),
    "inception": (4_065, 1_608),
    "mnasnet": (3_333, 1_338),
    "mobilenet": (3_279, 1_614),
    "resnet": (7_269, 2_953),
    "resnext": (4_461, 3_000),
    "squeezenet": (2_787, 1_038),
    "vgg": (7_273, 3_173),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_half_of_every_convolution(name: str) -> None:
    module = made(NETWORKS[name])
    result = speed_up(module, IMAGE, l1_masks(module, 0.5))
    assert (result.report.before.parameters, result.report.after.parameters) == LEFT[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layer_at_its_own_rate_and_some_not_at_all(name: str) -> None:
    """Rates that agree with nothing: layers of one residual stream lose different channels."""
    module, generator = made(NETWORKS[name], seed=1), random.Random(5)
    low, high = (0.01, 0.3) if name in ("mobilenet", "mnasnet", "efficientnet") else (0.5, 0.99)
    masks = l1_masks(module, lambda _: generator.uniform(low, high) if generator.random() > 0.5 else 0.0)
    report = speed_up(module, IMAGE, masks).report
    assert report.after.parameters <= report.before.parameters


# --- single cases ----------------------------------------------------------------------------------------------------


class Backbone(nn.Module):
    """Convolutions, BatchNorm, max pooling, linear layers on the flattened maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.bn1, self.bn2 = nn.BatchNorm2d(20), nn.BatchNorm2d(50)
        self.fc1, self.fc2 = nn.Linear(4 * 4 * 50, 60), nn.Linear(60, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.bn1(self.conv1(x))), 2, 2)
        x = functional.max_pool2d(functional.relu(self.bn2(self.conv2(x))), 2, 2)
        return self.fc2(functional.relu(self.fc1(x.reshape(x.size(0), -1))))


class Big(nn.Module):
    """One in front of it and a sequence behind."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone1, self.backbone2 = nn.Sequential(nn.Conv2d(1, 1, 1)), Backbone()
        self.fc3 = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.ReLU(inplace=True), nn.Linear(10, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.backbone2(self.backbone1(x)))


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_a_big_model_from_a_file_of_masks(dynamo: bool, tmp_path: Path) -> None:
    module, path = made(Big).train(), tmp_path / "l1_mask.pth"
    torch.save(l1_masks(module, 0.5), path)
    masks = torch.load(path, weights_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        example = torch.randn(2, 1, 28, 28)
    result = ModelSpeedup(module, example, str(path), "cpu", dynamo=dynamo).speedup_model()
    assert speed_up(module, example, masks, dynamo=dynamo).report.after == result.report.after
    assert module.training
    shapes = sorted(layer.after for layer in result.report.layers)
    # Half of what goes in and of what comes out; behind the second BatchNorm a bias takes the constants.
    assert shapes == [(10, 1, 5, 5), (25, 10, 5, 5), (60, 25 * 16)]


class Transposed(nn.Module):
    """A transposed convolution with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 20, 5), nn.ConvTranspose2d(20, 50, 5, groups=2)
        self.bn1, self.bn2 = nn.BatchNorm2d(20), nn.BatchNorm2d(50)
        self.fc1, self.fc2 = nn.Linear(8 * 8 * 50, 30), nn.Linear(30, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        return self.fc2(functional.relu(self.fc1(x.view(x.size(0), -1))))


def test_a_transposed_convolution_with_groups() -> None:
    module = made(Transposed)
    result = speed_up(module, torch.rand(2, 3, 8, 8), l1_masks(module, 0.5))
    (reader,) = [layer for layer in result.report.layers if layer.op == "ConvTranspose"]
    assert reader.before == (20, 25, 5, 5)
    assert reader.after[0] < 20


@pytest.mark.parametrize(("name", "left"), [("resnet", 3_228), ("vgg", 3_205)])
def test_input_channels(name: str, left: int) -> None:
    module = made(NETWORKS[name])
    masks = l1_channel_masks(module, 0.5, leave=("0.0", "layers.0"))
    report = speed_up(module, IMAGE, masks).report
    # What no layer reads is not made. In a chain that halves every layer; of a residual stream much is read somewhere.
    assert report.after.parameters == left


class Features(nn.Module):
    """Hands on three maps."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([classic.conv(3, 8, 3, 2), classic.conv(8, 12, 3, 2), classic.conv(12, 16, 3, 2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for part in self.parts:
            x = part(x)
            maps.append(x)
        return maps


class Pyramid(nn.Module):
    """Takes them as one list."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Features()
        self.laterals = nn.ModuleList([nn.Conv2d(width, 6, 1, bias=False) for width in (8, 12, 16)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [lateral(part) for lateral, part in zip(self.laterals, self.backbone(x), strict=True)]


def test_lists_of_tensors_between_modules() -> None:
    module = made(Pyramid)
    masks = l1_masks(module, 0.5)
    report = speed_up(module, IMAGE, masks).report
    rows = {layer.weight: layer.after for layer in report.layers}
    assert {live(masks, f"backbone.parts.{i}.0") for i in range(3)} == {4, 6, 8}
    # The outputs of the model stay as wide as they are; of what goes in, half.
    assert rows["laterals.2.weight"] == (6, 8, 1, 1)


class Perceptron(nn.Module):
    """Four linear layers and nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.fc4 = (
            nn.Linear(64, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 32),
            nn.Linear(32, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc4(self.fc3(self.fc2(self.fc1(x.view(-1, 64)))))


def test_fine_grained_sparsity() -> None:
    """Single weights, the largest hundredth: rows and columns that are left empty go."""
    module = made(Perceptron)
    masks: Masks = {}
    for name, part in module.named_children():
        assert isinstance(part, nn.Linear)
        threshold = part.weight.detach().abs().flatten().kthvalue(int(part.weight.numel() * 0.99)).values
        masks[name] = {"weight": (part.weight.detach().abs() > threshold).float(), "bias": None}
    report = speed_up(module, torch.rand(4, 1, 8, 8), masks).report
    assert report.after.parameters < 0.2 * report.before.parameters


class Gated(nn.Module):
    """A map multiplied by what is made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.avgpool, self.activation, self.scale = nn.AdaptiveAvgPool2d(1), nn.ReLU(), nn.Hardsigmoid()
        self.input, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc1, self.fc2, self.out = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.bn(self.input(x)))
        gate = self.scale(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return self.out(gate * x)


def test_multiplication() -> None:
    module = made(Gated)
    report = speed_up(module, IMAGE, l1_masks(module, 0.3)).report
    rows = {layer.weight: layer.after for layer in report.layers}
    assert rows["fc1.weight"][0] == rows["fc2.weight"][1] == 12
    assert report.after.parameters < report.before.parameters


# --- softmax, and masks of inputs and outputs ------------------------------------------------------------------------


class Softened(nn.Module):
    """A softmax over channels between convolutions, as a module or as a function, and another over classes."""

    def __init__(self, as_module: bool) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 10, 1), nn.Conv2d(10, 6, 1)
        self.softmax = nn.Softmax(dim=1) if as_module else None
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        x = self.softmax(x) if self.softmax is not None else functional.softmax(x, dim=1)
        return functional.softmax(self.head(self.third(x).mean((2, 3))), dim=-1)


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "function"])
def test_softmax_keeps_every_channel_that_it_mixes(as_module: bool) -> None:
    module = made(lambda: Softened(as_module))
    report = speed_up(module, IMAGE, l1_masks(module, 0.5)).report
    rows = {layer.weight: layer.after for layer in report.layers}
    # A score of nothing is a share of something: all ten scores stay, whatever their weights.
    assert rows == {
        "first.weight": (4, 3, 3, 3),
        "second.weight": (10, 4, 1, 1),
        "third.weight": (3, 10, 1, 1),
        "head.weight": (4, 3),
    }


def test_masks_of_inputs_and_outputs() -> None:
    module = made(lambda: Softened(True))
    masks = {
        "first": {"_output_0": (torch.arange(8) % 2).reshape(1, 8, 1, 1).float()},
        "third": {"_input_input": (torch.arange(10) > 6).reshape(1, 10, 1, 1).float(), "_output_0": dead_output(6, 1)},
        "head": {"_input_0": (torch.arange(6) != 3).float(), "weight": None},
    }
    report = speed_up(module, IMAGE, masks).report
    rows = {layer.weight: layer.after for layer in report.layers}
    assert rows == {
        "first.weight": (4, 3, 3, 3),
        "second.weight": (10, 4, 1, 1),
        "third.weight": (4, 10, 1, 1),
        "head.weight": (4, 4),
    }


def dead_output(extent: int, *indices: int) -> Tensor:
    mask = torch.ones(1, extent, 1, 1)
    mask[:, list(indices)] = 0
    return mask
