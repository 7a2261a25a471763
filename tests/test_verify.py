"""Equal models pass with small figures; every kind of difference raises, says how large it is and where it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxshrink import runtime, save
from onnxshrink.errors import DifferenceError, InputError
from onnxshrink.verify import Divergence, Equivalence, OutputsDiffer, amplification, verify

# the package's `verify` is the function
module = sys.modules["onnxshrink.verify"]

HEADER = '<ir_version: 9, opset_import: ["" : 18, "nobody" : 1]>'
NETWORK = """(float[N, 8] x) => (float[N, 4] y) {
    [first] h = MatMul(x, w1)
    [act] a = Relu(h)
    [second] y = MatMul(a, w2)
}"""


def model(text: str = NETWORK, **constants: Any) -> onnx.ModelProto:
    built = parser.parse_model(f"{HEADER} agraph {text}")
    built.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return built


def weights(hidden: int = 16, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {
        "w1": rng.standard_normal((8, hidden)).astype(dtype),
        "w2": rng.standard_normal((hidden, 4)).astype(dtype),
    }


def nudged(name: str, by: float = 1e-3) -> onnx.ModelProto:
    changed = weights()
    changed[name][0, 0] += by
    return model(**changed)


def halved() -> tuple[onnx.ModelProto, onnx.ModelProto, np.ndarray]:
    """A network with dead hidden units, the same without them, and the units that it keeps."""
    big, keep = weights(), np.arange(16) % 2 == 0
    big["w1"][:, ~keep] = 0
    small = {"w1": big["w1"][:, keep], "w2": big["w2"][keep]}
    return model(**big), model(**small), keep


def differs(*args: Any, **kwargs: Any) -> OutputsDiffer:
    with pytest.raises(OutputsDiffer) as raised:
        verify(*args, **kwargs)
    assert isinstance(raised.value, DifferenceError)
    assert raised.value.exit_code == 3
    assert "\n" not in str(raised.value)
    return raised.value


def unusable(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as raised:
        verify(*args, **kwargs)
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)
    return str(raised.value)


# ------------------------------------------------------------------------------------------------------ same function


def test_a_model_equals_itself_exactly() -> None:
    result = verify(model(**weights()), model(**weights()), samples=3)
    assert result == Equivalence(0.0, 0.0, 0.0, 0.0, samples=3, outputs=1, limit=1e-5)


def test_a_shrunk_model_agrees_within_rounding() -> None:
    big, small, _ = halved()
    before = big.SerializeToString(), small.SerializeToString()
    result = verify(big, small)
    assert result.error < 1e-6 < result.limit == 1e-5
    assert result.multiple == pytest.approx(result.error / 1e-5)
    assert (big.SerializeToString(), small.SerializeToString()) == before


def test_given_inputs_are_used_once() -> None:
    x = np.eye(8, dtype=np.float32)
    # The weight that differs meets only zeros in these inputs.
    x[0, 0] = 0
    assert verify(model(**weights()), nudged("w1", 1.0), inputs={"x": x}).samples == 1
    x[0, 0] = 1
    differs(model(**weights()), nudged("w1", 1.0), inputs={"x": x})


@pytest.mark.parametrize(("kind", "limit"), [(np.float16, 1e-2), (np.float32, 1e-5), (np.float64, 1e-10)])
def test_floors_by_type(kind: Any, limit: float) -> None:
    name = {"float16": "float16", "float32": "float", "float64": "double"}[np.dtype(kind).name]
    text = NETWORK.replace("float", name)
    assert verify(model(text, **weights(dtype=kind)), model(text, **weights(dtype=kind))).limit == limit
    changed = weights(dtype=kind)
    changed["w2"] *= kind(1 + 20 * limit)
    assert differs(model(text, **weights(dtype=kind)), model(text, **changed)).equivalence.error == pytest.approx(
        20 * limit, rel=0.3
    )


def test_bfloat16() -> None:
    text = "(bfloat16[N, 8] x) => (bfloat16[N, 8] y) { h = Cast<to = 1>(x) k = Mul(h, s) y = Cast<to = 16>(k) }"
    result = verify(model(text, s=np.float32(1)), model(text, s=np.float32(1.001)))
    assert result.limit == 5e-2
    assert result.error < 0.01
    assert differs(model(text, s=np.float32(1)), model(text, s=np.float32(1.5))).equivalence.error == pytest.approx(0.5)


def test_doubles_made_of_floats_have_the_bound_of_floats() -> None:
    text = "(float[N, 8] x) => (double[N, 8] y) { h = Mul(x, s) y = Cast<to = 11>(h) }"
    assert verify(model(text, s=np.float32(1)), model(text, s=np.float32(1 + 1e-6))).limit == 1e-5


def test_noise_widens_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the reference moves by 3e-5 of its range when it is not optimised, 2e-4 is within ten times that.
    real = module._reference_noise
    monkeypatch.setattr(
        module,
        "_reference_noise",
        lambda *args: [[a * np.float32(1 + 3e-5) for a in outputs] for outputs in real(*args)],
    )
    text = "(float[N] x) => (float[N] y) { y = Mul(x, s) }"
    result = verify(model(text, s=np.float32(1)), model(text, s=np.float32(1 + 2e-4)))
    assert result.noise == pytest.approx(3e-5, rel=0.01)
    assert result.limit == pytest.approx(3e-4, rel=0.01)
    assert result.multiple == pytest.approx(2 / 0.3, rel=0.01)
    error = differs(model(text, s=np.float32(1)), model(text, s=np.float32(1 + 4e-4)))
    assert error.equivalence.error == pytest.approx(4e-4, rel=0.01)


@pytest.mark.parametrize(("offset", "noise", "limit"), [(3e3, 5e-5, 5e-4), (3e7, 0.5, 0.1)])
def test_noise_is_measured_without_optimisations(offset: float, noise: float, limit: float) -> None:
    # Unoptimised, the offset is added and subtracted again, and rounds the values; optimised, it is folded away.
    text = (
        "(float[1, 1, 9, 99] x) => (float[1, 1, 9, 99] y) { h = Conv(x, w, b) y = BatchNormalization(h, g, z, b, g) }"
    )
    one = np.ones(1, np.float32)
    constants = {"w": one.reshape(1, 1, 1, 1), "b": np.float32(offset) * one, "g": one, "z": 0 * one}
    result = verify(model(text, **constants), model(text, **constants))
    assert result.error == 0
    assert noise / 3 < result.noise < noise * 3
    assert result.limit == pytest.approx(limit, rel=2)
    assert result.limit == pytest.approx(min(10 * result.noise, 0.1)), "however noisy, a tenth of the range is too much"
    error = differs(model(text, **constants), model(text, **{**constants, "g": np.float32(1.5) * one}))
    assert error.equivalence.noise == result.noise


def test_absolute_and_relative_figures() -> None:
    text = "(float[4] x) => (float[4] y) { y = Add(x, s) }"
    x = np.array([-8, 1, 2, 4], np.float32)
    error = differs(model(text, s=np.float32(0)), model(text, s=np.float32(2)), inputs={"x": x})
    assert (error.equivalence.absolute, error.equivalence.error) == (2.0, 0.25)
    zero = differs(model(text, s=np.float32(0)), model(text, s=np.float32(2)), inputs={"x": 0 * x})
    assert (zero.equivalence.absolute, zero.equivalence.error) == (2.0, 2.0)


# ------------------------------------------------------------------------------------------------ different functions


@pytest.mark.parametrize(("name", "tensor", "node"), [("w1", "h", "MatMul first"), ("w2", "y", "MatMul second")])
def test_a_nudged_weight_is_named(name: str, tensor: str, node: str) -> None:
    error = differs(model(**weights()), nudged(name))
    found = error.divergence
    assert (found.tensor, found.node) == (tensor, node)
    assert 1e-5 < found.error < 1e-2
    assert error.equivalence.limit == 1e-5 < error.equivalence.error < 1e-2
    assert str(error) == (
        f"output 'y' differs: by {error.equivalence.error:.2e} of the range (limit 1.00e-05, the reference's own noise "
        f"0.00e+00); first tensor that diverges: '{tensor}' of {node}, by {found.error:.2e}"
    )


def test_a_nudge_below_the_limit_passes() -> None:
    assert 0 < verify(model(**weights()), nudged("w1", 2e-6)).error < 1e-5


def test_shrunk_tensors_are_compared_where_they_were_kept() -> None:
    big, small, keep = halved()
    wrong = onnx.ModelProto.FromString(small.SerializeToString())
    changed = numpy_helper.to_array(wrong.graph.initializer[0]).copy()
    changed[0, 0] += 0.01
    wrong.graph.initializer[0].CopyFrom(numpy_helper.from_array(changed, "w1"))
    assert differs(big, wrong).divergence.tensor == "y", "without the kept indices only equal shapes can be compared"
    for indices in (keep, np.flatnonzero(keep)):
        assert differs(big, wrong, kept={"h": [None, indices]}).divergence.tensor == "h"


def test_divergence_is_found_behind_many_tensors_and_beside_unusable_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 4)
    lines = [f"[n{i}] t{i + 1} = Mul(t{i}, s{i})" for i in range(20)]
    text = (
        f"(float[N] t0, bool c) => (float[N] y) {{ {' '.join(lines)} q = SequenceConstruct(t20, t0) "
        "e = SequenceAt(q, zero) shape = Shape(e) r = Reshape(e, shape) "
        "y = If(c) <then_branch = g () => (float[N] a) { inner = Neg(r) a = Neg(inner) }, "
        "else_branch = h () => (float[N] b) { b = Identity(r) }> }"
    )
    scales = {f"s{i}": np.float32(1) for i in range(20)}
    error = differs(model(text, zero=0, **scales), model(text, zero=0, **{**scales, "s13": np.float32(1.1)}))
    assert error.divergence == Divergence("t14", pytest.approx(0.1, rel=1e-4), 0.0, "Mul n13")


def test_shapes_and_constants_are_no_divergence() -> None:
    text = (
        "(float[4] x) => (float[2, 2] y) { c = Constant<value = float {2.0}>() k = Identity(shape) "
        "h = Reshape(x, k) g = Neg(h) y = Mul(g, c) }"
    )
    changed = model(text.replace("2.0", "3.0"), shape=[-1, 2])
    assert differs(model(text, shape=[2, 2]), changed).divergence.tensor == "y"


def test_the_search_uses_the_inputs_that_differ() -> None:
    # Only the larger of the two sizes reaches beyond position 8.
    text = (
        "(float[N] x) => (float[N] y) { head = Slice(x, zero, nine) tail = Slice(x, nine, end) "
        "scaled = Mul(tail, s) y = Concat<axis = 0>(head, scaled) }"
    )
    constants = {"zero": [0], "nine": [9], "end": [999]}
    a, b = (model(text, s=np.float32(s), **constants) for s in (1, 2))
    assert verify(a, b, samples=1).error == 0
    assert differs(a, b).divergence.tensor == "scaled"


def test_tensors_that_cannot_be_outputs_do_not_hide_others(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runtime.Model.load

    def load(self: Any, options: Any, exposed: list[str]) -> Any:
        if "t3" in exposed:
            raise RuntimeError("t3 cannot be an output")
        return real(self, options, exposed)

    monkeypatch.setattr(runtime.Model, "load", load)
    text = f"(float[N] t0) => (float[N] t9) {{ {' '.join(f't{i + 1} = Mul(t{i}, s{i})' for i in range(9))} }}"
    scales = {f"s{i}": np.float32(1) for i in range(9)}
    for changed, first in ((1, "t2"), (2, "t4"), (6, "t7")):
        other = model(text, **{**scales, f"s{changed}": np.float32(2)})
        assert differs(model(text, **scales), other).divergence.tensor == first


def test_without_common_tensors_the_output_is_named() -> None:
    a = model("(float[N] x) => (float[N] y) { [n] y = Mul(x, s) }", s=np.float32(1))
    b = model("(float[N] x) => (float[N] y) { h = Mul(x, s) [m] y = Mul(h, s) }", s=np.float32(2))
    assert differs(a, b).divergence == Divergence("y", 3.0, 0.0, "Mul m")


@pytest.mark.parametrize("kind", ["int64", "bool", "string"])
def test_other_types_must_be_equal(kind: str) -> None:
    text = f"(float[40] x, {kind}[40] i) => ({kind}[40] y, float[40] z) {{ y = Identity(i) z = Neg(x) }}"
    swap = "head = Slice(i, a, b) tail = Slice(i, b, c) y = Concat<axis = 0>(tail, head)"
    swapped = text.replace("y = Identity(i)", swap)
    assert verify(model(text), model(text)).error == 0
    error = differs(model(text), model(swapped, a=[0], b=[20], c=[40]))
    assert 0.2 < error.equivalence.error <= 1
    assert error.equivalence.limit == 0


def test_integers_differ_by_the_share_of_their_elements() -> None:
    text = "(int64[40] i) => (int64[40] y) { y = Min(i, most) }"
    given = {"i": np.arange(40)}
    error = differs(model(text, most=[99]), model(text, most=[29]), inputs=given)
    assert (error.equivalence.error, error.equivalence.absolute) == (0.25, 10)
    assert verify(model(text, most=[99]), model(text, most=[39]), inputs=given).error == 0


def test_integers_chosen_by_comparing_floats_are_measured_against_their_noise() -> None:
    arg = "(float[400, 5] x) => (int64[400, 1] y) { h = Mul(x, s) y = ArgMax<axis = 1>(h) }"
    assert verify(model(arg, s=np.float32(1)), model(arg, s=np.float32(2))).error == 0
    error = differs(model(arg, s=np.float32(1)), model(arg, s=np.float32(-1)))
    assert error.equivalence.limit == 0
    assert error.equivalence.error > 0.9


@pytest.mark.parametrize(
    ("x", "scale", "equal"),
    [
        ([np.nan, np.inf, -np.inf, 1], 1.0, True),
        ([np.nan, 1, 2, 4], 2.0, False),
        ([np.inf, 0, 0, 0], -1.0, False),
        ([1, 1, 2, 4], np.inf, False),
        ([1, 1, 2, 4], np.nan, False),
        ([np.inf, np.inf, np.inf, np.inf], np.nan, False),
    ],
)
def test_values_that_are_not_finite(x: list[float], scale: float, equal: bool) -> None:
    text = "(float[4] x) => (float[4] y) { y = Mul(x, s) }"
    given = {"x": np.array(x, np.float32)}
    one, other = model(text, s=np.float32(1)), model(text, s=np.float32(scale))
    if equal:
        assert verify(one, other, inputs=given).error == 0
    else:
        differs(one, other, inputs=given)


def test_a_new_nan_is_explained() -> None:
    text = "(float[4] x) => (float[4] y) { y = Mul(x, s) }"
    error = differs(model(text, s=np.float32(1)), model(text, s=np.float32(np.nan)))
    assert "output 'y' differs: infinite or NaN at other positions (limit 1.00e-05" in str(error)


def test_shapes_that_the_interface_leaves_open() -> None:
    text = "(float[6] x) => (float[N] y) { y = Slice(x, zero, end) }"
    error = differs(model(text, zero=[0], end=[4]), model(text, zero=[0], end=[3]))
    assert "output 'y' differs: float32[4] became float32[3]" in str(error)
    assert verify(model(text, zero=[0], end=[0]), model(text, zero=[0], end=[0])).error == 0, "no elements at all"


def test_sequences_and_absent_optionals() -> None:
    text = (
        "(float[6] x) => (seq(float[6]) y, optional(float[6]) o) "
        "{ h = Mul(x, s) y = SequenceConstruct(x, h) o = Optional<type = float[6]>() }"
    )
    assert verify(model(text, s=np.float32(1)), model(text, s=np.float32(1))).outputs == 2
    assert differs(model(text, s=np.float32(1)), model(text, s=np.float32(3))).equivalence.error == pytest.approx(2)


def test_the_type_nearest_its_limit_gives_the_figures() -> None:
    text = "(float[6] x, float16[6] h) => (float[6] y, float16[6] z) { y = Mul(x, s) z = Mul(h, t) }"
    one = {"s": np.float32(1), "t": np.float16(1)}
    result = verify(model(text, **one), model(text, **{**one, "s": np.float32(1 + 5e-6), "t": np.float16(1 + 2e-3)}))
    assert (result.limit, result.outputs) == (1e-5, 2)
    assert result.error == pytest.approx(5e-6, rel=0.1)
    error = differs(model(text, **one), model(text, **{**one, "s": np.float32(1 + 5e-6), "t": np.float16(1.05)}))
    assert error.equivalence.limit == 1e-2
    assert "output 'z'" in str(error)


INTERFACES = {
    "name": ("(float[N] z) => (float[N] y) { y = Neg(z) }", "input 'x' float[N] became 'z' float[N]"),
    "type": ("(double[N] x) => (float[N] y) { y = Cast<to = 1>(x) }", "input 'x' float[N] became 'x' double[N]"),
    "extent": ("(float[3] x) => (float[N] y) { y = Neg(x) }", "input 'x' float[N] became 'x' float[3]"),
    "symbol": ("(float[N] x) => (float[M] y) { y = Neg(x) }", "output 'y' float[N] became 'y' float[M]"),
    "sequence": (
        "(float[N] x) => (seq(float[N]) y) { y = SequenceConstruct(x) }",
        "output 'y' float[N] became 'y' sequence of float[N]",
    ),
    "more": (
        "(float[N] x) => (float[N] y, float[N] z) { y = Neg(x) z = Neg(x) }",
        "output nothing became 'z' float[N]",
    ),
}


@pytest.mark.parametrize(("text", "message"), INTERFACES.values(), ids=INTERFACES)
def test_interfaces_must_be_the_same(text: str, message: str) -> None:
    error = differs(model("(float[N] x) => (float[N] y) { y = Neg(x) }"), model(text))
    assert str(error) == f"the interface differs: {message}"
    assert error.equivalence is None
    assert error.divergence is None


def test_initializers_that_are_inputs_may_shrink() -> None:
    text = (
        "(float[N, 8] x, float[8, HIDDEN] w1, float[HIDDEN, 4] w2) => (float[N, 4] y) "
        "{ h = MatMul(x, w1) y = MatMul(h, w2) }"
    )
    big = weights()
    big["w1"][:, 8:] = 0
    small = {"w1": big["w1"][:, :8], "w2": big["w2"][:8]}
    assert verify(model(text.replace("HIDDEN", "16"), **big), model(text.replace("HIDDEN", "8"), **small)).error < 1e-6


def test_a_candidate_that_does_not_run() -> None:
    text = "(float[N, 8] x) => (float[M, K] y) { h = Identity(x) y = Reshape(h, shape) }"
    error = differs(model(text, shape=[-1, 4]), model(text, shape=[7919, 6101]))
    assert str(error).startswith("the candidate model does not run where the reference does: Non-zero status code")
    assert error.equivalence is None


# ------------------------------------------------------------------------------------------------------ models, inputs


def test_paths_and_models_mix(tmp_path: Path) -> None:
    onnx.save(model(**weights()), tmp_path / "a.onnx")
    assert verify(tmp_path / "a.onnx", str(tmp_path / "a.onnx")).error == 0
    assert verify(tmp_path / "a.onnx", model(**weights())).error == 0
    assert differs(tmp_path / "a.onnx", nudged("w1")).divergence.tensor == "h"


def test_external_data_is_found_beside_the_model(tmp_path: Path) -> None:
    for name, built in (("a", model(**weights(hidden=2000))), ("b", model(**weights(hidden=2000)))):
        (tmp_path / name).mkdir()
        if name == "b":
            built.graph.initializer[0].raw_data = np.ones((8, 2000), np.float32).tobytes()
        onnx.save(built, tmp_path / name / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    first, second = tmp_path / "a" / "m.onnx", tmp_path / "b" / "m.onnx"
    assert verify(first, first).error == 0
    assert differs(first, second).divergence.tensor == "h"


def test_a_model_too_large_for_one_message_is_spilled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "LARGEST", 100)
    monkeypatch.setattr(save, "LARGEST", 100)
    one = model(**weights())
    before = one.SerializeToString()
    assert verify(one, model(**weights())).error == 0
    assert differs(one, nudged("w1")).divergence.tensor == "h"
    assert one.SerializeToString() == before


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    good = model(**weights())
    missing, junk, short = tmp_path / "no.onnx", tmp_path / "junk.onnx", tmp_path / "short.onnx"
    junk.write_bytes(b"hello world, this is no model")
    short.write_bytes(good.SerializeToString()[:-40])
    assert unusable(missing, good) == f"the reference model '{missing}' cannot be read: No such file or directory"
    assert unusable(good, junk) == f"the candidate model '{junk}' is not an ONNX file, or is cut short"
    assert unusable(short, good) == f"the reference model '{short}' is not an ONNX file, or is cut short"


def test_operators_that_the_runtime_lacks() -> None:
    text = "(float[N] x) => (float[N] y) { y = nobody.Magic(x) }"
    message = unusable(model(text), model(text))
    assert message.startswith("the reference model does not load in onnxruntime (Fatal error: nobody:Magic")
    assert message.endswith("; where the runtime lacks an operator, use --no-verify")
    message = unusable(model("(float[N] x) => (float[N] y) { y = Neg(x) }"), model(text))
    assert message.startswith("the candidate model does not load in onnxruntime (Fatal error: nobody:Magic")
    assert "--no-verify" not in message


def test_inputs_that_cannot_be_used() -> None:
    pair = model(**weights()), model(**weights())
    assert unusable(*pair, inputs={"q": np.ones(2)}) == "the model has no input 'q'; its inputs are: x"
    assert unusable(*pair, inputs={"x": np.ones((2, 8))}) == "input 'x' is float64, the model wants float32"
    assert unusable(*pair, samples=0) == "samples must be at least 1, not 0"


def test_given_inputs_that_do_not_run() -> None:
    text = "(float[N, 8] x, float[M, 8] z) => (float[N, 8] y) { y = Add(x, z) }"
    given = {"x": np.ones((2, 8), np.float32), "z": np.ones((3, 8), np.float32)}
    message = unusable(model(text), model(text), inputs=given)
    assert message.startswith("the reference model does not run on the given inputs: Non-zero status code")


def test_sizes_are_found_by_trying() -> None:
    text = "(float[N, S] x) => (float[N, K] y) { h = Reshape(x, shape) y = Flatten(h) }"
    assert verify(model(text, shape=[0, 64, -1]), model(text, shape=[0, 64, -1])).samples == 2
    impossible = model(text, shape=[7919, 6101])
    assert "pass --input x=FILE.npy (onnxruntime: Non-zero status code" in unusable(impossible, impossible)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    missing = model("(float[N] x) => (float[N] y) { y = nobody.Magic(x) }")
    unusable(missing, missing)
    text = "(float[N, S] x) => (float[N, K] y) { h = Reshape(x, shape) y = Flatten(h) }"
    unusable(model(text, shape=[7919, 6101]), model(text, shape=[7919, 6101]))
    differs(model(**weights()), nudged("w1"))
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ amplification


def test_a_plain_network_moves_as_little_as_its_inputs() -> None:
    # One unit in the last place is at most 1.2e-7 of an element; the outputs are sums of 8 and 16 such.
    assert 0 < amplification(model(**weights())) < 1e-6


def test_a_fast_wave_amplifies() -> None:
    text = "(float[N, 8] x) => (float[N, 8] y) { a = Mul(x, s) y = Sin(a) }"
    # The last bit of an element between 1 and 2, 1.2e-7, times 1000; a little less or more where the element is.
    assert 2e-5 < amplification(model(text, s=np.float32(1000)), samples=4) < 1e-3


def test_inputs_that_are_integers_do_not_move() -> None:
    text = "(int64[N] i) => (float[N, 4] y) { y = Gather(t, i) }"
    assert amplification(model(text, t=weights()["w2"])) == 0
