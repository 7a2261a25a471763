"""Weights computed from weights shrink where they are read once, and nothing is kept for their sake."""

from __future__ import annotations

import weakref
from collections import Counter

import numpy as np
import onnx
import pytest
from models import build, check_same, dead, draw, operators, parameters, shapes, shrunk

from onnxshrink import derive
from onnxshrink.analyse import analyse
from onnxshrink.derive import Results, Sources
from onnxshrink.graph import Graph
from onnxshrink.weights import Array, Constant

SMALL = 64


def standardised(readers: str = "") -> onnx.ModelProto:
    """A convolution whose weights are centred and scaled per row, and one behind it; 40 channels of 16 x 3 x 3."""
    return build(
        f"""g (float[1, 16, 6, 6] x) => (float[1, 4, 6, 6] y{", float[40, 16, 3, 3] t" if readers else ""}) {{
            m = ReduceMean<axes = [1, 2, 3]>(w) c = Sub(w, m) s = Mul(c, c) v = ReduceMean<axes = [1, 2, 3]>(s)
            e = Add(v, epsilon) d = Sqrt(e) n = Div(c, d) {readers}
            h = Conv<pads = [1, 1, 1, 1]>(x, n) r = Relu(h) y = Conv(r, u) }}""",
        w=dead(draw(40, 16, 3, 3), *range(30)),
        epsilon=np.float32(1e-5),
        u=draw(4, 40, 1, 1),
    )


def test_standardised_weights_lose_their_dead_rows() -> None:
    before = standardised()
    small = shrunk(before)
    assert operators(small) == ["Conv", "Relu", "Conv"]
    assert sorted(shapes(small).values()) == [(4, 10, 1, 1), (10, 16, 3, 3)]
    check_same(before, small, x=draw(1, 16, 6, 6))


def test_weights_stay_as_they_are_computed_where_both_would_have_to_be_stored() -> None:
    before = standardised("t = Identity(w)")
    small = shrunk(before)
    assert "ReduceMean" in operators(small)
    check_same(before, small, x=draw(1, 16, 6, 6))


def test_an_extent_read_off_a_weight_does_not_keep_it() -> None:
    """The bias of the second convolution is as long as its weight has rows, all of which stay."""
    before = build(
        """g (float[1, 3, 6, 6] x) => (float[1, 20, 6, 6] y) {
            h = Conv(x, w) r = Relu(h) n = Shape<start = 0, end = 1>(u) zero = CastLike(o, x) b = Expand(zero, n)
            y = Conv(r, u, b) }""",
        w=dead(draw(8, 3, 1, 1), 0, 1, 2, 3, 4, 5),
        u=draw(20, 8, 1, 1),
        o=np.float32(0),
        opset=18,
    )
    small = shrunk(before)
    assert shapes(small)["u"] == (20, 2, 1, 1)
    assert parameters(small) == 2 * 3 + 20 * 2 + 20
    check_same(before, small, x=draw(1, 3, 6, 6))


def test_weights_that_are_cut_and_joined_lose_their_dead_rows() -> None:
    """As exporters bring the gates of a recurrent layer in another order, and both directions together."""
    before = build(
        """g (float[4, 48] x) => (float[4, 6] y) {
            a, b = Split<axis = 1, num_outputs = 2>(v) t = Concat<axis = 1>(b, a) j = Concat<axis = 1>(t, w)
            h = MatMul(x, j) r = Relu(h) y = MatMul(r, u) }""",
        v=dead(draw(48, 100), *range(80), axis=1),
        w=dead(draw(48, 100), *range(90), axis=1),
        u=draw(200, 6),
        opset=18,
    )
    small = shrunk(before)
    assert operators(small) == ["MatMul", "Relu", "MatMul"]
    assert parameters(small) == 30 * 48 + 30 * 6
    check_same(before, small, x=draw(4, 48))


def test_what_is_computed_from_a_weight_is_counted_where_the_graph_reads_it() -> None:
    graph = Graph(standardised())
    sources = Sources(graph)
    assert sources.of["n"] == {"w", "epsilon"}
    assert "h" not in sources.of
    assert not sources.swells("n", SMALL)
    assert Sources(Graph(standardised("t = Identity(w)"))).swells("n", SMALL)
    assert sources.behind("n", analyse(graph).derived) == {"w", "epsilon"}
    assert sources.behind("h", analyse(graph).derived) == set()


# --- results that are kept, or computed again -----------------------------------------------------------------------


class Computed:
    """Constants of 800 bytes, and how often each was computed since it was made."""

    def __init__(self) -> None:
        self.results = Results()
        self.times: Counter[str] = Counter()
        self.made: dict[str, weakref.ref[Array]] = {}

    def constant(self, name: str, number: int) -> Constant:
        def compute() -> Array:
            self.times[name] += 1
            return np.full(100, number)

        value = np.full(100, number)
        self.made[name] = weakref.ref(value)
        return self.results.constant(name, value, compute)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    """There is room for two."""
    monkeypatch.setattr(derive, "_KEPT", 100)
    monkeypatch.setattr(derive, "_ROOM", 1700)
    # Nor does a constant keep them itself.
    monkeypatch.setattr("onnxshrink.weights._SMALL", 100)
    return Computed()


def test_results_stay_while_there_is_room_and_are_computed_again_after(computed: Computed) -> None:
    a, b, c = (computed.constant(name, number) for number, name in enumerate("abc"))
    assert [name for name, found in computed.made.items() if found() is None] == ["a"]
    assert b.array()[0] == 1
    assert c.array()[0] == 2
    assert not computed.times
    assert [a.array()[0], a.array()[0]] == [0, 0]  # in the place of b, which was read before c
    assert c.array()[0] == 2
    assert b.array()[0] == 1
    assert computed.times == {"a": 1, "b": 1}
    assert not any(constant.array().flags.writeable for constant in (a, b, c))


def test_the_last_result_stays_however_large(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derive, "_ROOM", 0)
    a = computed.constant("a", 0)
    assert [a.array()[0], a.array()[0]] == [0, 0]
    assert not computed.times
    b = computed.constant("b", 1)
    assert [a.array()[0], a.array()[0], b.array()[0]] == [0, 0, 1]
    assert computed.times == {"a": 1, "b": 1}


def test_small_results_stay_for_good(computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derive, "_KEPT", 800)
    monkeypatch.setattr(derive, "_ROOM", 0)
    constants = [computed.constant(name, number) for number, name in enumerate("abc")]
    assert [constant.array()[0] for constant in constants] == [0, 1, 2]
    assert not computed.times
