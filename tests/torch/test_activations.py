"""Masks of what enters and leaves a module: multiplied by the exported model, and carried on as any other zeros."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import onnxruntime
import torch
from torch import Tensor, nn

import onnxshrink
from onnxshrink.errors import MaskError
from onnxshrink.torch import export_onnx, masked_copy

FREE_BATCH = ({0: torch.export.Dim.DYNAMIC},)


class Scale(nn.Module):
    """Takes two tensors, gives two."""

    def forward(self, value: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        return value * factor, value + factor


class Network(nn.Module):
    """Two convolutions, an elementwise part with two inputs and two outputs, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.scale, self.head = Scale(), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        product, total = self.scale(x, factor=torch.sigmoid(x))
        return self.head((product * total).mean((2, 3)))


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def image(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 5, generator=torch.Generator().manual_seed(count))


def dead(extent: int, *indices: int, rank: int = 4) -> np.ndarray:
    """Ones along axis 1, but for some indices."""
    mask = np.ones((1, extent, *[1] * (rank - 2)), np.float32)
    mask[:, list(indices)] = 0
    return mask


def test_the_copy_multiplies_and_the_module_does_not(network: Network) -> None:
    masks = {
        "first": {"_output_0": dead(8, 1, 3)},
        "second": {"_input_input": dead(8, 2)},
        "scale": {"_input_value": dead(6, 0), "_input_1": dead(6, 4), "_output_1": dead(6, 5)},
        "head": {"_input_0": np.array([1, 1, 1, 0, 1, 1])},
    }
    before = network.eval()(image())
    with torch.no_grad():
        x = torch.relu(network.first(image()) * torch.from_numpy(masks["first"]["_output_0"]))
        x = network.second(x * torch.from_numpy(masks["second"]["_input_input"]))
        value = x * torch.from_numpy(dead(6, 0))
        factor = torch.sigmoid(x) * torch.from_numpy(dead(6, 4))
        product, total = value * factor, (value + factor) * torch.from_numpy(dead(6, 5))
        expected = network.head((product * total).mean((2, 3)) * torch.tensor([1, 1, 1, 0, 1, 1]))
        copied = masked_copy(network, masks)
        torch.testing.assert_close(copied(image()), expected)
    assert torch.equal(network(image()), before)
    assert set(copied.state_dict()) == set(network.state_dict())


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_masked_channels_leave_and_so_do_the_masks(network: Network, dynamo: bool) -> None:
    masks = {"first": {"_output_0": dead(8, 1, 3)}, "second": {"_output_0": dead(6, 5)}}
    free = {"dynamic_shapes": FREE_BATCH} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    result = onnxshrink.export(network, image(), masks, align="none", dynamo=dynamo, input_names=["x"], **free)
    shapes = {layer.weight: layer.after for layer in result.report.layers}
    assert shapes == {"first.weight": (6, 3, 3, 3), "second.weight": (5, 6, 3, 3), "head.weight": (4, 5)}
    # One product is the network's own.
    assert [node.op_type for node in result.model.graph.node].count("Mul") == 2
    session = onnxruntime.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 3):
        with torch.no_grad():
            expected = masked_copy(network, masks)(image(count)).numpy()
        np.testing.assert_allclose(session.run(None, {"x": image(count).numpy()})[0], expected, rtol=1e-5, atol=1e-6)


def test_a_mask_given_for_a_whole_batch_holds_for_any(network: Network) -> None:
    mask = np.broadcast_to(dead(8, 1, 3), (7, 8, 6, 5))
    model = export_onnx(network, image(), {"first": {"_output_0": mask}}, dynamic_shapes=FREE_BATCH)
    stored = {tuple(tensor.dims) for tensor in model.graph.initializer if "mask" in tensor.name}
    assert stored == {(1, 8, 1, 1)}


def test_a_mask_of_single_elements_stays_and_is_exact(network: Network) -> None:
    mask = (np.arange(8 * 6 * 5).reshape(1, 8, 6, 5) % 3 > 0).astype(np.float32)
    mask[:, 2] = 0
    result = onnxshrink.export(network, image(), {"first": {"_output_0": mask}}, align="none")
    assert result.report.layers[0].after == (7, 3, 3, 3)
    kept = [t for t in result.model.graph.initializer if list(t.dims) == [1, 7, 6, 5]]
    assert len(kept) == 1


def test_a_mask_of_ones_adds_nothing(network: Network) -> None:
    masks = {"first": {"_output_0": np.ones((1, 8, 1, 1))}}
    assert len(export_onnx(network, image(), masks).graph.node) == len(export_onnx(network, image()).graph.node)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"frist": {"_output_0": [0]}}, r"mask 'frist\._output_0': there is no module 'frist'; near names: 'first'"),
        (
            {"scale": {"_input_other": [0]}},
            r"mask 'scale\._input_other': Scale takes no input 'other'",
        ),
        (
            {"scale": {"_input_2": [0]}},
            r"mask 'scale\._input_2': Scale takes no input '2'; its inputs are value, factor",
        ),
        ({"first": {"_output_0": [0.5]}}, r"mask 'first\._output_0' holds 0\.5; a mask holds only 0 and 1"),
        (
            {"scale": {"_input_0": [0], "_input_value": [[0], [1]]}},
            r"masks 'scale\._input_0' and 'scale\._input_value' differ, but they are for one activation",
        ),
    ],
)
def test_a_mask_that_fits_no_activation_is_named(network: Network, masks: dict, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        masked_copy(network, masks)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"scale": {"_output_2": [0]}}, r"mask 'scale\._output_2': the module gives 2 tensors, and no output '2'"),
        ({"first": {"_output_0": dead(7, 1)}}, r"mask 'first\._output_0' of shape \[1, 7, 1, 1\].* does not broadcast"),
        ({"first": {"_output_0": dead(8, 1)[..., None]}}, r"mask 'first\._output_0' of shape \[8, 1, 1, 1\].* varies"),
        (
            {"first": {"_output_0": np.eye(2)[:, :, None, None]}},
            r"mask 'first\._output_0' of shape \[2, 2, 1, 1\].* varies along an axis that is a free dimension",
        ),
    ],
)
def test_what_only_a_call_can_tell_is_said_when_exporting(network: Network, masks: dict, message: str) -> None:
    with pytest.raises(MaskError, match=message) as caught:
        export_onnx(network, image(), masks, dynamic_shapes=FREE_BATCH)
    assert "\n" not in str(caught.value)
