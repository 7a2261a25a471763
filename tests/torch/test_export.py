"""Masked copies of PyTorch modules, and the ONNX models exported from them."""

from __future__ import annotations

import copy
import logging
import sys
import warnings

import numpy as np
import onnx
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import onnxruntime
import torch
from torch import nn
from torch.nn.utils import prune

from onnxshrink.errors import InputError, MaskError
from onnxshrink.torch import export_onnx, masked_copy

# Both compute in float32 with sums of at most 200 products of numbers around 1: a few units in the last place.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


class Network(nn.Module):
    """A residual block, BatchNorm, a grouped convolution and a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.side = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.grouped(x)))
        x = torch.cat([x, self.side(x).sigmoid()], 1)
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    module = Network()
    for norm in (module.norm, module.norm2):
        nn.init.normal_(norm.weight, 1, 0.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    return module


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def row_mask(weight: torch.Tensor, *rows: int) -> torch.Tensor:
    mask = torch.ones_like(weight)
    mask[list(rows)] = 0
    return mask.detach()


def nni_masks(module: Network) -> dict[str, dict[str, torch.Tensor | None]]:
    return {
        "stem": {"weight": row_mask(module.stem.weight, 1, 4), "bias": None},
        "norm": {"weight": row_mask(module.norm.weight, 1, 4), "bias": row_mask(module.norm.bias, 1, 4)},
        "grouped": {"weight": row_mask(module.grouped.weight, 2), "bias": row_mask(module.grouped.bias, 2)},
        "side": {"weight": row_mask(module.side.weight, 0, 3)},
    }


def prune_in_every_way(module: Network) -> None:
    prune.l1_unstructured(module.stem, "weight", 0.3)
    prune.ln_structured(module.stem, "weight", 0.25, n=2, dim=0)  # the second method makes a container
    prune.custom_from_mask(module.side, "bias", torch.tensor([1, 0, 1, 0]))
    prune.global_unstructured([(module.grouped, "weight"), (module.head, "weight")], prune.L1Unstructured, amount=0.5)


def run(model: onnx.ModelProto, *inputs: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {port.name: value.numpy() for port, value in zip(session.get_inputs(), inputs, strict=True)}
    return session.run(None, feeds)[0]


def evaluate(module: nn.Module, *inputs: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return masked_copy(module)(*inputs).numpy()


# --- masked_copy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["by module", "flat"])
def test_masks_are_written_into_the_copy(network: Network, flat: bool) -> None:
    masks = nni_masks(network)
    by_name = {f"{module}.{name}": mask for module, own in masks.items() for name, mask in own.items()}
    result = dict(masked_copy(network, by_name if flat else masks).named_parameters())
    for name, before in network.named_parameters():
        mask = by_name.get(name)
        assert torch.equal(result[name], before if mask is None else before * mask)


def test_masked_values_become_positive_zero() -> None:
    module = nn.Linear(3, 1, bias=False)
    module.weight.data[:] = torch.tensor([torch.inf, torch.nan, -1])
    assert masked_copy(module, {"weight": np.zeros((1, 3))}).weight.detach().numpy().tobytes() == bytes(12)


def test_the_copy_is_in_evaluation_mode_and_the_caller_s_module_is_untouched(network: Network) -> None:
    prune_in_every_way(network)
    network.stem.register_forward_hook(lambda *_: None)
    network.train()
    state = copy.deepcopy(network.state_dict())
    objects = [id(tensor) for tensor in (*network.parameters(), *network.buffers())]
    attributes = [sorted(vars(part)) for part in network.modules()]
    hooks = [[dict(part._forward_pre_hooks), dict(part._forward_hooks)] for part in network.modules()]
    weight = network.stem.weight

    result = masked_copy(network, {"norm": {"weight": row_mask(network.norm.weight, 3)}})

    assert not any(part.training for part in result.modules())
    assert all(part.training for part in network.modules())
    assert list(state) == list(network.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in network.state_dict().items())
    assert objects == [id(tensor) for tensor in (*network.parameters(), *network.buffers())]
    assert attributes == [sorted(vars(part)) for part in network.modules()]
    assert hooks == [[dict(part._forward_pre_hooks), dict(part._forward_hooks)] for part in network.modules()]
    assert network.stem.weight is weight
    assert weight.grad_fn is not None
    assert not {id(tensor) for tensor in result.parameters()} & set(objects)


def test_pruning_becomes_permanent_in_the_copy(network: Network, image: torch.Tensor) -> None:
    names = {name for name, _ in network.named_parameters()}
    prune_in_every_way(network)
    result = masked_copy(network)
    assert {name for name, _ in result.named_parameters()} == names
    assert not prune.is_pruned(result)
    assert prune.is_pruned(network)
    for part, copied in zip(network.modules(), result.modules(), strict=True):
        for name in ("weight", "bias"):
            if hasattr(part, f"{name}_mask"):
                expected = getattr(part, f"{name}_orig") * getattr(part, f"{name}_mask")
                assert torch.equal(getattr(copied, name), expected)
    with torch.no_grad():
        assert torch.equal(result(image), network.eval()(image))


def test_masks_come_on_top_of_pruning(network: Network) -> None:
    prune.l1_unstructured(network.side, "weight", 0.5)
    mask = row_mask(network.side.weight, 1)
    assert torch.equal(masked_copy(network, {"side.weight": mask}).side.weight, network.side.weight * mask)


def test_values_changed_since_pruning_count(network: Network) -> None:
    prune.l1_unstructured(network.side, "weight", 0.5)
    with torch.no_grad():
        network.side.weight_orig.fill_(3)
    assert torch.equal(masked_copy(network).side.weight, 3 * network.side.weight_mask)


def test_pruned_lstm_computes_with_the_pruned_weights() -> None:
    module = nn.LSTM(3, 4)
    prune.ln_structured(module, "weight_hh_l0", 0.5, n=1, dim=0)
    result = masked_copy(module, {"weight_ih_l0": torch.zeros(16, 3)})
    assert any(result.weight_hh_l0 is weight for weight in result._flat_weights)
    module.weight_ih_l0.data.zero_()
    sequence = torch.randn(5, 1, 3)
    with torch.no_grad():
        assert torch.equal(result(sequence)[0], module(sequence)[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("names", [["first"], ["second"], ["first", "second"]])
def test_a_tied_parameter_stays_tied_and_is_masked_under_any_of_its_names(names: list[str]) -> None:
    module = Tied()
    mask = row_mask(module.first.weight, 2)
    result = masked_copy(module, {name: {"weight": mask} for name in names})
    assert result.first.weight is result.second.weight
    assert torch.equal(result.first.weight, module.first.weight * mask)


def test_different_masks_for_a_tied_parameter_are_refused() -> None:
    module = Tied()
    masks = {name: row_mask(module.first.weight, row) for row, name in enumerate(["first.weight", "second.weight"])}
    with pytest.raises(MaskError, match=r"'first\.weight' and 'second\.weight' differ, but .* one shared parameter"):
        masked_copy(module, masks)


def test_pruning_one_use_of_a_tied_parameter_leaves_the_other_whole() -> None:
    module = Tied()
    prune.l1_unstructured(module.first, "weight", 0.5)
    result, point = masked_copy(module), torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(result(point), module(point))


def test_a_module_used_twice_is_masked_under_either_name() -> None:
    layer = nn.Linear(2, 2)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    assert not masked_copy(module, {"2.weight": torch.zeros(2, 2)})[0].weight.any()


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"stm": {"weight": [1]}}, r"mask 'stm\.weight': there is no module 'stm'; near names: 'stem'"),
        ({"stem": {"wieght": [1]}}, r"mask 'stem\.wieght': the module has no parameter 'wieght'; near names: 'stem\."),
        ({"stem": {"bias": [1]}}, r"mask 'stem\.bias': the module has no parameter 'bias'"),
        ({"norm": {"running_mean": [1]}}, r"mask 'norm\.running_mean': the module has no parameter 'running_mean'"),
        ({"norm": {"weight": [1, 0]}}, r"mask 'norm\.weight' has shape \[2\], its weight has \[8\]"),
        ({"norm": {"weight": [0.5] * 8}}, r"mask 'norm\.weight' holds 0\.5; a mask holds only 0 and 1"),
        ({"norm": {"weight": [float("nan")] * 8}}, r"mask 'norm\.weight' holds nan; a mask holds only 0 and 1"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(network: Network, masks, message: str) -> None:
    with pytest.raises(MaskError, match=message) as caught:
        masked_copy(network, masks)
    assert "\n" not in str(caught.value)


def test_modules_that_cannot_be_copied_are_one_clear_line(network: Network) -> None:
    network.handle = sys.stdout.buffer
    with pytest.raises(InputError, match=r"cannot copy the module Network: .*pickle"):
        masked_copy(network)
    with pytest.raises(InputError, match=r"expected a torch\.nn\.Module, not a dict"):
        masked_copy({})


# --- export_onnx ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_the_exported_model_computes_what_the_masked_module_computes(network, image, dynamo: bool) -> None:
    prune_in_every_way(network)
    masks = nni_masks(network)
    expected = evaluate(masked_copy(network, masks), image)
    model = export_onnx(network, image, masks, dynamo=dynamo)
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(run(model, image), expected, **TOLERANCE)
    assert np.abs(expected - evaluate(network, image)).max() > 0.01  # the masks do matter


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_dead_channels_arrive_as_zeros(network, image, dynamo: bool) -> None:
    model = export_onnx(network, image, nni_masks(network), dynamo=dynamo)
    stem = next(node for node in model.graph.node if node.op_type == "Conv")
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    dead = np.flatnonzero(~weights[stem.input[1]].any((1, 2, 3)))
    assert dead.tolist() == [1, 4]
    assert not weights[stem.input[2]][dead].any()  # BatchNorm, folded: its masked shift is a zero bias


@pytest.mark.parametrize(
    "options",
    [
        {"dynamo": True, "dynamic_shapes": ({0: "batch"},)},
        {"dynamo": True, "dynamic_axes": {"pixels": {0: "batch"}}},
        {"dynamo": False, "dynamic_axes": {"pixels": {0: "batch"}}},
    ],
    ids=["dynamo, shapes", "dynamo, axes", "traced, axes"],
)
def test_free_dimensions_and_names(network, image, options) -> None:
    model = export_onnx(network, [image], input_names=["pixels"], output_names=["classes"], **options)
    assert [port.name for port in (*model.graph.input, *model.graph.output)] == ["pixels", "classes"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    more = torch.cat([image, image + 1, image - 1])
    np.testing.assert_allclose(run(model, more), evaluate(network, more), **TOLERANCE)


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_keyword_arguments(dynamo: bool) -> None:
    x, scale = torch.randn(3), torch.randn(3)
    model = export_onnx(TwoInputs(), (x,), kwargs={"scale": scale}, dynamo=dynamo)
    np.testing.assert_array_equal(run(model, x, scale), (x * scale).numpy())


@pytest.mark.parametrize(("dynamo", "opset"), [(True, 18), (True, 21), (False, 11), (False, 17)])
def test_the_opset_is_the_one_asked_for(network, image, dynamo: bool, opset: int) -> None:
    model = export_onnx(network, image, dynamo=dynamo, opset_version=opset)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    np.testing.assert_allclose(run(model, image), evaluate(network, image), **TOLERANCE)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_an_opset_that_the_exporter_does_not_reach_is_an_error(network, image, dynamo: bool) -> None:
    with pytest.raises(InputError, match="opset") as caught:
        export_onnx(network, image, dynamo=dynamo, opset_version=99)
    assert "99" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_exporting_is_silent_and_leaves_no_trace(network, image, dynamo: bool, capfd, recwarn) -> None:
    prune.l1_unstructured(network.stem, "weight", 0.5)
    level, filters = logging.root.manager.disable, list(warnings.filters)
    before = copy.deepcopy(network.state_dict())
    export_onnx(network.train(), image, nni_masks(network), dynamo=dynamo)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
    assert (logging.root.manager.disable, list(warnings.filters)) == (level, filters)
    assert all(part.training for part in network.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "traced"])
def test_a_failed_export_is_one_clear_line(dynamo: bool, capfd) -> None:
    with pytest.raises(InputError, match=r"torch\.onnx\.export cannot export Linear: .*2.*5.*3.*4") as caught:
        export_onnx(nn.Linear(3, 4), torch.randn(2, 5), dynamo=dynamo)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


def test_the_tracer_s_warning_about_constants_is_shown() -> None:
    with pytest.warns(torch.jit.TracerWarning, match="Converting a tensor to a Python boolean"):
        export_onnx(Branching(), torch.ones(3), dynamo=False)
