"""The whole path in Python: what comes in, what goes out, and what is left alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import ROUNDING, build, check_same, dead, draw, shapes
from networks import NETWORKS, Network, chain, residual

import onnxshrink
from onnxshrink import DifferenceError, InputError, MaskError, OnnxshrinkError, OutputsDiffer, save, shrink
from onnxshrink import verify as compare
from onnxshrink.lazy import LazyModel
from onnxshrink.measure import parameters

engine: Any = __import__("sys").modules["onnxshrink.shrink"]  # the name in the package is the function
networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))

# `chain` whole: 4*3*9 + 4 + 2*4 + 2; without two of its four channels: 2*3*9 + 2 + 2*2 + 2.
WHOLE, SMALL = 122, 62


def stored(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    onnx.save(model, path)
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- properties of every model ----------------------------------------------------------------------------------


@networks
def test_result_is_smaller_valid_and_computes_the_same(network: Network) -> None:
    model = network(True)
    result = shrink(model)
    onnx.checker.check_model(result.model, full_check=True)
    assert parameters(result.model) < parameters(model)
    assert result.report.equivalence is not None
    assert result.report.equivalence.error <= ROUNDING


@networks
def test_shrinking_again_changes_nothing(network: Network) -> None:
    once = shrink(network(True)).model
    again = shrink(once)
    assert again.model.SerializeToString() == once.SerializeToString()
    assert not again.report.changed
    assert again.report.after == again.report.before


@networks
def test_without_zeros_the_result_equals_the_model(network: Network) -> None:
    model = network(False)
    result = shrink(model)
    assert result.model == model
    assert result.model is not model
    assert not result.report.changed
    assert result.report.equivalence is None


@networks
def test_the_given_model_is_never_changed(network: Network) -> None:
    model = network(True)
    before = model.SerializeToString()
    result = shrink(model)
    result.model.graph.node[0].name = "changed"
    assert model.SerializeToString() == before


@networks
def test_interface_stays(network: Network) -> None:
    model = network(True)
    small = shrink(model).model
    assert list(small.graph.input) == list(model.graph.input)
    assert list(small.graph.output) == list(model.graph.output)
    assert list(small.opset_import) == list(model.opset_import)


@networks
def test_more_zeros_never_give_a_larger_model(network: Network) -> None:
    model = network(True)
    before = parameters(shrink(model, verify=False).model)
    for tensor in model.graph.initializer:
        if len(tensor.dims) == 4 and tensor.dims[0] > 2:
            values = dead(onnx.numpy_helper.to_array(tensor), 0)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    assert parameters(shrink(model, verify=False).model) <= before


def test_shape_arithmetic_alone_is_no_reason_to_change_a_model() -> None:
    text = """g (float[2, 3, 4] x) => (float[2, 12] y) {
        s = Shape(x) n = Gather(s, first) l = Concat <axis = 0> (n, rest) f = Reshape(x, l) y = MatMul(f, w) }"""
    index = {"first": np.array([0], np.int64), "rest": np.array([12], np.int64)}
    model = build(text, w=draw(12, 12), **index)
    assert shrink(model).model == model


def test_metadata_and_doc_strings_stay() -> None:
    model = chain(True)
    model.producer_name, model.doc_string, model.graph.doc_string = "test", "model", "graph"
    model.metadata_props.add(key="author", value="someone")
    model.graph.metadata_props.add(key="part", value="all")
    node = model.graph.node[0]
    node.name, node.doc_string = "first", "node"
    node.metadata_props.add(key="module", value="stem")
    small = shrink(model).model
    assert (small.producer_name, small.doc_string, small.graph.doc_string) == ("test", "model", "graph")
    assert list(small.metadata_props) == list(model.metadata_props)
    assert list(small.graph.metadata_props) == list(model.graph.metadata_props)
    assert (small.graph.node[0].name, small.graph.node[0].doc_string) == ("first", "node")
    assert list(small.graph.node[0].metadata_props) == list(node.metadata_props)


# --- what can be given ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_text", [True, False])
def test_a_path_gives_what_its_model_gives(tmp_path: Path, as_text: bool) -> None:
    path = stored(chain(True), tmp_path)
    result = shrink(str(path) if as_text else path)
    assert result.model == shrink(chain(True)).model
    assert parameters(result.model) == SMALL


MASKS = {"w1": np.ones((4, 3, 3, 3)), "b1": np.array([1, 0, 1, 0])}
MASKS["w1"][[1, 3]] = 0


def test_masks_do_what_zeros_do() -> None:
    model = chain(False)
    before = model.SerializeToString()
    assert shrink(model, MASKS).model == shrink(chain(True)).model
    assert model.SerializeToString() == before


def test_masks_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "masks.npz", **MASKS)
    assert shrink(stored(chain(False), tmp_path), tmp_path / "masks.npz").model == shrink(chain(True)).model


def test_masks_that_remove_nothing_still_mask() -> None:
    mask = np.ones((4, 3, 3, 3), np.bool_)
    mask[0, 0, 0, 0] = False
    result = shrink(chain(False), {"w1": mask})
    assert not result.report.changed
    assert onnx.numpy_helper.to_array(result.model.graph.initializer[0])[0, 0, 0, 0] == 0


def test_masks_of_weights_in_external_files(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain(False), path, save_as_external_data=True, size_threshold=0)
    result = shrink(path, MASKS, output=tmp_path / "out.onnx")
    assert shapes(result.model) == shapes(shrink(chain(True)).model)
    assert compare(tmp_path / "out.onnx", shrink(chain(True)).model).error <= ROUNDING


def test_given_inputs_are_those_that_are_compared() -> None:
    with pytest.raises(InputError, match="x"):
        shrink(chain(True), inputs={"x": np.zeros((1, 3, 6, 7), np.float32)})
    result = shrink(chain(True), inputs={"x": np.zeros((1, 3, 6, 6), np.float32)})
    assert result.report.equivalence is not None
    assert result.report.equivalence.samples == 1


def test_progress_names_the_steps() -> None:
    steps: list[str] = []
    shrink(chain(True), progress=steps.append)
    assert steps == ["reading", "analysing", "cutting", "comparing", "writing"]


# --- writing ----------------------------------------------------------------------------------------------------


def test_output_is_the_model(tmp_path: Path) -> None:
    result = shrink(chain(True), output=tmp_path / "out.onnx", report=tmp_path / "out.json")
    assert onnx.load(tmp_path / "out.onnx") == result.model
    assert (tmp_path / "out.json").read_text() == result.report.to_json()
    assert files(tmp_path) == ["out.json", "out.onnx"]


def test_output_may_be_the_input(tmp_path: Path) -> None:
    path = stored(chain(True), tmp_path)
    path.chmod(0o640)
    shrink(path, output=path)
    assert parameters(onnx.load(path)) == SMALL
    assert path.stat().st_mode & 0o777 == 0o640
    assert files(tmp_path) == ["model.onnx"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path = stored(chain(True), tmp_path)
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    shrink(link, output=link)
    assert link.is_symlink()
    assert parameters(onnx.load(path)) == SMALL


def test_a_model_without_zeros_is_written_as_it_was(tmp_path: Path) -> None:
    path = stored(chain(False), tmp_path)
    shrink(path, output=tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def test_save_writes_later(tmp_path: Path) -> None:
    result = shrink(chain(True))
    result.save(tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == result.model


@pytest.mark.parametrize("network", [chain, residual])
@pytest.mark.parametrize("pruned", [True, False])
def test_external_data_stays_external(tmp_path: Path, network: Network, pruned: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(save, "_INLINE", 1)
    path = tmp_path / "in" / "model.onnx"
    path.parent.mkdir()
    onnx.save(network(pruned), path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "out").mkdir()
    output = tmp_path / "out" / "small.onnx"
    result = shrink(path, output=output)
    assert files(output.parent) == ["small.onnx", "small.onnx.data"]
    light = onnx.load(output, load_external_data=False)
    large = [t for t in light.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert len(large) == len(light.graph.initializer)
    offsets = [int(next(e.value for e in t.external_data if e.key == "offset")) for t in large]
    assert all(offset % 4096 == 0 for offset in offsets)
    onnx.checker.check_model(output, full_check=True)
    assert compare(network(pruned), output).error <= ROUNDING
    assert parameters(onnx.load(output)) == parameters(result.model)
    check_same(network(pruned), result.model, x=draw(2, 3, 6, 6))


def test_external_data_in_place_leaves_no_stale_file(tmp_path: Path) -> None:
    text = "g (float[N, 40] x) => (float[N, 40] y) { y = MatMul(x, w) }"
    model, path = build(text, w=draw(40, 40)), tmp_path / "model.onnx"
    onnx.save(
        build(text, w=draw(40, 40)), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    for _ in range(3):
        shrink(path, {"w": np.ones((40, 40))}, output=path)
        assert compare(model, path).error <= ROUNDING
        assert len(files(tmp_path)) == 2


def test_data_that_the_input_needs_is_not_removed(tmp_path: Path) -> None:
    model = build("g (float[N, 40] x) => (float[N, 40] y) { y = MatMul(x, w) }", w=draw(40, 40))
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    onnx.save(model, second, save_as_external_data=True, location="b.onnx.data", size_threshold=0)
    first.write_bytes(second.read_bytes())  # both models refer to b.onnx.data
    shrink(first, output=second)
    assert compare(first, second).error == 0


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"align": "most"}, "align 'most'"),
        ({"align": 0}, "align 0"),
        ({"output": "no/such/folder/out.onnx"}, r"output no/such/folder/out.onnx: the folder .* does not exist"),
        ({"report": "no/such/folder/out.json"}, "report no/such/folder/out.json: the folder"),
        ({"output": "."}, "is a folder"),
        ({"output": "/dev/null"}, "not a regular file"),
        ({"samples": 0}, "samples"),
        ({"masks": "masks.csv"}, "unknown format"),
        ({"inputs": {"z": np.zeros(1)}}, "'z'"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        shrink(chain(True), **options)
    assert not files(tmp_path)


def test_targets_are_checked_before_any_work(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "open_source", pytest.fail)
    with pytest.raises(InputError, match="does not exist"):
        shrink(chain(True), output=tmp_path / "missing" / "out.onnx")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(InputError, match="does not exist"):
        shrink(chain(True), output=file / "out.onnx")
    monkeypatch.setattr(os, "access", lambda *given: False)
    with pytest.raises(InputError, match="not writable"):
        shrink(chain(True), output=tmp_path / "out.onnx")


def test_nothing_that_was_given_is_overwritten_by_accident(tmp_path: Path) -> None:
    path, masks = stored(chain(False), tmp_path), tmp_path / "masks.npz"
    np.savez(masks, **MASKS)
    with pytest.raises(InputError, match="overwrite the masks"):
        shrink(path, masks, output=masks)
    with pytest.raises(InputError, match="overwrite the model"):
        shrink(path, report=path)
    with pytest.raises(InputError, match="overwrite the masks"):
        shrink(path, masks, report=masks)
    with pytest.raises(InputError, match="overwrite the output"):
        shrink(path, output=tmp_path / "out", report=tmp_path / "out")


def test_a_mask_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="'w7'"):
        shrink(chain(True), {"w7": np.ones(1)}, output=tmp_path / "out.onnx")
    assert not files(tmp_path)


# --- when something goes wrong ----------------------------------------------------------------------------------


def broken_apply(*given: Any) -> LazyModel:
    """The result with one weight moved: what a wrong rule would do."""
    model = real_apply(*given).whole()
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name == "w1"]
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += 1
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w1"))
    return LazyModel(model)


real_apply = engine.apply


def test_a_result_that_differs_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "apply", broken_apply)
    output = tmp_path / "out.onnx"
    output.write_text("as it was")
    with pytest.raises(OutputsDiffer, match="first tensor that diverges: 'a' of Conv") as raised:
        shrink(chain(True), output=output, report=tmp_path / "report.json")
    assert isinstance(raised.value, DifferenceError)
    assert raised.value.exit_code == 3
    assert output.read_text() == "as it was"
    assert files(tmp_path) == ["out.onnx"]


def test_without_verification_nobody_looks(monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "apply", broken_apply)
    result = shrink(chain(True), verify=False)
    assert result.report.equivalence is None


@pytest.mark.parametrize("broken", ["op_type", "input"])
def test_an_invalid_result_is_an_internal_error(monkeypatch: Any, tmp_path: Path, broken: str) -> None:
    def invalid(*given: Any) -> LazyModel:
        model = real_apply(*given).whole()
        if broken == "op_type":
            model.graph.node[0].op_type = "Nonsense"
        else:
            model.graph.node[0].input[0] = "nonsense"
        return LazyModel(model)

    monkeypatch.setattr(engine, "apply", invalid)
    with pytest.raises(OnnxshrinkError, match="fault of onnxshrink") as raised:
        shrink(chain(True), output=tmp_path / "out.onnx")
    assert not isinstance(raised.value, InputError)
    assert raised.value.exit_code == 4
    assert not files(tmp_path)


def test_a_result_that_does_not_load_is_an_internal_error(monkeypatch: Any) -> None:
    def unloadable(*given: Any) -> LazyModel:
        model = real_apply(*given).whole()
        model.opset_import.add(domain="com.acme", version=1)
        model.graph.node[1].domain = "com.acme"
        return LazyModel(model)

    monkeypatch.setattr(engine, "apply", unloadable)
    with pytest.raises(OnnxshrinkError, match="onnxruntime does not take the result") as raised:
        shrink(chain(True))
    assert raised.value.exit_code == 4


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("external", [True, False])
def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: Any, failure: BaseException, external: bool
) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(residual(True), path, save_as_external_data=external, location="model.onnx.data", size_threshold=0)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}

    def fail(source: object, target: object) -> None:
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(failure, OSError) else None):
        shrink(path, output=path)
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_data_file_without_its_model_does_not_stay(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(residual(True), path, save_as_external_data=True, location="weights", size_threshold=0)
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if not str(target).endswith(".data"):
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(save, "_INLINE", 1)
    with pytest.raises(InputError, match="Input/output error"):
        shrink(path, output=tmp_path / "out.onnx")
    assert files(tmp_path) == ["model.onnx", "weights"]


def test_a_model_that_the_checker_faults_in_part_is_still_shrunk() -> None:
    """A wrong value_info is no obstacle for onnxruntime's users, and shrinking does not make it worse."""
    model = chain(True)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, ["N", 4, 5, 4]))
    with pytest.raises(onnx.shape_inference.InferenceError):
        onnx.checker.check_model(model, full_check=True)
    assert parameters(shrink(model, verify=False).model) <= WHOLE


def test_models_beyond_the_limit_of_one_file_get_external_data(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(save, "LARGEST", 0)
    monkeypatch.setattr(save, "_INLINE", 1)
    result = shrink(chain(True), output=tmp_path / "out.onnx")
    assert files(tmp_path) == ["out.onnx", "out.onnx.data"]
    assert onnxshrink.verify(result.model, tmp_path / "out.onnx").error == 0


def test_an_operator_that_the_checker_calls_deprecated() -> None:
    """GroupNormalization of opset 18: runtimes run it, and the checker's word against the input is none against us."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(0.2, 1, (6, 3, 3, 3)).astype(np.float32)
    rows[[2, 3]] = 0
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[N, 3, 6, 6] x) => (float[N, 2, 4, 4] y) {
      a = Conv(x, w1) n = GroupNormalization <num_groups = 3> (a, g, h) y = Conv(n, w2) }"""
    proto = onnx.parser.parse_model(text)
    weights = {"w1": rows, "g": np.ones(3), "h": np.full(3, 0.5), "w2": rng.uniform(0.2, 1, (2, 6, 1, 1))}
    for name, values in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    report = onnxshrink.shrink(proto).report
    assert (report.before.parameters, report.after.parameters) == (162 + 6 + 12, 108 + 4 + 8 + 2)
