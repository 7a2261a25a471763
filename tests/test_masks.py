"""Reading masks, and writing them into models."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from onnxshrink.errors import InputError, MaskError
from onnxshrink.masks import apply_masks, flatten_masks, load_masks

WEIGHT = np.array([[1.5, -2.0, np.inf], [-np.inf, np.nan, -0.5]], np.float32)
MASK = np.array([[1, 0, 1], [0, 0, 1]], np.float32)
MASKED = np.array([[1.5, 0, np.inf], [0, 0, -0.5]], np.float32)


def skip_without_torch() -> None:
    pytest.importorskip("torch.nn", reason="PyTorch is not installed")


@pytest.fixture
def torch() -> ModuleType:
    skip_without_torch()
    return sys.modules["torch"]


def model_of(*initializers: TensorProto, nodes=(), sparse=(), functions=()) -> onnx.ModelProto:
    nodes = [*nodes, helper.make_node("Identity", ["x"], ["y"])]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], list(initializers), sparse_initializer=list(sparse))
    return helper.make_model(graph, functions=list(functions), opset_imports=[helper.make_opsetid("", 18)])


def weight_model(name: str = "conv1.weight") -> onnx.ModelProto:
    return model_of(numpy_helper.from_array(WEIGHT, name))


def first(model: onnx.ModelProto) -> np.ndarray:
    return numpy_helper.to_array(model.graph.initializer[0])


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    assert actual.tobytes() == expected.tobytes()


# --- apply_masks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.bool_, np.float32, np.int64, np.uint8, np.float16])
def test_masked_elements_become_positive_zero(dtype: type) -> None:
    assert_same_bits(first(apply_masks(weight_model("w"), {"w": MASK.astype(dtype)})), MASKED)


def test_the_given_model_is_not_changed() -> None:
    model = weight_model("w")
    before = model.SerializeToString()
    result = apply_masks(model, {"w": MASK})
    assert model.SerializeToString() == before
    assert result.SerializeToString() != before


def test_without_masks_the_copy_is_equal_and_separate() -> None:
    model = weight_model("w")
    result = apply_masks(model, {})
    assert result == model
    assert result is not model


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize(
    "data_type",
    ["FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "INT8", "INT32", "INT64", "UINT64", "BOOL", "COMPLEX64", "FLOAT8E5M2"],
)
def test_every_element_type_is_masked_in_place(data_type: str, raw: bool) -> None:
    number = TensorProto.DataType.Value(data_type)
    values = np.array([1, 1, 1, 1], np.complex64 if data_type == "COMPLEX64" else np.float32)
    tensor = helper.make_tensor("w", number, [4], values)
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "w")
    assert tensor.HasField("raw_data") == raw
    tensor.doc_string = "kept"
    result = apply_masks(model_of(tensor), {"w": np.array([1, 0, 0, 1])}).graph.initializer[0]
    assert (result.data_type, result.doc_string, result.HasField("raw_data")) == (number, "kept", raw)
    np.testing.assert_array_equal(numpy_helper.to_array(result).astype(np.complex64), [1, 0, 0, 1])


def test_bfloat16_negative_and_infinite_values_become_positive_zero() -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[3])
    tensor.raw_data = np.array([0xBF80, 0xFF80, 0x3F80], np.uint16).tobytes()  # -1, -inf, 1
    result = apply_masks(model_of(tensor), {"w": np.array([0, 0, 1])}).graph.initializer[0]
    assert result.raw_data == np.array([0, 0, 0x3F80], np.uint16).tobytes()


@pytest.mark.parametrize("shape", [(), (0, 3)], ids=["scalar", "empty"])
def test_scalars_and_empty_weights(shape: tuple[int, ...]) -> None:
    model = model_of(numpy_helper.from_array(np.ones(shape, np.float32), "w"))
    np.testing.assert_array_equal(first(apply_masks(model, {"w": np.zeros(shape)})), np.zeros(shape))


@pytest.mark.parametrize(
    ("attribute", "mask", "expected"),
    [
        ({"value": numpy_helper.from_array(WEIGHT)}, MASK, MASKED),
        ({"value_floats": [1.0, 2.0]}, [0, 1], np.array([0, 2], np.float32)),
        ({"value_float": 3.0}, 0, np.array(0, np.float32)),
        ({"value_ints": [4, 5]}, [1, 0], np.array([4, 0], np.int64)),
    ],
    ids=["value", "floats", "float", "ints"],
)
def test_constant_nodes_are_masked_by_the_name_of_their_output(attribute, mask, expected) -> None:
    model = model_of(nodes=[helper.make_node("Constant", [], ["c"], **attribute)])
    result = apply_masks(model, {"c": mask})
    assert_same_bits(numpy_helper.to_array(result.graph.node[0].attribute[0].t), expected)
    onnx.checker.check_model(result, full_check=True)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "coordinates"])
def test_sparse_initializers_are_masked_with_a_dense_mask(linear: bool) -> None:
    indices = np.array([1, 5]) if linear else np.array([[0, 1], [1, 2]])
    values = numpy_helper.from_array(np.array([7, 8], np.float32), "s")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices), [2, 3])
    result = apply_masks(model_of(sparse=[sparse]), {"s": np.array([[1, 0, 0], [0, 0, 1]])})
    np.testing.assert_array_equal(numpy_helper.to_array(result.graph.sparse_initializer[0].values), [0, 8])


def test_weights_in_subgraphs_and_functions_are_masked() -> None:
    branch = helper.make_graph([], "b", [], [], [numpy_helper.from_array(WEIGHT, "inner")])
    loop = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=helper.make_graph([], "e", [], []))
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(WEIGHT))
    function = helper.make_function("own", "f", [], ["k"], [constant], [helper.make_opsetid("", 18)])
    result = apply_masks(model_of(nodes=[loop], functions=[function]), {"inner": MASK, "k": MASK})
    then = next(attribute.g for attribute in result.graph.node[0].attribute if attribute.name == "then_branch")
    assert_same_bits(numpy_helper.to_array(then.initializer[0]), MASKED)
    assert_same_bits(numpy_helper.to_array(result.functions[0].node[0].attribute[0].t), MASKED)


def test_masks_by_module_reach_the_initializers() -> None:
    assert_same_bits(first(apply_masks(weight_model(), {"conv1": {"weight": MASK, "bias": None}})), MASKED)


# --- external data -------------------------------------------------------------------------------------------------


@pytest.fixture
def external(tmp_path: Path) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(WEIGHT, name) for name in ("a", "b")]
    onnx.save(model_of(*tensors), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return onnx.load(tmp_path / "m.onnx", load_external_data=False)


def test_only_masked_external_weights_are_read(external: onnx.ModelProto, tmp_path: Path) -> None:
    result = apply_masks(external, {"a": MASK}, base_dir=tmp_path)
    assert_same_bits(first(result), MASKED)
    assert [external_data_helper.uses_external_data(tensor) for tensor in result.graph.initializer] == [False, True]
    assert not result.graph.initializer[0].external_data
    assert not result.graph.initializer[1].HasField("raw_data")


def test_external_weights_need_the_folder(external: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match="mask 'a': the weight lies in an external file"):
        apply_masks(external, {"a": MASK})


def test_missing_external_file(external: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "m.data").unlink()
    with pytest.raises(InputError, match="mask 'a': cannot read the weight's external data"):
        apply_masks(external, {"a": MASK}, base_dir=tmp_path)


def test_truncated_external_file(external: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "m.data").write_bytes(b"\0" * 12)
    with pytest.raises(InputError, match=r"mask 'a': (cannot read|the weight of shape .* is stored incompletely)"):
        apply_masks(external, {"a": MASK}, base_dir=tmp_path)


# --- masks that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"conv1.wieght": MASK}, r"mask 'conv1\.wieght' matches no initializer; near names: 'conv1\.weight'"),
        ({"zzz": MASK}, "mask 'zzz' matches no initializer$"),
        ({"conv1.weight": MASK.T}, r"mask 'conv1\.weight' has shape \[3, 2\], its weight has \[2, 3\]"),
        ({"conv1.weight": MASK[:, 0]}, r"mask 'conv1\.weight' has shape \[2\]"),
        ({"conv1.weight": MASK * 0.5}, r"mask 'conv1\.weight' holds 0\.5; a mask holds only 0 and 1"),
        ({"conv1.weight": MASK - 1}, r"mask 'conv1\.weight' holds -1\.0;"),
        ({"conv1.weight": np.where(MASK, 1, np.nan)}, r"mask 'conv1\.weight' holds nan;"),
        ({"conv1.weight": np.full((2, 3), "1")}, r"mask 'conv1\.weight' holds 1; a mask holds only"),
        ({"conv1.weight": [[1, 0], [1]]}, r"mask 'conv1\.weight' is not an array"),
        ({"conv1": {"weight": MASK}, "conv1.weight": MASK}, r"mask 'conv1\.weight' is given twice"),
        ({"conv1": {"weight": {"deeper": MASK}}}, r"mask 'conv1\.weight' is a dictionary; masks go two levels deep"),
        ({7: MASK}, "mask names must be text, not 7"),
        ([MASK], "masks must be a dictionary of arrays by name, not a list"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(masks, message: str) -> None:
    with pytest.raises(MaskError, match=message) as caught:
        apply_masks(weight_model(), masks)
    assert "\n" not in str(caught.value)


def test_at_most_three_near_names() -> None:
    model = model_of(*(numpy_helper.from_array(WEIGHT, f"layer{i}.weight") for i in range(9)))
    with pytest.raises(MaskError) as caught:
        apply_masks(model, {"layer.weight": MASK})
    assert str(caught.value).count("'layer") == 1 + 3


def test_packed_types_are_refused() -> None:
    model = model_of(helper.make_tensor("w", TensorProto.INT4, [2], [1, 1]))
    with pytest.raises(MaskError, match="mask 'w': weights of type INT4 cannot be masked"):
        apply_masks(model, {"w": [0, 1]})


def test_constants_without_numbers_are_refused() -> None:
    model = model_of(nodes=[helper.make_node("Constant", [], ["c"], value_string="text")])
    with pytest.raises(MaskError, match=r"mask 'c' is for a constant without numbers \(value_string\)"):
        apply_masks(model, {"c": 0})


def test_a_weight_without_its_data_is_refused() -> None:
    model = model_of(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[3]))
    with pytest.raises(InputError, match=r"mask 'w': the weight of shape \[3\] .* is stored incompletely"):
        apply_masks(model, {"w": [0, 1, 1]})


# --- flatten_masks -------------------------------------------------------------------------------------------------


def test_flattening_joins_module_and_parameter_and_skips_none() -> None:
    flat = flatten_masks({"a.b": {"weight": [1], "bias": None}, "c.weight": [0], "": {"scale": [1]}, "d": None})
    assert {name: mask.tolist() for name, mask in flat.items()} == {"a.b.weight": [1], "c.weight": [0], "scale": [1]}


def test_tensors_become_arrays(torch) -> None:
    masks = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(2) > 0}
    flat = flatten_masks(masks)
    assert all(type(mask) is np.ndarray and mask.tolist() == [1, 1] for mask in flat.values())
    assert set(flat) == set("abc")


# --- load_masks ----------------------------------------------------------------------------------------------------


class Evil:
    """Unpickling this would create the file; reading masks must not."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def test_npz_round_trip(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "m.npz", **{"conv1.weight": MASK})
    masks = load_masks(tmp_path / "m.npz")
    assert_same_bits(masks["conv1.weight"], MASK)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pytorch_file_round_trip(torch, tmp_path: Path, legacy: bool) -> None:
    masks = {"conv1": {"weight": torch.tensor(MASK), "bias": None}}
    torch.save(masks, tmp_path / "m.PTH", _use_new_zipfile_serialization=not legacy)
    assert_same_bits(flatten_masks(load_masks(str(tmp_path / "m.PTH")))["conv1.weight"], MASK)


def test_safetensors_round_trip(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    safetensors.save_file({"conv1.weight": MASK}, tmp_path / "m.safetensors")
    assert_same_bits(load_masks(tmp_path / "m.safetensors")["conv1.weight"], MASK)


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".pkl"])
def test_pickled_objects_are_refused_and_not_run(tmp_path: Path, suffix: str) -> None:
    if suffix == ".pt":
        skip_without_torch()
    path, trace = tmp_path / f"m{suffix}", tmp_path / "trace"
    path.write_bytes(pickle.dumps({"w": Evil(trace)}, protocol=2))
    with pytest.raises(InputError, match=r"not plain tensors|unknown format '.pkl'") as caught:
        load_masks(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()


def test_an_object_array_in_an_npz_is_refused_and_not_run(tmp_path: Path) -> None:
    path, trace = tmp_path / "m.npz", tmp_path / "trace"
    np.savez(path, w=np.array([Evil(trace)], object))
    with pytest.raises(InputError, match="not plain tensors"):
        load_masks(path)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"junk" * 9, b"PK\x03\x04truncated"], ids=["empty", "junk", "truncated"])
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_broken_files_are_one_clear_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    if suffix == ".pt":
        skip_without_torch()
    (tmp_path / f"m{suffix}").write_bytes(content)
    with pytest.raises(InputError, match=r"mask file .*m\.\w+: broken, or not plain tensors") as caught:
        load_masks(tmp_path / f"m{suffix}")
    assert "\n" not in str(caught.value)


def test_other_unusable_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", MASK)
    (tmp_path / "a.npy").rename(tmp_path / "array.npz")
    with pytest.raises(InputError, match="holds a single array without a name"):
        load_masks(tmp_path / "array.npz")
    with pytest.raises(InputError, match=r"unknown format '\.txt'; use one of \.npz, \.pt, \.pth, \.safetensors"):
        load_masks(tmp_path / "m.txt")
    with pytest.raises(InputError, match="no such file"):
        load_masks(tmp_path / "missing.npz")


def test_a_list_in_a_pytorch_file_is_refused(torch, tmp_path: Path) -> None:
    torch.save([torch.ones(2)], tmp_path / "m.pt")
    with pytest.raises(InputError, match="holds a list, not a dictionary of masks"):
        load_masks(tmp_path / "m.pt")


@pytest.mark.parametrize(
    ("suffix", "module", "message"),
    [
        (".pt", "torch", r"needs PyTorch \(pip install 'onnxshrink\[torch\]'\)"),
        (".safetensors", "safetensors.numpy", "needs the package safetensors"),
    ],
)
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch, suffix: str, module: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / f"m{suffix}").write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        load_masks(tmp_path / f"m{suffix}")


def test_importing_masks_does_not_import_torch() -> None:
    code = "import sys, onnxshrink.masks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
