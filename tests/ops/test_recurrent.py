"""LSTM, GRU, RNN: which hidden units leave, and with what."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from models import check_same, dead, draw, parameters, shapes, shrunk, weight
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, BATCH, FEATURES, UNITS = 5, 2, 3, 4


def rows(values: Array, gates: int, *units: int) -> Array:
    """A copy with the rows of some units zero in every gate: `[d, gates * units, ...]`."""
    values = values.copy()
    grid = values.reshape(values.shape[0], gates, -1, *values.shape[2:])
    grid[:, :, list(units)] = 0
    return values


def layer(op: str, directions: int = 1, features: int = FEATURES, units: int = UNITS) -> dict[str, Array]:
    """Weights without a zero."""
    gates = GATES[op]
    return {
        "w": draw(directions, gates * units, features),
        "r": draw(directions, gates * units, units, seed=1),
        "b": draw(directions, 2 * gates * units, seed=2),
    }


def silenced(op: str, *units: int, directions: int = 1) -> dict[str, Array]:
    """Weights of a layer some of whose units have zero rows."""
    found = layer(op, directions)
    gates = {"w": GATES[op], "r": GATES[op], "b": 2 * GATES[op]}
    return {name: rows(value, gates[name], *units) for name, value in found.items()}


def model(
    op: str,
    weights: dict[str, Array],
    *,
    inputs: str = "x w r b",
    head: Array | None = None,
    dims: tuple[Any, Any] = (STEPS, BATCH),
    before: list[onnx.NodeProto] | None = None,
    given: dict[str, tuple[Any, ...]] | None = None,
    outputs: str = "y",
    **attributes: Any,
) -> onnx.ModelProto:
    """A recurrent layer, its steps multiplied by `head`, `[units, k]`; `_` stands for an omitted operand."""
    units = weights["r"].shape[2]
    names = ["" if name == "_" else name for name in inputs.split()]
    made = ["" if name == "_" else name for name in outputs.split()]
    nodes = [*(before or []), helper.make_node(op, names, made, name="layer", hidden_size=units, **attributes)]
    results = made
    if head is not None:
        nodes.append(helper.make_node("MatMul", [made[0], "head"], ["z"]))
        weights, results = {**weights, "head": head}, ["z", *made[1:]]
    features = weights["w"].shape[2] if before is None else FEATURES
    entries = [("x", (*dims, features)), *(given or {}).items()]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in entries]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in results if name]
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "g", values, ends, tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    inferred = onnx.shape_inference.infer_shapes(proto)
    onnx.checker.check_model(inferred)
    return inferred


def hidden_size(small: onnx.ModelProto) -> int:
    (node,) = [node for node in small.graph.node if node.name == "layer"]
    return next(attribute.i for attribute in node.attribute if attribute.name == "hidden_size")


X = draw(STEPS, BATCH, FEATURES, seed=7)


# --- units that are zero at every step --------------------------------------------------------------------------


@pytest.mark.parametrize("op", GATES)
def test_units_with_zero_rows_leave_every_gate(op: str) -> None:
    big = model(op, silenced(op, 1, 3), head=draw(UNITS, 2))
    small = shrunk(big)
    g = GATES[op]
    assert shapes(small) == {"w": (1, g * 2, 3), "r": (1, g * 2, 2), "b": (1, 2 * g * 2), "head": (2, 2)}
    assert hidden_size(small) == 2
    expected = layer(op)["w"].reshape(g, UNITS, FEATURES)[:, [0, 2]].reshape(g * 2, FEATURES)
    np.testing.assert_array_equal(weight(small, "w")[0], expected)
    expected = layer(op)["r"].reshape(g, UNITS, UNITS)[:, [0, 2]][:, :, [0, 2]].reshape(g * 2, 2)
    np.testing.assert_array_equal(weight(small, "r")[0], expected)
    check_same(big, small, x=X)


def test_a_zero_candidate_is_enough_in_an_lstm() -> None:
    """c = f * 0 + i * tanh(0) = 0 and h = o * tanh(0) = 0, whatever the other gates are."""
    weights = layer("LSTM")
    for name, gates in (("w", 4), ("r", 4), ("b", 8)):
        grid = weights[name].reshape(gates, UNITS, -1)
        grid[[3] if gates == 4 else [3, 7], 2] = 0
    big = model("LSTM", weights, head=draw(UNITS, 2))
    small = shrunk(big)
    assert hidden_size(small) == 3
    check_same(big, small, x=X)


def test_silence_spreads_only_where_it_is_whole() -> None:
    """Unit 0 reads nothing but unit 1, and unit 1 nothing but unit 0: both are zero. Unit 2 reads unit 3: it is not."""
    weights = silenced("RNN", 0, 1, 2)
    weights["r"][0, 0, 1] = weights["r"][0, 1, 0] = 0.7
    weights["r"][0, 2, 3] = 0.7
    big = model("RNN", weights, head=draw(UNITS, 2))
    small = shrunk(big)
    assert hidden_size(small) == 2
    check_same(big, small, x=X)


def test_opposite_biases_cancel() -> None:
    weights = silenced("GRU", 1)
    weights["b"].reshape(6, UNITS)[[2, 5], 1] = 0.5, -0.5
    assert hidden_size(shrunk(model("GRU", weights, head=draw(UNITS, 2)))) == 3
    # With the reset gate between them they do not.
    assert hidden_size(shrunk(model("GRU", weights, head=draw(UNITS, 2), linear_before_reset=1))) == 4


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
def test_a_bias_alone_keeps_a_gated_unit(op: str) -> None:
    """Its state moves from step to step, so that no constant stands for it."""
    weights = silenced(op, 1)
    weights["b"] = layer(op)["b"]
    big = model(op, weights, head=draw(UNITS, 2))
    small = shrunk(big)
    assert shapes(small) == shapes(big)


@pytest.mark.parametrize(
    ("op", "activations", "left"),
    [
        ("RNN", ["Relu"], 3),
        ("RNN", ["Softsign"], 3),
        ("RNN", ["Sigmoid"], 4),
        ("GRU", ["Sigmoid", "Softplus"], 4),
        ("LSTM", ["Relu", "Relu", "Softsign"], 3),
        ("LSTM", ["Sigmoid", "Tanh", "Sigmoid"], 4),
        ("LSTM", ["Sigmoid", "Sigmoid", "Tanh"], 4),
    ],
)
def test_an_activation_must_keep_zero(op: str, activations: list[str], left: int) -> None:
    big = model(op, silenced(op, 1), head=draw(UNITS, 2), activations=activations)
    small = shrunk(big)
    assert hidden_size(small) == left
    check_same(big, small, x=0.1 * X)


@pytest.mark.parametrize("op", GATES)
def test_clipping_and_coupled_gates_change_nothing(op: str) -> None:
    extra = {"input_forget": 1} if op == "LSTM" else {}
    big = model(op, silenced(op, 0), head=draw(UNITS, 2), clip=0.4, **extra)
    small = shrunk(big)
    assert hidden_size(small) == 3
    check_same(big, small, x=X)


def test_peepholes_are_sliced() -> None:
    weights = {**silenced("LSTM", 1), "p": draw(1, 3 * UNITS, seed=5)}
    big = model("LSTM", weights, inputs="x w r b _ _ _ p", head=draw(UNITS, 2))
    small = shrunk(big)
    expected = weights["p"].reshape(3, UNITS)[:, [0, 2, 3]].reshape(1, 9)
    np.testing.assert_array_equal(weight(small, "p"), expected)
    check_same(big, small, x=X)


# --- states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", GATES)
def test_constant_states_are_sliced(op: str) -> None:
    states = {"h0": dead(draw(1, BATCH, UNITS, seed=3), 1, axis=2), "c0": dead(draw(1, BATCH, UNITS), 1, axis=2)}
    names = "x w r b _ h0 c0" if op == "LSTM" else "x w r b _ h0"
    weights = {**silenced(op, 1), **{name: value for name, value in states.items() if name in names}}
    big = model(op, weights, inputs=names, head=draw(UNITS, 2))
    small = shrunk(big)
    assert shapes(small)["h0"] == (1, BATCH, 3)
    check_same(big, small, x=X)


@pytest.mark.parametrize("state", ["h0", "c0"])
def test_a_state_other_than_zero_keeps_its_unit(state: str) -> None:
    zero = np.zeros((1, BATCH, UNITS), np.float32)
    weights = {**silenced("LSTM", 1, 2), "h0": zero, "c0": zero.copy()}
    weights[state][0, 1, 2] = 0.3
    big = model("LSTM", weights, inputs="x w r b _ h0 c0", head=draw(UNITS, 2))
    small = shrunk(big)
    assert hidden_size(small) == 3
    check_same(big, small, x=X)


def test_a_state_that_is_an_input_of_the_model_keeps_every_unit() -> None:
    given = {"h0": (1, BATCH, UNITS)}
    big = model("GRU", silenced("GRU", 1), inputs="x w r b _ h0", head=draw(UNITS, 2), given=given)
    small = shrunk(big)
    assert shapes(small) == shapes(big)


def test_last_states_lose_the_same_units() -> None:
    weights = {**silenced("LSTM", 1), "k": draw(UNITS, 2), "l": draw(UNITS, 2)}
    big = model("LSTM", weights, outputs="_ h c")
    big.graph.node.extend([helper.make_node("MatMul", [a, b], [a + b]) for a, b in (("h", "k"), ("c", "l"))])
    del big.graph.output[:]
    big.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, BATCH, 2)) for n in ("hk", "cl"))
    small = shrunk(big)
    assert shapes(small)["k"] == shapes(small)["l"] == (3, 2)
    check_same(big, small, x=X)


def test_states_that_are_outputs_of_the_model_keep_every_unit() -> None:
    big = model("LSTM", silenced("LSTM", 1), head=draw(UNITS, 2), outputs="y h")
    assert shapes(shrunk(big)) == shapes(big)


def test_steps_beyond_a_length_are_zero_and_so_are_silent_units() -> None:
    weights = {**silenced("GRU", 1), "lengths": np.array([3, 5], np.int32)}
    big = model("GRU", weights, inputs="x w r b lengths", head=draw(UNITS, 2))
    small = shrunk(big)
    assert hidden_size(small) == 3
    check_same(big, small, x=X)


# --- units that nothing reads -----------------------------------------------------------------------------------


def test_a_unit_that_nothing_reads_leaves() -> None:
    weights = layer("LSTM")
    weights["r"] = dead(weights["r"], 2, axis=2)
    big = model("LSTM", weights, head=dead(draw(UNITS, 2), 2))
    small = shrunk(big)
    assert hidden_size(small) == 3
    check_same(big, small, x=X)


def test_a_unit_that_only_its_layer_reads_stays() -> None:
    big = model("LSTM", layer("LSTM"), head=dead(draw(UNITS, 2), 2))
    assert hidden_size(shrunk(big)) == 4


def test_a_unit_that_only_itself_reads_leaves() -> None:
    weights = layer("GRU")
    own = weights["r"].reshape(3, UNITS, UNITS)[:, 2, 2].copy()
    weights["r"] = dead(weights["r"], 2, axis=2)
    weights["r"].reshape(3, UNITS, UNITS)[:, 2, 2] = own
    big = model("GRU", weights, head=dead(draw(UNITS, 2), 2))
    small = shrunk(big)
    assert hidden_size(small) == 3
    check_same(big, small, x=X)


# --- the input --------------------------------------------------------------------------------------------------


def embedded(op: str, weights: dict[str, Array], table: Array, bias: Array) -> onnx.ModelProto:
    before = [helper.make_node("MatMul", ["x", "table"], ["e0"]), helper.make_node("Add", ["e0", "bias"], ["e"])]
    names = "e w r b" if "b" in weights else "e w r"
    return model(op, {**weights, "table": table, "bias": bias}, inputs=names, before=before, head=draw(UNITS, 2))


@pytest.mark.parametrize("op", GATES)
def test_a_zero_feature_leaves(op: str) -> None:
    weights = layer(op, features=5)
    big = embedded(op, weights, dead(draw(FEATURES, 5), 1, 4, axis=1), dead(draw(5), 1, 4))
    small = shrunk(big)
    assert shapes(small)["w"] == (1, GATES[op] * UNITS, 3)
    assert shapes(small)["table"] == (FEATURES, 3)
    np.testing.assert_array_equal(weight(small, "b"), weights["b"])
    check_same(big, small, x=X)


@pytest.mark.parametrize("op", GATES)
def test_constant_features_are_folded_in_the_biases(op: str) -> None:
    weights, bias = layer(op, features=5), draw(5, seed=4)
    big = embedded(op, weights, dead(draw(FEATURES, 5), 1, axis=1), bias)
    small = shrunk(big)
    count = GATES[op] * UNITS
    assert shapes(small)["w"] == (1, count, 4)
    expected = weights["b"][0].copy()
    expected[:count] += weights["w"][0, :, 1] * bias[1]
    np.testing.assert_allclose(weight(small, "b")[0], expected, rtol=1e-5)
    check_same(big, small, x=X)


@pytest.mark.parametrize("op", GATES)
def test_biases_are_made_where_that_pays(op: str) -> None:
    """They hold two numbers per gate and unit, a feature's column one."""
    weights = layer(op, features=5)
    del weights["b"]
    count = GATES[op] * UNITS
    big = embedded(op, weights, dead(draw(FEATURES, 5), 1, axis=1), draw(5, seed=4))
    assert shapes(shrunk(big)) == shapes(big)
    big = embedded(op, weights, dead(draw(FEATURES, 5), 1, 2, 4, axis=1), draw(5, seed=4))
    small = shrunk(big)
    assert shapes(small)["w"] == (1, count, 2)
    (name,) = [node.input[3] for node in small.graph.node if node.name == "layer"]
    expected = weights["w"][0][:, [1, 2, 4]] @ draw(5, seed=4)[[1, 2, 4]]
    np.testing.assert_allclose(weight(small, name)[0, :count], expected, rtol=1e-5)
    assert not weight(small, name)[0, count:].any()
    check_same(big, small, x=X)


def test_a_feature_that_no_live_unit_reads_leaves() -> None:
    weights = layer("GRU", features=5)
    weights["w"] = dead(weights["w"], 0, 3, axis=2)
    big = embedded("GRU", weights, draw(FEATURES, 5), draw(5))
    small = shrunk(big)
    assert shapes(small)["table"] == (FEATURES, 3)
    check_same(big, small, x=X)


def test_a_steady_unit_is_folded_in_what_follows() -> None:
    """Without gates, a unit that reads nothing holds tanh of its bias; others read it, so its own weights stay."""
    weights = silenced("RNN", 1)
    weights["b"][0, [1, UNITS + 1]] = 0.3, 0.2
    big = model("RNN", weights, head=draw(UNITS, 2))
    check_same(big, shrunk(big), x=X)
    assert hidden_size(shrunk(big)) == 4
    weights["r"] = dead(weights["r"], 1, axis=2)
    big = model("RNN", weights, head=draw(UNITS, 2))
    small = shrunk(big)
    assert hidden_size(small) == 3
    (added,) = [value for name, value in shapes(small).items() if name not in ("w", "r", "b", "head")]
    assert added == (2,)
    check_same(big, small, x=X)


# --- directions -------------------------------------------------------------------------------------------------


def two_way(op: str, forward: list[int], backward: list[int]) -> dict[str, Array]:
    """Weights of a bidirectional layer, each direction with silent units of its own."""
    one, other = silenced(op, *forward, directions=2), silenced(op, *backward, directions=2)
    return {name: np.concatenate([one[name][:1], other[name][1:]]) for name in one}


def joined(op: str, weights: dict[str, Array], **attributes: Any) -> onnx.ModelProto:
    """Both directions side by side, as PyTorch has them, then a product."""
    big = model(
        op,
        {**weights, "shape": np.array([0, 0, -1]), "head": draw(2 * UNITS, 2)},
        direction="bidirectional",
        **attributes,
    )
    del big.graph.output[:]
    big.graph.node.extend(
        [
            helper.make_node("Transpose", ["y"], ["s"], perm=[0, 2, 1, 3]),
            helper.make_node("Reshape", ["s", "shape"], ["j"]),
            helper.make_node("MatMul", ["j", "head"], ["z"]),
        ]
    )
    big.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, (STEPS, BATCH, 2)))
    return big


@pytest.mark.parametrize("op", GATES)
def test_units_silent_in_both_directions_leave(op: str) -> None:
    big = joined(op, two_way(op, [0, 1], [1, 2]))
    small = shrunk(big)
    assert shapes(small)["r"] == (2, GATES[op] * 3, 3)
    assert shapes(small)["head"] == (6, 2)
    check_same(big, small, x=X)


@pytest.mark.parametrize(("silent", "left"), [(0, b"reverse"), (1, b"forward")])
@pytest.mark.parametrize("op", GATES)
def test_a_silent_direction_leaves_whole(op: str, silent: int, left: bytes) -> None:
    everything = list(range(UNITS))
    weights = two_way(op, everything, [2]) if silent == 0 else two_way(op, [2], everything)
    names = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}[op]
    big = joined(op, weights, activations=names * 2)
    small = shrunk(big)
    assert shapes(small)["r"] == (1, GATES[op] * 3, 3)
    assert shapes(small)["head"] == (3, 2)
    node = small.graph.node[0]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes["direction"] == left
    assert attributes["activations"] == [name.encode() for name in names]
    check_same(big, small, x=X)


def test_a_direction_with_parameters_of_its_activations_stays() -> None:
    weights = two_way("RNN", [0, 1, 2, 3], [2])
    big = joined("RNN", weights, activations=["LeakyRelu", "LeakyRelu"], activation_alpha=[0.1, 0.2])
    small = shrunk(big)
    assert shapes(small)["r"] == (2, 3, 3)
    check_same(big, small, x=X)


# --- layouts, refusals, exports ---------------------------------------------------------------------------------


@pytest.mark.parametrize("op", GATES)
def test_batch_first(op: str) -> None:
    """onnxruntime has no such kernel; the reference has."""
    big = model(op, silenced(op, 1), head=draw(UNITS, 2), dims=(BATCH, STEPS), layout=1)
    small = shrunk(big)
    assert hidden_size(small) == 3
    assert shapes(small)["head"] == (3, 2)
    from onnx.reference import ReferenceEvaluator

    feed = {"x": draw(BATCH, STEPS, FEATURES)}
    before, after = (ReferenceEvaluator(m).run(None, feed)[0] for m in (big, small))
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_computed_weights_are_kept_whole() -> None:
    from onnxshrink.analyse import analyse
    from onnxshrink.graph import Graph

    weights = silenced("GRU", 1)
    shape = weights.pop("w").shape
    big = model("GRU", {**weights, "w": draw(*shape)}, given={"v": shape}, head=draw(UNITS, 2))
    (node,) = [node for node in big.graph.node if node.name == "layer"]
    node.input[1] = "v"
    reasons = [refusal.reason for refusal in analyse(Graph(big)).refusals]
    assert reasons == ["its weights are computed"]
    small = shrunk(big)
    assert shapes(small)["r"] == (1, 12, 4)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3)])
def test_exported_layers(kind: str, gates: int, free: bool) -> None:
    """Two stacked bidirectional layers of 8 units, 3 of them silent; parameters as of 5 units."""
    torch = pytest.importorskip("torch")

    class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.rnn = getattr(torch.nn, kind)(4, 8, num_layers=2, bidirectional=True, batch_first=True)
            self.out = torch.nn.Linear(16, 3)

        def forward(self, x: Any) -> Any:
            return self.out(self.rnn(x)[0])

    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        for name, value in net.rnn.named_parameters():
            value.view(gates, 8, *value.shape[1:])[:, [1, 4, 6]] = 0
            assert name
    import io
    import warnings

    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {"x": {0: "batch", 1: "steps"}} if free else None
        torch.onnx.export(net, (torch.randn(2, 6, 4),), stream, input_names=["x"], dynamic_axes=axes, dynamo=False)
    big = onnx.load_from_string(stream.getvalue())
    small = shrunk(big)
    layers = 2 * gates * 5 * (4 + 5 + 2) + 2 * gates * 5 * (10 + 5 + 2)
    states = parameters(small) - layers - (10 * 3 + 3)
    assert states == (0 if free else {"LSTM": 2, "GRU": 1}[kind] * 2 * (2 * 2 * 5))
    check_same(big, small, x=draw(2, 6, 4))
    if free:
        check_same(big, small, x=draw(3, 9, 4))
