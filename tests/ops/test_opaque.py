"""Operators that are kept whole: the run goes on, and the report says why."""

from __future__ import annotations

import numpy as np
import pytest
from models import build, check_same, dead, draw, shapes, shrunk

from onnxshrink.analyse import analyse
from onnxshrink.graph import Graph
from onnxshrink.ops.opaque import REFUSALS
from onnxshrink.registry import rules

WORDS = [word for words in REFUSALS.values() for word in words.split()]


def test_every_refusal_says_why() -> None:
    refused = {rule.op: rule.refusal for rule in rules() if rule.op in WORDS and not rule.domain}
    assert set(refused) == set(WORDS)
    for reason in refused.values():
        assert reason is not None
        assert reason.startswith(("it ", "its ", "which ")), reason
        assert len(reason.split()) >= 5, reason
    assert len(WORDS) == len(set(WORDS))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "s = SequenceConstruct(a, a) b = SequenceAt(s, one)",
            "it works on a sequence of tensors, whose members are not followed",
        ),
        ("o = Optional(a) b = OptionalGetElement(o)", "it works on an optional value, which may not be there"),
    ],
    ids=["sequence", "optional"],
)
def test_the_rest_of_the_model_still_shrinks(body: str, reason: str) -> None:
    """Two dead units before the refused operator leave; those of the tensor that it reads stay."""
    model = build(
        f"""g (float[2, 3] x) => (float[2, 2] y) {{
            h = MatMul(x, u) r = Relu(h) a = MatMul(r, w) {body} y = MatMul(b, v) }}""",
        opset=18, u=dead(draw(3, 5), 0, 4, axis=1), w=dead(draw(5, 4), 1, axis=1), v=draw(4, 2), one=np.array(1),
    )  # fmt: skip
    assert {refusal.reason for refusal in analyse(Graph(model)).refusals} == {reason}
    small = shrunk(model)
    assert shapes(small)["u"] == (3, 3)
    assert shapes(small)["w"] == (3, 4)
    check_same(model, small, x=draw(2, 3))


def test_selected_boxes_depend_on_every_box() -> None:
    model = build(
        """g (float[1, 6, 4] boxes, float[1, 1, 6] scores) => (int64[K, 3] y) {
            y = NonMaxSuppression(boxes, scores, most, overlap) }""",
        most=np.array([3]), overlap=np.array([0.5], np.float32),
    )  # fmt: skip
    (refusal,) = analyse(Graph(model)).refusals
    assert (refusal.op, refusal.reason) == (
        "NonMaxSuppression",
        "which boxes it selects, and how many, depends on every box",
    )
    boxes = np.sort(np.random.default_rng(0).uniform(0, 4, (1, 6, 2, 2)), axis=2).reshape(1, 6, 4).astype(np.float32)
    check_same(model, shrunk(model), boxes=boxes, scores=np.abs(draw(1, 1, 6)))
