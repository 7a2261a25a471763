"""Drawn inputs are valid: indices below their table, masks with no empty row, one size per symbol, sizes that run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from onnxshrink.errors import InputError
from onnxshrink.inputs import RunError, draw_runnable, fixed_sizes
from onnxshrink.roles import Input, describe


def model(text: str, **constants: Any) -> onnx.ModelProto:
    built = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]> agraph {text}')
    built.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items())
    return built


def draws(built: onnx.ModelProto, samples: int = 2, seed: int = 0, **given: Any) -> list[dict[str, Any]]:
    return [feed for feed, _ in draw_runnable(describe(built), given, lambda feed: [], samples, seed)]


TABLE = np.zeros((37, 4), np.float32)
INDEXED = {
    "gather": ("(int64[N, 9] i) => (float[N, 9, 4] y) { y = Gather(t, i) }", 37),
    "gather axis": ("(int64[400] i) => (float[37, 400] y) { y = Gather<axis = 1>(t, i) }", 4),
    "last axis": ("(int64[400] i) => (float[37, 400] y) { y = Gather<axis = -1>(t, i) }", 4),
    "cast": ("(int32[400] i) => (float[400, 4] y) { j = Cast<to = 7>(i) y = Gather(t, j) }", 37),
    "float": ("(float[400] i) => (float[400, 4] y) { j = Cast<to = 7>(i) y = Gather(t, j) }", 37),
    "reshape": ("(int64[20, 20] i) => (float[400, 4] y) { j = Reshape(i, flat) k = Identity(j) y = Gather(t, k) }", 37),
    "unsqueeze": ("(int64[400] i) => (float[1, 400, 4] y) { j = Unsqueeze(i, zero) y = Gather(t, j) }", 37),
    "offset": ("(int64[400] i) => (float[400, 4] y) { j = Add(i, two) y = Gather(t, j) }", 35),
    "elements": ("(int64[400, 4] i) => (float[400, 4] y) { y = GatherElements(t, i) }", 37),
    "tuples": ("(int64[400, 2] i) => (float[400] y) { y = GatherND(t, i) }", 4),
    "one hot": ("(int64[400] i) => (float[400, D] y) { y = OneHot(i, depth, values) }", 21),
    "computed table": ("(int64[400] i) => (float[400, 37] y) { u = Transpose(t) y = Gather(u, i) }", 4),
    "smallest table": ("(int64[400] i) => (float[400, 4] y) { a = Gather(t, i) b = Gather(s, i) y = Add(a, b) }", 11),
    "input table": ("(float[5, 6] x, int64[400] i) => (float[400, 6] y) { y = Gather(x, i) }", 5),
    "constant": ("(int64[400] i) => (float[400] y) { u = Constant<value = float[3] {1, 2, 3}>() y = Gather(u, i) }", 3),
    "in a branch": (
        "(bool c, int64[400] i) => (float[400, 4] y) { y = If(c) <then_branch = g () => (float[400, 4] a) "
        "{ a = Gather(t, i) }, else_branch = h () => (float[400, 4] b) { b = Gather(s, i) }> }",
        11,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "bound"), INDEXED.values(), ids=INDEXED)
def test_indices_stay_below_the_extent_they_index(text: str, bound: int) -> None:
    built = model(
        text, t=TABLE, s=TABLE[:11], flat=[-1], zero=[0], two=2, depth=21, values=np.array([0, 1], np.float32)
    )
    (item,) = [item for item in describe(built) if item.name == "i"]
    assert (item.kind, item.bound) == ("index", bound)
    values = np.concatenate([feed["i"].ravel() for feed in draws(built, samples=20)])
    assert set(values.tolist()) == set(range(bound)), "every index, and no other, is drawn"


def test_a_table_in_a_function_is_found() -> None:
    built = parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 18, "local" : 1]> agraph (int64[400] i) => (float[400, 4] y)'
        ' { y = local.embed(i, t) } <opset_import: ["" : 18], domain: "local"> embed (a, b) => (c) { c = Gather(b, a) }'
    )
    built.graph.initializer.append(numpy_helper.from_array(TABLE, "t"))
    assert describe(built)[0].bound == 37


def test_an_index_into_a_free_dimension_stays_below_the_size_that_is_drawn() -> None:
    built = model("(float[N, 3] x, int64[400] i) => (float[400, 3] y) { y = Gather(x, i) }")
    for feed in draws(built):
        assert feed["i"].max() == feed["x"].shape[0] - 1


@pytest.mark.parametrize("kind", ["int64", "int32", "bool", "float", "float16"])
def test_mask_rows_are_left_aligned_and_at_least_half_ones(kind: str) -> None:
    built = model(f"({kind}[50, 9] attention_mask) => ({kind}[50, 9] y) {{ y = Identity(attention_mask) }}")
    mask = draws(built)[0]["attention_mask"].astype(int)
    assert mask.dtype == int
    assert set(mask.ravel().tolist()) == {0, 1}
    assert (np.diff(mask, axis=1) <= 0).all(), "ones come first"
    assert mask[:, :5].all(), "no row has fewer than half ones"
    assert len(set(mask.sum(axis=1).tolist())) > 1, "rows differ"


def test_masks_of_one_element_and_of_none_are_ones() -> None:
    built = model(
        "(int64[3, 1] mask, bool mask_all) => (int64[3, 1] y, bool z) { y = Identity(mask) z = Identity(mask_all) }"
    )
    feed = draws(built)[0]
    assert feed["mask"].tolist() == [[1], [1], [1]]
    assert feed["mask_all"].shape == ()
    assert bool(feed["mask_all"])


def test_a_mask_that_is_an_index_is_drawn_as_an_index() -> None:
    built = model("(int64[400] masked_positions) => (float[400, 4] y) { y = Gather(t, masked_positions) }", t=TABLE)
    assert draws(built)[0]["masked_positions"].max() == 36


def test_a_scalar_takes_the_value_that_the_model_asks_for() -> None:
    built = model("(int64 sr) => (bool y) { y = Equal(sr, rate) }", rate=16000)
    assert draws(built)[0]["sr"] == 16000
    assert draws(built)[0]["sr"].shape == ()


def test_a_table_to_compare_with_gives_the_values() -> None:
    built = model("(int32[2, 200, 1] i) => (bool[2, 200, 5] y) { y = Equal(i, classes) }", classes=np.int32([3, 5, 7]))
    assert set(draws(built)[0]["i"].ravel().tolist()) == {3, 5, 7}


def test_other_types() -> None:
    built = model(
        "(int64[500] n, bool[500] b, float[500] x, float[500] p, float16[500] h, double[500] d, uint8[1, 3, 20, 20] u,"
        " string[50] s, bfloat16[500] f) => (int64[500] m, float[500] q) { m = Identity(n) q = Log(p) }"
    )
    feed = draws(built)[0]
    assert set(feed["n"].tolist()) == set(range(10))
    assert set(feed["b"].tolist()) == {False, True}
    assert {k: str(v.dtype) for k, v in feed.items()} == {
        "n": "int64", "b": "bool", "x": "float32", "p": "float32", "h": "float16", "d": "float64", "u": "uint8",
        "s": "object", "f": "float32",
    }  # fmt: skip
    assert feed["x"].std() == pytest.approx(1, abs=0.1)
    assert feed["x"].min() < 0 < feed["p"].min()
    assert feed["u"].max() > 250
    assert set(feed["s"].tolist()) == {"a", "b", "c"}


SIZED = {
    "image": ("float[N, 3, H, W] x", [(2, 3, 64, 96), (3, 3, 96, 128)]),
    "channels last": ("float[N, A, B, 3] x", [(2, 64, 96, 3), (3, 96, 128, 3)]),
    "square": ("float[1, 1, S, S] x", [(1, 1, 64, 64), (1, 1, 96, 96)]),
    "tokens": ("int64[N, S] x", [(2, 7), (3, 12)]),
    "named": ("float[sequence, batch_size, 8] x", [(7, 2, 8), (12, 3, 8)]),
    "vector": ("float[N] x", [(7,), (12,)]),
    "fixed": ("float[4, 5] x", [(4, 5), (4, 5)]),
    "zero": ("float[0, 5] x", [(0, 5), (0, 5)]),
    "scalar": ("float x", [(), ()]),
}


@pytest.mark.parametrize(("text", "shapes"), SIZED.values(), ids=SIZED)
def test_free_dimensions_get_two_sizes(text: str, shapes: list[tuple[int, ...]]) -> None:
    built = model(f"({text}) => (float y) {{ y = Identity(x) }}")
    assert [feed["x"].shape for feed in draws(built)] == shapes


def test_anonymous_dimensions_are_sized_by_position() -> None:
    built = model("(float[N, 3] x) => (float y) { y = Identity(x) }")
    built.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    assert [feed["x"].shape for feed in draws(built)] == [(2, 3), (3, 3)]


def test_one_symbol_has_one_size_and_sums_add_up() -> None:
    built = model("(int64[B, S] i, float[S, 3] x, float[B, P] c, float[B, T] m) => (float y) { y = Identity(x) }")
    built.graph.input[3].type.tensor_type.shape.dim[1].dim_param = "P + S"
    for feed in draws(built):
        batch, extent = feed["i"].shape
        assert feed["x"].shape[0] == extent
        assert feed["c"].shape[0] == batch
        assert feed["m"].shape == (batch, feed["c"].shape[1] + extent)


def test_given_inputs_stay_and_decide_the_sizes_of_the_others() -> None:
    built = model("(float[B, S] x, float[B, S] z) => (float y) { y = Identity(x) }")
    given = np.ones((5, 6), np.float32)
    for feed in draws(built, x=given):
        assert feed["x"] is given
        assert feed["z"].shape == (5, 6)


BAD = {
    "name": ({"q": np.ones(2)}, "the model has no input 'q'; its inputs are: x, z"),
    "type": ({"x": np.ones((2, 3))}, "input 'x' is float64, the model wants float32"),
    "rank": ({"x": np.ones(3, np.float32)}, "input 'x' has shape [3], the model wants [B, 3]"),
    "extent": ({"x": np.ones((2, 4), np.float32)}, "input 'x' has shape [2, 4], the model wants [B, 3]"),
    "symbol": (
        {"x": np.ones((2, 3), np.float32), "z": np.ones(4, np.float32)},
        "input 'z' has shape [4], the model wants [B]",
    ),
}


@pytest.mark.parametrize(("given", "message"), BAD.values(), ids=BAD)
def test_given_inputs_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    built = model("(float[B, 3] x, float[B] z) => (float y) { y = Identity(x) }")
    with pytest.raises(InputError) as raised:
        fixed_sizes(describe(built), given)
    assert str(raised.value) == message


def test_initializers_that_are_inputs_are_not_drawn() -> None:
    built = model("(float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }", w=np.ones(2, np.float32))
    assert [item.name for item in describe(built)] == ["x"]


def test_stripped_weights_still_bound_indices() -> None:
    built = model("(int64[400] i) => (float[400, 4] y) { y = Gather(t, i) }")
    built.graph.initializer.add(name="t", dims=[5000, 4], data_type=onnx.TensorProto.FLOAT)
    assert describe(built)[0].bound == 5000


def test_other_sizes_are_tried_until_the_model_runs() -> None:
    built = model("(float[N, 3, H, W] x) => (float y) { y = Identity(x) }")

    def run(feed: dict[str, Any]) -> list[Any]:
        if feed["x"].shape[2:] != (224, 224):
            raise RunError(f"window {feed['x'].shape[2:]}")
        return [feed["x"].shape]

    results = draw_runnable(describe(built), {}, run, 2, 0)
    assert [outputs for _, outputs in results] == [[(2, 3, 224, 224)], [(3, 3, 224, 224)]]
    assert not np.array_equal(results[0][0]["x"], results[1][0]["x"][:2])


def test_smaller_integers_are_tried_where_their_role_is_unknown() -> None:
    built = model("(int64[40] i) => (int64[40] y) { y = Neg(i) }")

    def run(feed: dict[str, Any]) -> list[Any]:
        if feed["i"].max() > 1:
            raise RunError("too large")
        return []

    assert draw_runnable(describe(built), {}, run, 1, 0)[0][0]["i"].max() == 1
    table = model("(int64[40] i) => (float[40, 4] y) { y = Gather(t, i) }", t=TABLE)
    assert draw_runnable(describe(table), {}, run, 1, 0)[0][0]["i"].max() == 1


def test_an_error_tells_what_to_pass_and_what_the_runtime_said() -> None:
    built = model("(float[N] x, int64[3] i) => (float y) { y = Identity(x) }")
    tried = []

    def run(feed: dict[str, Any]) -> list[Any]:
        tried.append((feed["x"].shape, feed["i"].max()))
        raise RunError(f"attempt {len(tried)}")

    with pytest.raises(InputError) as raised:
        draw_runnable(describe(built), {}, run, 2, 0)
    assert str(raised.value) == (
        "no random input runs through the reference model; pass --input x=FILE.npy --input i=FILE.npy "
        "(onnxruntime: attempt 1)"
    )
    assert {shape[0] for shape, _ in tried} >= {7, 64, 96, 128, 256, 320, 1, 16000}


def test_a_model_of_fixed_floats_is_tried_once() -> None:
    built = model("(float[4] x) => (float[4] y) { y = Neg(x) }")
    tried = []

    def run(feed: dict[str, Any]) -> list[Any]:
        tried.append(feed)
        raise RunError("no")

    with pytest.raises(InputError, match="onnxruntime: no"):
        draw_runnable(describe(built), {}, run, 1, 0)
    assert len(tried) == 1


def test_seeds_repeat_and_differ() -> None:
    built = model("(float[50] x) => (float[50] y) { y = Neg(x) }")
    first, again, other = (draws(built, seed=seed)[0]["x"] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sequences_are_drawn_and_unknown_ranks_are_refused() -> None:
    built = model("(seq(float[N, 3]) q) => (float y) { y = ConcatFromSequence<axis = 0>(q) }")
    assert [a.shape for a in draws(built)[0]["q"]] == [(2, 3), (2, 3)]
    unknown = Input("x", onnx.TensorProto.FLOAT, None)
    with pytest.raises(InputError, match=r"input 'x' has no known rank: give it with --input x=FILE\.npy"):
        draw_runnable([unknown], {}, lambda feed: [], 1, 0)


def test_a_state_between_fixed_extents_has_the_batch_of_the_data_where_nothing_else_runs() -> None:
    """A recurrent layer's state is layers by batch by units, and its dimensions may have no names."""
    inputs = describe(model("(float[A, B] x, float[2, C, 8] h) => (float y) { y = Identity(x) }"))
    seen = []

    def run(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        seen.append(feed["h"].shape)
        if feed["h"].shape[1] != feed["x"].shape[0] or feed["x"].shape[1] < 100:
            raise RunError("another batch")
        return [feed["x"]]

    feeds = [feed for feed, _ in draw_runnable(inputs, {}, run, samples=2, seed=0)]
    assert [feed["h"].shape for feed in feeds] == [(2, 2, 8), (2, 3, 8)]
    assert seen[0] == (2, 7, 8)
