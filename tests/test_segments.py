"""Models that are run a few nodes at a time: the whole graph is computed, and what differs is found."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, draw
from onnx import TensorProto, helper, numpy_helper

import onnxshrink
from onnxshrink import segments
from onnxshrink.errors import InputError
from onnxshrink.inputs import PartError
from onnxshrink.runtime import Model, Session
from onnxshrink.segments import StreamedSession, cut, make_session
from onnxshrink.verify import OutputsDiffer, verify
from onnxshrink.weights import Values

CHAIN = """agraph (float[N, 8] x) => (float[N, 8] y, float[N, 16] b) {
  a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  d = Add(c, x)  e = MatMul(d, w1)  f = MatMul(e, w2)  y = Add(f, c)
}"""
# a body that reads a weight and a tensor from outside, a sequence that is handed on, and a shared constant
BRANCHES = """agraph (float[N, 8] x, bool flag) => (float[N, 8] y) {
  a = MatMul(x, w1)  b = MatMul(a, w2)
  c = If (flag) <then_branch = yes () => (float[N, 8] p) { q = MatMul(b, w3)  p = Add(q, x) },
                 else_branch = no () => (float[N, 8] r) { r = MatMul(b, w4) }>
  s = SequenceConstruct(c, b)
  d = MatMul(c, w3)
  t = SequenceAt(s, one)
  y = Add(d, t)
}"""
INPUT = draw(3, 8, seed=9)
BYTES = 8 * 16 * 4


def chain(**changed: Any) -> onnx.ModelProto:
    return build(CHAIN, **{"w1": draw(8, 16), "w2": draw(16, 8, seed=1)} | changed)


def branches() -> onnx.ModelProto:
    weights = {"w3": draw(8, 8, seed=2), "w4": draw(8, 8, seed=3), "one": np.array(1)}
    return build(BRANCHES, w1=draw(8, 16), w2=draw(16, 8, seed=1), **weights)


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every weight of the models here has a segment of its own, and every model is run in segments."""
    monkeypatch.setattr(segments, "_SEGMENT", BYTES)
    monkeypatch.setattr(segments, "_STREAMED", 0)


def opened(model: onnx.ModelProto, folder: Path, exposed: Sequence[str] = ()) -> StreamedSession:
    session = make_session(Model(model, "reference", folder / "work"), False, exposed)
    assert isinstance(session, StreamedSession)
    return session


# --- cutting -------------------------------------------------------------------------------------------------------


def operators(model: onnx.ModelProto, limit: int) -> list[list[str]]:
    return [[node.op_type for node in segment.nodes] for segment in cut(model, ["y", "b"], limit)]


def test_weights_of_a_segment_are_within_the_limit() -> None:
    assert operators(chain(), BYTES) == [["MatMul", "Relu"], ["MatMul", "Add"], ["MatMul"], ["MatMul", "Add"]]
    assert operators(chain(), 2 * BYTES) == [["MatMul", "Relu", "MatMul", "Add", "MatMul", "MatMul", "Add"]]
    larger_than_the_limit = operators(chain(), 1)  # what reads no weight does not begin another
    assert larger_than_the_limit == [["MatMul", "Relu"], ["MatMul", "Add"], ["MatMul"], ["MatMul", "Add"]]


def test_segments_hand_on_what_is_read_later_or_asked_for() -> None:
    found = cut(chain(), ["y", "b"], BYTES)
    assert [(s.inputs, s.outputs, sorted(s.weights)) for s in found] == [
        (["x"], ["b"], ["w1"]),
        (["b", "x"], ["c", "d"], ["w2"]),
        (["d"], ["e"], ["w1"]),
        (["c", "e"], ["y"], ["w2"]),
    ]


def test_what_a_body_reads_from_outside_is_read_by_its_node() -> None:
    (branch,) = [s for s in cut(branches(), ["y"], BYTES) if any(node.op_type == "If" for node in s.nodes)]
    assert {"w3", "w4"} <= branch.weights
    assert {"b", "flag", "x"} <= set(branch.inputs)


# --- running -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
def test_outputs_are_those_of_the_whole_model(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain(), path, save_as_external_data=external, size_threshold=0, location="weights.bin")
    session = make_session(Model(path, "reference", tmp_path / "work"), False, ["d"])
    assert isinstance(session, StreamedSession)
    whole = Session(Model(chain(), "reference", tmp_path / "other"), False, ["d"])
    feeds = [{"x": INPUT}, {"x": draw(5, 8, seed=7)}]
    for found, expected in zip(session.run_all(feeds), whole.run_all(feeds), strict=True):
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    assert session.names == whole.names == ["y", "b", "d"]
    assert session.types == whole.types == ["tensor(float)"] * 3


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("flag", [True, False])
def test_bodies_and_sequences_cross_segments(tmp_path: Path, flag: bool) -> None:
    feed = {"x": INPUT, "flag": np.array(flag)}
    (found,) = opened(branches(), tmp_path).run(feed)
    (expected,) = Session(Model(branches(), "reference", tmp_path / "other"), False).run(feed)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.usefixtures("small_segments")
def test_one_segment_at_a_time_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[Session] = weakref.WeakSet()
    counts, weights = [], []
    load = segments._Part.load

    def counted(part: Any, options: Any, exposed: Sequence[str]) -> Any:
        gc.collect()
        counts.append(len(alive))
        weights.append(sum(len(t.raw_data) for t in part.session.make(part.segment).graph.initializer))
        return load(part, options, exposed)

    class Watched(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            alive.add(self)

    monkeypatch.setattr(segments._Part, "load", counted)
    monkeypatch.setattr(segments, "Session", Watched)
    opened(chain(), tmp_path).run({"x": INPUT})
    assert counts == [0, 0, 0, 0]
    assert weights == [BYTES] * 4


@pytest.mark.usefixtures("small_segments")
def test_an_output_that_no_node_makes_is_run_as_a_whole(tmp_path: Path) -> None:
    model = build("agraph (float[N, 8] x) => (float[N, 16] y, float[16, 8] w2) { y = MatMul(x, w1) }", w1=draw(8, 16))
    model.graph.initializer.append(numpy_helper.from_array(draw(16, 8), "w2"))
    session = opened(model, tmp_path)
    outputs = session.run({"x": INPUT})
    np.testing.assert_allclose(outputs[0], INPUT @ draw(8, 16), rtol=1e-5)
    np.testing.assert_array_equal(outputs[1], draw(16, 8))
    assert session.types == ["tensor(float)", "tensor(float)"]


@pytest.mark.usefixtures("small_segments")
def test_a_sparse_weight_comes_with_the_node_that_reads_it(tmp_path: Path) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [2], [2.0, 3.0])
    places = helper.make_tensor("places", TensorProto.INT64, [2], [1, 7])
    model = build(
        "agraph (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w1) b = MatMul(a, w2) y = Mul(b, s) }",
        w1=draw(8, 16),
        w2=draw(16, 8),
    )
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [8]))
    (found,) = opened(model, tmp_path).run({"x": INPUT})
    expected = INPUT @ draw(8, 16) @ draw(16, 8) * np.array([0, 2, 0, 0, 0, 0, 0, 3], np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.usefixtures("small_segments")
def test_a_node_that_the_runtime_lacks_is_not_taken_for_a_bad_input(tmp_path: Path) -> None:
    model = chain()
    model.graph.node[2].op_type = "Nonsense"
    with pytest.raises(PartError, match="Nonsense"):
        opened(model, tmp_path).run({"x": INPUT})
    with pytest.raises(InputError, match=r"the reference model does not load in onnxruntime \(.*Nonsense"):
        verify(model, model)


# --- comparing -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_segments")
def test_equal_models_agree_and_a_changed_weight_does_not() -> None:
    same = verify(chain(), chain())
    assert (same.error, same.samples, same.outputs) == (0.0, 2, 2)
    wrong = draw(16, 8, seed=1)
    wrong[0, 0] += 1e-2
    with pytest.raises(OutputsDiffer, match=r"first tensor that diverges: 'c' of MatMul") as raised:
        verify(chain(), chain(w2=wrong))
    assert raised.value.divergence is not None
    assert raised.value.divergence.tensor == "c"


@pytest.mark.usefixtures("small_segments")
def test_a_wrong_result_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, output = tmp_path / "model.onnx", tmp_path / "out.onnx"
    dead = draw(8, 16)
    dead[:, ::2] = 0
    model = build("agraph (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w1) y = MatMul(a, w2) }")
    model.graph.initializer.extend(
        [numpy_helper.from_array(dead, "w1"), numpy_helper.from_array(draw(16, 8, seed=1), "w2")]
    )
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="weights.bin")
    cut_values = Values.cut

    def wrong(values: Any, kept: Any) -> Any:
        made = cut_values(values, kept)
        return Values.of(1.01 * made.array()) if made.shape == (8, 8) else made

    monkeypatch.setattr(Values, "cut", wrong)
    with pytest.raises(OutputsDiffer):
        onnxshrink.shrink(path, output=output, align="none")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]
    monkeypatch.setattr(Values, "cut", cut_values)
    result = onnxshrink.shrink(path, output=output, align="none")
    assert result.report.equivalence is not None
    assert result.report.equivalence.samples == 2
    assert result.report.after.parameters == 2 * 8 * 8
