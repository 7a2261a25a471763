"""From a pruned module to a smaller one and on: five families, each compared, trained, saved and loaded."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import onnxruntime
import torch
from torch import nn
from torch.nn.utils import prune

import onnxshrink
from onnxshrink import ShrinkResult
from onnxshrink.errors import InputError
from onnxshrink.torch import ModelSpeedup, masked_copy

# Sums of fewer products, in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Residual(nn.Module):
    """Two residual blocks, the second with a strided convolution beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.norm1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.outer, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.down, self.side = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.Conv2d(16, 24, 1, stride=2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.outer(torch.relu(self.norm1(self.inner(x))))))
        return self.head(torch.relu(self.down(x) + self.side(x)).mean((2, 3)))


class Separable(nn.Module):
    """A grouped convolution, a group norm, and a depthwise convolution between two pointwise ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.grouped, self.norm = nn.Conv2d(12, 16, 3, padding=1, groups=4), nn.GroupNorm(4, 16)
        self.wide, self.norm1 = nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.depth, self.norm2 = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False), nn.BatchNorm2d(24)
        self.thin, self.head = nn.Conv2d(24, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.relu(self.grouped(torch.relu(self.stem(x)))))
        y = nn.functional.relu6(self.norm1(self.wide(x)))
        x = x + self.thin(nn.functional.hardswish(self.norm2(self.depth(y))))
        return self.head(x.mean((2, 3)))


class Encoder(nn.Module):
    """An embedding, positions, and PyTorch's own transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(19, 16), nn.Parameter(torch.randn(1, 12, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(self.words(x) + self.places[:, : x.shape[1]]).mean(1))


class Tagger(nn.Module):
    """A bidirectional LSTM of two layers behind a projection whose dead rows are constants."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.project = nn.Embedding(19, 6), nn.Linear(6, 10)
        self.lstm = nn.LSTM(10, 12, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(torch.sigmoid(self.project(self.words(x))))[0])


class Unet(nn.Module):
    """Down twice, up twice by transposed convolutions, with skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1), nn.InstanceNorm2d(12), nn.ReLU())
        self.third = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(12, 16, 3, padding=1), nn.ReLU())
        self.up1, self.join1 = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.Conv2d(24, 12, 3, padding=1)
        self.up2, self.join2 = nn.ConvTranspose2d(12, 8, 2, stride=2), nn.Conv2d(16, 8, 3, padding=1)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        second = self.second(first)
        y = self.up1(self.third(second))
        y = torch.relu(self.join1(torch.cat([y, second], 1)))
        y = torch.relu(self.join2(torch.cat([self.up2(y), first], 1)))
        return self.out(y)


def drop(layer: nn.Module, *rows: int, bias: bool = True) -> None:
    """Prune rows of a layer; without `bias` they leave a constant behind."""
    weight = layer.weight
    mask = torch.ones(weight.shape)
    (mask.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else mask)[list(rows)] = 0
    prune.custom_from_mask(layer, "weight", mask)
    if bias and getattr(layer, "bias", None) is not None:
        kept = torch.ones(layer.bias.shape)
        kept[list(rows)] = 0
        prune.custom_from_mask(layer, "bias", kept)


def pruned_residual(module: Residual) -> None:
    drop(module.stem, 0, 5, 9)
    drop(module.outer, 0, 5, 9, 12)
    for norm in (module.norm, module.norm2):
        with torch.no_grad():
            norm.bias[[0, 5, 9]] = norm.running_mean[[0, 5, 9]] = 0
    drop(module.inner, *range(4, 10))  # constants behind the norm, which the padding cuts off at the border
    drop(module.down, 1, 2, 3)
    drop(module.side, 1, 2, 7)


def pruned_separable(module: Separable) -> None:
    drop(module.stem, 0, 1, 2, 7)  # one group of the grouped convolution, and a channel of another
    drop(module.grouped, 0, 1, 2, 3)
    with torch.no_grad():
        module.norm.bias[:4] = 0
    drop(module.wide, *range(8))
    drop(module.depth, *range(8))
    drop(module.thin, 0, 1, 2, 3)


def pruned_encoder(module: Encoder) -> None:
    for index, layer in enumerate(module.encoder.layers):
        drop(layer.linear1, *range(index, 20 + index), bias=False)


def pruned_tagger(module: Tagger) -> None:
    drop(module.project, 0, 3, bias=False)
    for layer, units in enumerate(((1, 4, 9), (0, 2, 5))):
        rows = [12 * gate + unit for gate in range(4) for unit in units]
        for suffix in ("", "_reverse"):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                mask = torch.ones(getattr(module.lstm, f"{kind}_l{layer}{suffix}").shape)
                mask[rows] = 0
                with torch.no_grad():
                    getattr(module.lstm, f"{kind}_l{layer}{suffix}").mul_(mask)


def pruned_unet(module: Unet) -> None:
    drop(module.first[0], 0, 1, bias=False)
    drop(module.second[1], 3, 4, 5)
    drop(module.third[1], 0, 8)
    drop(module.up1, 1)
    drop(module.join1, 0, 1, 2)
    drop(module.join2, 7)


IMAGE, SENTENCE = (2, 3, 8, 8), (2, 7)
PREPARE: dict[type[nn.Module], Callable[..., None]] = {
    Residual: pruned_residual,
    Separable: pruned_separable,
    Encoder: pruned_encoder,
    Tagger: pruned_tagger,
    Unet: pruned_unet,
}
# The older exporter is the faster one.
BY_DYNAMO = (Residual, Encoder)
FAMILIES = pytest.mark.parametrize("kind", list(PREPARE), ids=lambda kind: kind.__name__.lower())
# Shapes of some weights that the masks and nothing else decide.
SHAPES: dict[type[nn.Module], dict[str, tuple[int, ...]]] = {
    Residual: {
        "stem.weight": (13, 3, 3, 3),
        "norm.running_var": (13,),
        "inner.weight": (11, 13, 3, 3),  # ten live channels, and a constant one that stands for six
        "outer.weight": (13, 11, 3, 3),
        "down.weight": (22, 13, 3, 3),
        "head.weight": (5, 22),
    },
    Separable: {
        "stem.weight": (9, 3, 3, 3),
        "grouped.weight": (12, 3, 3, 3),
        "norm.weight": (12,),
        "wide.weight": (16, 12, 1, 1),
        "depth.weight": (16, 1, 3, 3),
        "thin.weight": (12, 16, 1, 1),
    },
    Encoder: {
        "encoder.layers.0.linear1.weight": (12, 16),
        "encoder.layers.1.linear2.weight": (16, 12),
        "places": (1, 12, 16),
    },
    Tagger: {
        "project.weight": (8, 6),
        "lstm.weight_ih_l0": (36, 8),
        "lstm.weight_hh_l1_reverse": (36, 9),
        "lstm.weight_ih_l1": (36, 18),
        "head.weight": (5, 18),
    },
    Unet: {
        "first.0.weight": (7, 3, 3, 3),
        "second.1.weight": (9, 7, 3, 3),
        "third.1.weight": (14, 9, 3, 3),
        "up1.weight": (14, 11, 2, 2),
        "join1.weight": (9, 20, 3, 3),
        "join2.weight": (7, 15, 3, 3),
        "out.weight": (2, 7, 1, 1),
    },
}


@dataclass(frozen=True, eq=False)
class Trip:
    """A pruned module, its input, what it was shrunk to, and the smaller module."""

    module: nn.Module
    state: dict[str, torch.Tensor]
    value: torch.Tensor
    result: ShrinkResult
    small: nn.Module


@cache
def trip(kind: type[nn.Module]) -> Trip:
    torch.manual_seed(0)
    module = kind()
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    PREPARE[kind](module)
    module.eval()
    value = torch.randint(19, SENTENCE) if kind in (Encoder, Tagger) else torch.randn(IMAGE)
    state = copy.deepcopy(module.state_dict())
    with warnings.catch_warnings(record=True):  # the older exporter warns of being old, and of what it fixes
        result = onnxshrink.export(module, value, align="none", dynamo=kind in BY_DYNAMO)
    return Trip(module, state, value, result, result.to_torch(module))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@FAMILIES
def test_computes_the_same_as_the_module_and_as_the_model(kind: type[nn.Module]) -> None:
    case = trip(kind)
    with torch.no_grad():
        actual = case.small(case.value).numpy()
        np.testing.assert_allclose(actual, masked_copy(case.module)(case.value).numpy(), **TOLERANCE)
    session = onnxruntime.InferenceSession(case.result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: case.value.numpy()})
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


@FAMILIES
def test_other_inputs_too(kind: type[nn.Module]) -> None:
    """Another batch, and another extent where the module takes any."""
    case = trip(kind)
    value = torch.randint(19, (3, 11)) if kind in (Encoder, Tagger) else torch.randn(3, 3, 16, 12)
    with torch.no_grad():
        expected = masked_copy(case.module)(value)
        np.testing.assert_allclose(case.small(value).numpy(), expected.numpy(), **TOLERANCE)


@FAMILIES
def test_widths(kind: type[nn.Module]) -> None:
    case = trip(kind)
    found = {name: tuple(tensor.shape) for name, tensor in case.small.state_dict().items()}
    assert {name: found[name] for name in SHAPES[kind]} == SHAPES[kind]
    assert case.small.onnxshrink_notes == ()


@FAMILIES
def test_the_module_itself_is_untouched(kind: type[nn.Module]) -> None:
    case = trip(kind)
    after = case.module.state_dict()
    assert list(after) == list(case.state)
    assert all(torch.equal(after[name], tensor) for name, tensor in case.state.items())
    assert not hasattr(case.module, "onnxshrink_removed")


@FAMILIES
def test_one_step_of_training(kind: type[nn.Module]) -> None:
    """In training mode; every parameter gets a gradient, and the loss falls."""
    small = copy.deepcopy(trip(kind).small).train()
    for part in small.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    value = trip(kind).value
    target = torch.zeros_like(small(value))
    optimiser = torch.optim.SGD(small.parameters(), lr=1e-3)
    before = nn.functional.mse_loss(small(value), target)
    before.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    optimiser.step()
    assert nn.functional.mse_loss(small(value), target) < before


@FAMILIES
def test_saved_and_loaded(kind: type[nn.Module]) -> None:
    """The whole module; and its state, in another smaller copy."""
    case = trip(kind)
    whole, state = io.BytesIO(), io.BytesIO()
    trained = copy.deepcopy(case.small)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(0.9)
    torch.save(trained, whole)
    torch.save(trained.state_dict(), state)
    whole.seek(0)
    state.seek(0)
    fresh = case.result.to_torch(case.module)
    fresh.load_state_dict(torch.load(state, weights_only=True))
    with torch.no_grad():
        for again in (torch.load(whole, weights_only=False), fresh):
            assert torch.equal(again(case.value), trained(case.value))


@FAMILIES
def test_layers_hold_what_was_removed(kind: type[nn.Module]) -> None:
    case = trip(kind)
    original = dict(masked_copy(case.module).named_parameters())
    held = 0
    for path, part in case.small.named_modules():
        for leaf, axes in getattr(part, "onnxshrink_removed", {}).items():
            name = f"{path}.{leaf}" if path else leaf
            if name in original and not (isinstance(part, nn.Conv2d) and part.groups > 1):
                expected = [extent - len(lost) for extent, lost in zip(original[name].shape, axes, strict=True)]
                assert list(getattr(part, leaf).shape) == expected
                held += original[name].numel() - getattr(part, leaf).numel()
    assert held > 0.7 * (count(masked_copy(case.module)) - count(case.small))


def test_sizes_follow() -> None:
    small = trip(Separable).small
    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (3, 9, 12)
    assert (small.depth.groups, small.norm.num_groups, small.norm.num_channels) == (16, 3, 12)
    assert (small.norm2.num_features, small.head.in_features) == (16, 12)
    assert (trip(Tagger).small.lstm.hidden_size, trip(Tagger).small.lstm.input_size) == (9, 8)
    assert trip(Unet).small.second[2].num_features == 9


def test_removed_indices() -> None:
    small = trip(Residual).small
    assert small.stem.onnxshrink_removed["weight"][0] == (0, 5, 9)
    assert small.head.onnxshrink_removed["weight"] == ((), (1, 2))


def test_the_mode_of_each_part_stays() -> None:
    module = trip(Unet).module
    copied = copy.deepcopy(masked_copy(module))
    copied.first.train()
    small = trip(Unet).result.to_torch(copied)
    assert [part.training for part in small.modules()] == [part.training for part in copied.modules()]


def test_a_model_without_a_module() -> None:
    result = onnxshrink.shrink(trip(Unet).result.model, verify=False)
    with pytest.raises(InputError, match="to_torch: no module belongs to this result"):
        result.to_torch(trip(Unet).module)


def test_another_module_than_the_exported_one() -> None:
    other = masked_copy(trip(Unet).module)
    with torch.no_grad():
        other.out.bias.add_(1)
    with pytest.raises(InputError, match="to_torch: the module computes something else than the model"):
        trip(Unet).result.to_torch(other)


def test_masks_are_applied_again() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    with warnings.catch_warnings(record=True):  # the older exporter warns of being old, and of what it fixes
        result = onnxshrink.export(module, torch.randn(3, 4), {"0": {"weight": mask, "bias": mask}}, dynamo=False)
    small = result.to_torch(module)
    assert [tuple(p.shape) for p in small.parameters()] == [(4, 4), (4,), (2, 4), (2,)]
    assert torch.equal(small[0].weight, module[0].weight[[0, 2, 3, 5]])


# --- by way of ModelSpeedup ----------------------------------------------------------------------------------------


def l1_masks(module: nn.Module, *names: str) -> dict[str, dict[str, torch.Tensor]]:
    """Half of the rows of some layers, those of the largest norm; biases stay."""
    masks = {}
    for name in names:
        weight = module.get_submodule(name).weight.detach()
        norms = weight.abs().flatten(1).sum(1)
        masks[name] = {"weight": (norms >= norms.median()).float().reshape(-1, *[1] * (weight.ndim - 1)) + 0 * weight}
    return masks


def test_speedup_of_a_module_called_by_keyword() -> None:
    module = Separable().eval()
    masks = l1_masks(module, "wide", "stem")
    value = torch.randn(1, 3, 8, 8)
    speedup = ModelSpeedup(module, {"x": value}, masks)
    small = speedup.speedup_model().to_torch(module)
    assert (small.wide.out_channels, small.depth.groups, small.thin.in_channels) == (13, 13, 13)
    with torch.no_grad():
        np.testing.assert_allclose(small(value).numpy(), masked_copy(module, masks)(value).numpy(), **TOLERANCE)
    with pytest.raises(InputError, match="to_torch: the module computes something else than the model"):
        speedup.result.to_torch(Separable())


def test_parts_alone_have_no_module() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    speedup = ModelSpeedup(module, torch.randn(2, 4), l1_masks(module, "0"), dynamo=False)
    with warnings.catch_warnings(record=True):
        part = speedup.replace_submodule("0")
    with pytest.raises(InputError, match="to_torch: no module belongs to this result"):
        part.to_torch(module)


@pytest.mark.parametrize("width", [6, 8], ids=["of channels that leave", "of channels that stay"])
def test_masks_of_activations_are_saved_where_they_stay(width: int) -> None:
    """A part that must stay whole is masked in the smaller module too; elsewhere nothing is left of the mask."""
    module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8) if width == 8 else nn.ReLU(), nn.Linear(8, 2)).eval()
    mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    masks = {"0": {"_output_0": mask}}
    with warnings.catch_warnings(record=True):
        small = onnxshrink.export(module, torch.randn(3, 4), masks, dynamo=False).to_torch(module)
    file, value = io.BytesIO(), torch.randn(5, 4)
    torch.save(small, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded[0].weight.shape == (width, 4)
    assert len(loaded[0]._forward_hooks) == len(list(loaded.buffers())) == (width == 8)
    with torch.no_grad():
        np.testing.assert_allclose(loaded(value).numpy(), masked_copy(module, masks)(value).numpy(), **TOLERANCE)
