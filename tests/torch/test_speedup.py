"""ModelSpeedup: its documented interface, its steps, the masks it infers, parts replaced alone, own operators."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

import onnxruntime
import torch
from torch import Tensor, nn

import onnxshrink
from onnxshrink.errors import InputError, MaskError
from onnxshrink.torch import ModelSpeedup, masked_copy


class Block(nn.Module):
    """Two convolutions, both followed by a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.second(torch.relu(self.first(x))))


class Network(nn.Module):
    """A block between convolutions; the linear layer is applied to three axes, so its weight is transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.tail = nn.Conv2d(3, 4, 1), Block(), nn.Conv2d(6, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.tail(self.block(self.stem(image))).flatten(2).transpose(1, 2))


def rows(weight: Tensor, *dead: int) -> Tensor:
    mask = torch.ones_like(weight)
    mask[list(dead)] = 0
    return mask.detach()


@pytest.fixture(scope="module")
def network() -> Network:
    torch.manual_seed(0)
    module = Network().train()
    with torch.no_grad():
        # Dead in `second`: a constant behind the ReLU, and nothing.
        module.block.second.bias[2:4] = torch.tensor([0.5, -0.5])
    return module


@pytest.fixture(scope="module")
def masks(network: Network) -> dict[str, dict[str, Tensor]]:
    dead = {"stem": (1,), "block.first": (0, 5), "tail": (4,)}
    found = {
        name: {kind: rows(value, *lost) for kind, value in network.get_submodule(name).named_parameters()}
        for name, lost in dead.items()
    }
    return {**found, "block.second": {"weight": rows(network.block.second.weight, 2, 3)}}


IMAGE = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def speedup(network: Network, masks: dict[str, Any]) -> ModelSpeedup:
    found = ModelSpeedup(network, IMAGE, masks)
    found.speedup_model()
    return found


def fresh(speedup: ModelSpeedup) -> ModelSpeedup:
    """The same before anything was inferred, without another export."""
    found = copy.copy(speedup)
    found._parts = []
    found._begin(speedup._source.graph)
    return found


TRANSPOSED = "a weight that the exporter transposed, and named itself"


def widths(result: onnxshrink.ShrinkResult) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that became smaller, by the names of their parameters."""
    return {layer.weight if "." in layer.weight else TRANSPOSED: layer.after for layer in result.report.layers}


def operators(result: onnxshrink.ShrinkResult) -> list[str]:
    return [node.op_type for node in result.model.graph.node]


def run(model: onnx.ModelProto, **feeds: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {name: value.numpy() for name, value in feeds.items()})[0])


# --- the interface ---------------------------------------------------------------------------------------------------


def test_the_signature_is_the_documented_one() -> None:
    parameters = inspect.signature(ModelSpeedup).parameters
    required = inspect.Parameter.empty
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "model": required,
        "dummy_input": required,
        "masks_file": required,
        "map_location": None,
        "batch_dim": 0,
        "confidence": 8,
        "customized_replace_func": None,
    }
    assert [p.kind for p in parameters.values()] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 7
    replace = inspect.signature(ModelSpeedup.replace_submodule).parameters
    assert [(p.name, p.default) for p in replace.values()][1:] == [
        ("unique_name", required),
        ("reindex_dim", None),
        ("reindex", None),
    ]


@pytest.mark.parametrize(
    "method",
    [
        *("initialize_speedup", "infer_modules_masks", "update_direct_sparsity", "update_indirect_sparsity"),
        *("replace_compressed_modules", "replace_submodule", "speedup_model"),
    ],
)
def test_the_documented_methods_are_there_and_documented(method: str) -> None:
    assert inspect.getdoc(getattr(ModelSpeedup, method))


def test_all_at_once(speedup: ModelSpeedup, network: Network, masks: dict[str, Any]) -> None:
    result = speedup.result
    assert result is not None
    assert widths(result) == {
        "stem.weight": (3, 3, 1, 1),
        "block.first.weight": (6, 3, 3, 3),
        "block.second.weight": (4, 6, 1, 1),
        # A channel of ones carries the constant behind `second` across the zero padding.
        "tail.weight": (4, 5, 3, 3),
        TRANSPOSED: (4, 3),
    }
    assert result.report.equivalence is not None
    assert result.report.equivalence.error < 1e-6
    assert network.training
    for count in (1, 5):
        image = torch.randn(count, 3, 6, 5, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = masked_copy(network, masks)(image).numpy()
        np.testing.assert_allclose(run(result.model, image=image), expected, rtol=1e-5, atol=1e-6)


def test_masks_have_two_names_and_so_has_the_batch(network: Network, masks: dict[str, Any]) -> None:
    found = ModelSpeedup(network, IMAGE, masks_or_file=masks, batch_size=4)
    assert found.masks is masks
    assert found.confidence == 4
    with pytest.raises(TypeError, match="masks_or_file is another name of masks_file; give one of them"):
        ModelSpeedup(network, IMAGE, masks_file=masks, masks_or_file=masks)
    with pytest.raises(TypeError, match="masks_file"):
        ModelSpeedup(network, IMAGE)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="mask_file"):
        ModelSpeedup(network, IMAGE, mask_file=masks)  # type: ignore[call-overload]


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".npz", ".safetensors"])
def test_masks_come_from_files(network: Network, masks: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"masks{suffix}"
    flat = {f"{module}.{name}": mask for module, own in masks.items() for name, mask in own.items()}
    if suffix == ".npz":
        np.savez(path, **{name: mask.numpy() for name, mask in flat.items()})
    elif suffix == ".safetensors":
        pytest.importorskip("safetensors.torch", reason="safetensors is not installed").save_file(flat, path)
    else:
        torch.save(masks, path)
    read = ModelSpeedup(network, IMAGE, str(path), map_location="cpu").masks
    expected = masked_copy(network, masks).state_dict()
    assert all(torch.equal(value, expected[n]) for n, value in masked_copy(network, read).state_dict().items())


def test_map_location_reaches_torch_load(network: Network, masks: dict[str, Any], tmp_path: Path) -> None:
    torch.save(masks, tmp_path / "masks.pth")
    meta = ModelSpeedup(network, IMAGE, tmp_path / "masks.pth", "meta").masks
    assert meta["stem"]["weight"].device.type == "meta"  # type: ignore[union-attr, index]


def test_the_equivalence_check_runs_on_one_batch_of_confidence_samples(speedup: ModelSpeedup) -> None:
    assert speedup.model is not None
    feed = speedup.dummy_input.feed(speedup.model, seed=0)
    assert {name: value.shape for name, value in feed.items()} == {"image": (8, 3, 6, 5)}
    assert speedup.result is not None
    assert speedup.result.report.equivalence is not None
    assert speedup.result.report.equivalence.samples == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"confidence": 1}, "confidence 1: give a whole number of samples, at least 2"),
        ({"masks_file": 3}, "masks_file is a int; give a file, or masks by module"),
        ({"masks_file": "nowhere.pth"}, "mask file nowhere.pth: no such file"),
        ({"dummy_input": 3}, "dummy_input is a int; give a tensor, a tuple or list of arguments, or a dictionary of"),
        ({"dummy_input": [3]}, "dummy_input holds no tensor"),
        ({"dummy_input": torch.zeros(0, 3, 6, 5)}, "its batch is empty"),
        ({"batch_dim": 4}, "no tensor of dummy_input has axis 4"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(network: Network, arguments: dict[str, Any], message: str) -> None:
    given = {"dummy_input": IMAGE, "masks_file": {}, **arguments}
    with pytest.raises(InputError, match=message):
        ModelSpeedup(network, **given)


def test_a_mask_that_fits_nothing_is_named(network: Network) -> None:
    with pytest.raises(MaskError, match=r"mask 'stm\.weight'"):
        ModelSpeedup(network, IMAGE, {"stm": {"weight": [1]}}).speedup_model()


# --- the example input -----------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Takes a sequence with the batch second, a table of whole numbers, and something without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(7, 4), nn.Linear(6, 4)

    def forward(self, value: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        return self.linear(value) * scale + self.table(index)


def test_a_list_of_arguments_is_as_good_as_a_tuple(network: Network) -> None:
    (value,) = ModelSpeedup(network, [IMAGE], {}, confidence=3).dummy_input.args
    assert torch.equal(value, IMAGE[[0, 1, 0]])
    (value,) = ModelSpeedup(network, IMAGE, {}).dummy_input.args
    assert value.shape == (8, 3, 6, 5)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_every_form_of_example_input_and_another_batch_axis(kind: str) -> None:
    torch.manual_seed(0)
    module, value, index = Two(), torch.randn(3, 2, 6), torch.tensor([[1, 2], [3, 6], [5, 0]])
    given: Any = {"value": value, "index": index, "scale": torch.full((4,), 2.0)}
    if kind != "dict":
        given = tuple(given.values())
    masks = {"linear": {"weight": torch.cat([torch.ones(4, 4), torch.zeros(4, 2)], 1)}}
    found = ModelSpeedup(module, given, masks, batch_dim=1, confidence=5)
    result = found.speedup_model()
    shapes = [[d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in result.model.graph.input]
    free = shapes[0][1]
    assert isinstance(free, str)
    assert shapes == [[3, free, 6], [3, free], [4]]
    assert found.model is not None
    feed = found.dummy_input.feed(found.model, seed=0)
    assert feed["value"].shape == (3, 5, 6)
    assert feed["index"].tolist() == [[1, 2, 1, 2, 1], [3, 6, 3, 6, 3], [5, 0, 5, 0, 5]]
    assert (feed["scale"] >= 0).all()


# --- step by step ----------------------------------------------------------------------------------------------------


def test_steps_come_to_what_all_at_once_does(speedup: ModelSpeedup) -> None:
    stepwise = fresh(speedup)
    stepwise.infer_modules_masks()
    assert speedup.result is not None
    assert stepwise.replace_compressed_modules().model == speedup.result.model


def test_sparsity_can_be_worked_out_node_by_node(speedup: ModelSpeedup) -> None:
    stepwise = fresh(speedup)
    for node in stepwise.direct_order():
        stepwise.update_direct_sparsity(node)
    for node in stepwise.indirect_order():
        stepwise.update_indirect_sparsity(node)
    masks, expected = stepwise._analysis, speedup._analysis
    assert set(masks.known) == set(expected.known)
    assert set(masks.needed) == set(expected.needed)
    assert all(np.array_equal(masks.needed[name], expected.needed[name]) for name in expected.needed)
    assert all(np.array_equal(masks.known[name].mask, expected.known[name].mask) for name in expected.known)
    assert speedup.result is not None
    assert stepwise.replace_compressed_modules().model == speedup.result.model


def test_direct_sparsity_of_one_module_is_that_of_its_outputs(speedup: ModelSpeedup) -> None:
    stepwise = fresh(speedup)
    stepwise.update_direct_sparsity("stem")
    known = stepwise._analysis.known
    assert list(known) == stepwise._modules.outputs("stem")
    assert [fact.mask.reshape(-1).tolist() for fact in known.values()] == [[False, True, False, False]]


def test_unknown_nodes_are_named(speedup: ModelSpeedup) -> None:
    with pytest.raises(InputError, match=r"there is no module or node 'blok'; near names: 'block'"):
        fresh(speedup).update_direct_sparsity("blok")


def test_inferred_masks_are_full_size(speedup: ModelSpeedup) -> None:
    inferred = speedup.inferred_masks
    assert list(inferred) == ["stem", "block", "block.first", "block.second", "tail", "head"]
    first = inferred["block.first"]
    assert {name: mask.shape for name, mask in first.items()} == {
        "_input_0": (1, 4, 6, 5),
        "_output_0": (1, 8, 6, 5),
        "weight": (8, 4, 3, 3),
        "bias": (8,),
    }
    assert first["_input_0"][0, :, 2, 3].tolist() == [1, 0, 1, 1]
    assert first["_output_0"][0, :, 2, 3].tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
    assert first["bias"].tolist() == [0, 1, 1, 1, 1, 0, 1, 1]
    assert first["weight"][:, :, 1, 1].tolist() == np.outer([0, 1, 1, 1, 1, 0, 1, 1], [1, 0, 1, 1]).tolist()
    # A linear layer on three axes: the exporter transposed its weight.
    assert inferred["head"]["weight"].tolist() == [[1, 1, 1, 1, 0]] * 3
    assert list(inferred["block"]) == ["_input_0", "_output_0"]
    assert np.array_equal(inferred["block"]["_output_0"], inferred["tail"]["_input_0"])


def test_inferred_masks_of_tensors(speedup: ModelSpeedup) -> None:
    tensors = speedup.tensor_masks
    assert tensors["image"].shape == (1, 3, 6, 5)
    assert tensors["image"].all()
    (output,) = speedup._modules.outputs("tail")
    assert tensors[output][0, :, 0, 0].tolist() == [1, 1, 1, 1, 0]
    assert set(tensors) == {n for node in speedup._analysis.nodes() for n in node.outputs} | {"image"}


# --- parts alone -----------------------------------------------------------------------------------------------------


def test_a_module_is_replaced_with_what_hangs_together_with_it(speedup: ModelSpeedup) -> None:
    found = fresh(speedup)
    assert widths(found.replace_submodule("tail")) == {
        "block.second.weight": (4, 8, 1, 1),
        "tail.weight": (4, 5, 3, 3),
        TRANSPOSED: (4, 3),
    }
    assert widths(found.replace_submodule("stem")) == {
        "stem.weight": (3, 3, 1, 1),
        "block.first.weight": (8, 3, 3, 3),
        "block.second.weight": (4, 8, 1, 1),
        "tail.weight": (4, 5, 3, 3),
        TRANSPOSED: (4, 3),
    }


def test_nodes_go_by_their_names_too(speedup: ModelSpeedup) -> None:
    by_node, by_module = fresh(speedup), fresh(speedup)
    (node,) = by_node._modules.nodes("stem")
    assert by_node.replace_submodule(node.label).model == by_module.replace_submodule("stem").model


def test_with_reindex_the_rest_stays_as_it_is(speedup: ModelSpeedup) -> None:
    result = fresh(speedup).replace_submodule("block", 1, torch.tensor([0, 1, 4, 5]))
    assert widths(result) == {"block.first.weight": (6, 4, 3, 3), "block.second.weight": (4, 6, 1, 1)}
    assert operators(result)[5:8] == ["Pad", "Gather", "Add"]
    # The one dead channel that holds a constant keeps it; every other place is zero.
    (added,) = [t for t in result.model.graph.initializer if t.name.endswith("_constants")]
    assert onnx.numpy_helper.to_array(added).reshape(-1).tolist() == [0, 0, 0.5, 0, 0, 0]
    assert result.report.equivalence is not None


def test_reindex_takes_a_mask_and_parts_add_up(speedup: ModelSpeedup) -> None:
    found = fresh(speedup)
    mask = np.array([False, True, True, True, True, False, True, True])
    first = found.replace_submodule("block.first", 1, mask)
    assert widths(first) == {"block.first.weight": (6, 4, 3, 3)}
    assert operators(first)[2:4] == ["Pad", "Gather"]
    both = found.replace_submodule("stem")
    assert widths(both) == {"stem.weight": (3, 3, 1, 1), "block.first.weight": (6, 3, 3, 3)}


@pytest.mark.parametrize(
    ("dim", "reindex", "message"),
    [
        (1, [0, 1, 4], r"reindex of the output of 'block' leaves out index 5, which is live"),
        (1, [0, 1, 9], r"reindex of the output of 'block': give a mask of 6, or positions below 6"),
        (1, [True] * 5, r"reindex of the output of 'block': give a mask of 6, or positions below 6"),
        (0, [0], r"the output of 'block' has no axis 0 of fixed extent"),
        (7, [0], r"the output of 'block' has no axis 7 of fixed extent"),
        (1, None, r"reindex_dim and reindex go together; give both or neither"),
    ],
)
def test_a_reindex_that_does_not_fit_is_named(speedup: ModelSpeedup, dim: int, reindex: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fresh(speedup).replace_submodule("block", dim, reindex)


# --- operators of one's own ------------------------------------------------------------------------------------------


class Echo(nn.Module):
    """An operator of onnxruntime's that has no rule."""

    def forward(self, x: Tensor) -> Tensor:
        name = "com.microsoft::SampleOp"
        return torch.onnx.ops.symbolic(name, (x,), dtype=x.dtype, shape=x.shape, version=1)


class Mix(nn.Module):
    """Another one, with weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(width, width))

    def forward(self, x: Tensor) -> Tensor:
        name = "com.microsoft::TransposeMatMul"
        return torch.onnx.ops.symbolic(name, (x, self.gain), dtype=x.dtype, shape=x.shape, version=1)


class Custom(nn.Module):
    """Both, between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.echo, self.mix, self.last = nn.Linear(5, 8), Echo(), Mix(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.mix(self.echo(torch.relu(self.first(x))))))


@pytest.fixture(scope="module")
def custom() -> Custom:
    if not hasattr(torch.onnx, "ops"):
        pytest.skip("this PyTorch exports no operators by name")
    torch.manual_seed(0)
    module = Custom()
    with torch.no_grad():
        module.mix.gain[:, 6:] = 0
    return module


@pytest.fixture(scope="module")
def exported(custom: Custom) -> ModelSpeedup:
    found = ModelSpeedup(custom, torch.randn(2, 5), CUSTOM_MASKS)
    found.initialize_speedup()
    return found


def like(exported: ModelSpeedup, **options: Any) -> ModelSpeedup:
    """One with other options, without another export."""
    found = ModelSpeedup(exported.bound_model, torch.randn(2, 5), exported.masks, **options)
    found.model, found._source = exported.model, exported._source
    found._begin(exported._source.graph)
    return found


CUSTOM_MASKS = {
    "first": {"weight": rows(torch.ones(8, 5), 1, 3), "bias": rows(torch.ones(8), 1, 3)},
    "last": {"weight": rows(torch.ones(8, 4), 0).T},
}


@pytest.mark.parametrize("keys", [("Echo", "Mix"), ("com.microsoft::SampleOp", "TransposeMatMul")], ids=str)
def test_functions_shrink_custom_operators(exported: ModelSpeedup, keys: tuple[str, str]) -> None:
    seen: list[Any] = []

    def echo(node: Any, masks: Any) -> dict[str, Any]:
        return {}

    def mix(node: Any, masks: Any) -> dict[str, Any]:
        (inputs,), output, weights = masks
        seen.append((node.module, node.op_type, list(node.constants), list(weights)))
        return {"gain": torch.from_numpy(node.constants["gain"][inputs[0] == 1][:, output[0] == 1])}

    functions = dict(zip(keys, (echo, mix), strict=True))
    result = like(exported, customized_replace_func=functions).replace_compressed_modules()
    # Of the operator's outputs one is not read, and two are nothing.
    assert widths(result) == {"first.weight": (6, 5), "mix.gain": (6, 5), "last.weight": (4, 5)}
    assert seen == [("mix", "TransposeMatMul", ["gain"], ["gain"])]
    assert [(u.op, u.how) for u in result.report.unproven] == [
        ("SampleOp", "replaced by echo, 8 random samples"),
        ("TransposeMatMul", "replaced by mix, 8 random samples"),
    ]
    assert result.report.equivalence is not None


def test_without_a_function_or_a_probe_they_are_named(custom: Custom) -> None:
    report = ModelSpeedup(custom, torch.randn(2, 5), CUSTOM_MASKS).speedup_model().report
    assert [refusal.op for refusal in report.refusals] == ["SampleOp", "TransposeMatMul"]
    assert report.layers == ()


def test_confidence_probing_finds_constant_outputs(exported: ModelSpeedup) -> None:
    result = like(exported, confidence=4, probe=True).replace_compressed_modules()
    assert widths(result) == {"last.weight": (4, 5)}
    assert [(u.op, u.how, u.constant) for u in result.report.unproven] == [
        ("SampleOp", "4 random samples", 2),
        ("TransposeMatMul", "4 random samples", 2),
    ]
    assert result.report.equivalence is not None


def test_a_wrong_shape_names_the_function_and_the_node(exported: ModelSpeedup) -> None:
    def forgetful(node: Any, masks: Any) -> dict[str, Any]:
        return dict(node.constants)

    functions = {"Echo": lambda node, masks: {}, "Mix": forgetful}
    found = like(exported, customized_replace_func=functions)
    with pytest.raises(InputError, match=r"customized_replace_func\['Mix'\] \(forgetful\), node \w+: what it returned"):
        found.replace_compressed_modules()
