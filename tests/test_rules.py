"""Every rule against onnx's own one-node cases: what it claims forward and backward, and what it shrinks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import pytest

from onnxshrink.registry import rules
from onnxshrink.testing import Case, Tally, check_rule, node_cases
from onnxshrink.testing.cases import at_opset

SEEDS = range(2)
OLDER_OPSETS = (11, 13, 17)
# Cases that differ in nothing but a type or a number are many; this many are taken of each operator.
MOST_CASES = 24
# What is run and claimed must not become less unnoticed.
FEWEST_CASES = 800
FEWEST_CLAIMING = 600

_seen: dict[str, Tally] = {}


def operators() -> list[tuple[str, str]]:
    """Operators that have a rule (which is not a refusal) and cases."""
    known = {(rule.domain, rule.op) for rule in rules() if rule.refusal is None}
    return sorted(key for key in known if node_cases(key[1], key[0]))


def spread(cases: list[Case]) -> list[Case]:
    """At most `MOST_CASES`, from all over the list."""
    step = max(1, -(-len(cases) // MOST_CASES))
    return cases[::step]


def runnable(cases: Iterable[Case], version: int | None = None) -> list[Case]:
    return [moved for case in cases if (moved := at_opset(case, version)) is not None]


def name_of(key: tuple[str, str]) -> str:
    return f"{key[0]}.{key[1]}" if key[0] else key[1]


@pytest.mark.parametrize("key", operators(), ids=name_of)
def test_claims_hold_on_the_cases_of_onnx(key: tuple[str, str]) -> None:
    domain, op = key
    _seen[name_of(key)] = check_rule(op, domain, runnable(spread(node_cases(op, domain))), SEEDS)


@pytest.mark.parametrize("version", OLDER_OPSETS)
def test_claims_hold_at_older_opsets(version: int) -> None:
    total = Tally()
    for domain, op in operators():
        if domain == "" and _defined(op, version):
            total.add(check_rule(op, domain, runnable(node_cases(op, domain)[:3], version), [2]))
    assert len(total.cases) >= {11: 90, 13: 130, 17: 150}[version]


def _defined(op: str, version: int) -> bool:
    return onnx.defs.has(op, version, "")


def test_enough_cases_ran_and_enough_claimed_something(record_property: pytest.RecordProperty) -> None:
    """Runs after the cases above, in this file's order; alone, it has nothing to count."""
    if len(_seen) < len(operators()):
        pytest.skip("counts what the tests above have run")
    total = Tally()
    for tally in _seen.values():
        total.add(tally)
    silent = sorted(name for name, tally in _seen.items() if tally.ran and not tally.claiming)
    print(f"{len(total.cases)} cases ran, {len(total.claiming)} claimed something; nothing claimed by {silent}")
    record_property("cases", len(total.cases))
    record_property("claiming", len(total.claiming))
    assert len(total.cases) >= FEWEST_CASES
    assert len(total.claiming) >= FEWEST_CLAIMING


# --- cases of our own, where those of onnx have too few channels to lose any ------------------------------------


def case(op: str, shapes: list[tuple[int, ...]], opset: int = 17, **attributes: object) -> Case:
    """One node on random inputs of given shapes."""
    rng = np.random.default_rng(len(shapes))
    names = [f"i{index}" for index in range(len(shapes))]
    value = onnx.helper.make_tensor_value_info
    inputs = [value(name, onnx.TensorProto.FLOAT, list(shape)) for name, shape in zip(names, shapes, strict=True)]
    node = onnx.helper.make_node(op, names, ["o"], **attributes)
    graph = onnx.helper.make_graph([node], op, inputs, [onnx.ValueInfoProto(name="o")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(names, shapes, strict=True)}
    if op == "BatchNormalization":
        arrays["i4"] = np.abs(arrays["i4"]) + 1
    return Case(op + "".join(f" {k}={v}" for k, v in attributes.items()), model, arrays)


CONVOLUTIONS = [
    case("Conv", [(1, 6, 5, 5), (4, 6, 3, 3)]),
    case("Conv", [(1, 6, 5, 5), (4, 6, 3, 3), (4,)], pads=[1, 0, 1, 2]),
    case("Conv", [(2, 6, 7), (4, 6, 3), (4,)], strides=[2], dilations=[2], pads=[2, 2]),
    case("Conv", [(1, 6, 4, 4), (6, 1, 3, 3), (6,)], group=6, pads=[1] * 4),
    case("Conv", [(1, 6, 4, 4), (12, 1, 2, 2), (12,)], group=6),
    case("Conv", [(1, 6, 4, 4), (4, 3, 1, 1), (4,)], group=2),
    case("Conv", [(1, 4, 3, 3, 3), (5, 4, 2, 2, 2), (5,)], auto_pad="SAME_UPPER"),
    case("ConvTranspose", [(1, 6, 3, 3), (6, 4, 3, 3), (4,)], strides=[2, 2]),
    case("ConvTranspose", [(1, 6, 3, 3), (6, 2, 2, 2), (4,)], group=2, pads=[1, 0, 0, 1]),
    case("ConvTranspose", [(1, 6, 4), (6, 5, 1)]),
]
OTHERS = [
    case("Gemm", [(3, 6), (6, 5), (5,)], alpha=0.5, beta=2.0),
    case("Gemm", [(3, 6), (5, 6)], transB=1, beta=0.0),
    case("Gemm", [(6, 3), (5, 6), (1,)], transA=1, transB=1),
    case("MatMul", [(2, 3, 6), (6, 5)]),
    case("MatMul", [(2, 4, 3, 6), (2, 4, 6, 5)]),
    case("MatMul", [(5, 3), (2, 3, 6)]),
    case("BatchNormalization", [(2, 5, 3), (5,), (5,), (5,), (5,)]),
    case("InstanceNormalization", [(2, 5, 3), (5,), (5,)], epsilon=1e-2),
    case("LayerNormalization", [(2, 3, 5), (5,), (5,)], epsilon=1e-2),
    case("PRelu", [(2, 5, 3), (5, 1)]),
    case("MaxPool", [(1, 5, 4, 4)], kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2], ceil_mode=1),
    case("AveragePool", [(1, 5, 4, 4)], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    case("LpPool", [(1, 5, 4, 4)], kernel_shape=[2, 2]),
    case("GlobalAveragePool", [(1, 5, 3, 2)]),
    case("LRN", [(1, 5, 3, 2)], size=3),
    case("Concat", [(1, 3, 2), (1, 4, 2), (1, 2, 2)], axis=1),
    case("Transpose", [(2, 3, 5)], perm=[2, 0, 1]),
    case("DepthToSpace", [(1, 12, 2, 2)], blocksize=2),
    case("SpaceToDepth", [(1, 3, 4, 2)], blocksize=2),
    case("Softmax", [(2, 5, 3)], axis=1),
    case("Softmax", [(2, 5, 3)], opset=11, axis=1),
    case("LogSoftmax", [(2, 5, 3)], opset=11, axis=2),
    case("ReduceMean", [(2, 5, 3)], axes=[1]),
    case("ReduceL2", [(2, 5, 3)], axes=[-2], keepdims=0),
    case("ReduceSum", [(2, 5, 3)], opset=11, axes=[1, 2]),
    case("Squeeze", [(2, 5, 1)], opset=11, axes=[2]),
    case("Unsqueeze", [(2, 5)], opset=11, axes=[1]),
    case("Flatten", [(2, 5, 3)], axis=1),
    case("Einsum", [(2, 3, 5), (5, 4)], equation="bij,jk->bik"),
]


@pytest.mark.parametrize("one", [*CONVOLUTIONS, *OTHERS], ids=lambda one: str(one.name))
def test_claims_hold_where_channels_can_leave(one: Case) -> None:
    tally = check_rule(one.model.graph.node[0].op_type, cases=[one], seeds=range(8))
    assert tally.ran >= 7
    assert tally.claiming


@pytest.mark.parametrize("one", CONVOLUTIONS, ids=lambda one: str(one.name))
def test_convolutions_lose_channels(one: Case) -> None:
    assert check_rule(one.model.graph.node[0].op_type, cases=[one], seeds=range(8, 28)).shrunk >= 2
