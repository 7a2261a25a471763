"""Which node of a model a kernel stands for."""

from __future__ import annotations

import pytest
from models import build, draw

from onnxshrink.bench.names import Kernel, find_origins

MODEL = build(
    """g (float[1, 3, 8, 8] x) => (float[1, 2] y) {
        [stem] a = Conv(x, w)
        [act] b = Relu(a)
        [left] c = Conv(b, v)
        [right] d = Conv(b, u)
        [sum] e = Add(c, d)
        [out] f = Relu(e)
        [mean] h = GlobalAveragePool(f)
        [flat] i = Flatten(h)
        [product] j = MatMul(i, m)
        y = Add(j, n)
    }""",
    w=draw(4, 3, 3, 3),
    v=draw(4, 4, 1, 1),
    u=draw(4, 4, 1, 1),
    m=draw(4, 2),
    n=draw(2),
)


def origins(*kernels: tuple[str, str]) -> list[tuple[str, str] | None]:
    found = find_origins(MODEL.graph, [Kernel(*kernel) for kernel in kernels])
    result: list[tuple[str, str] | None] = []
    for kernel in kernels:
        origin = found.get(Kernel(*kernel))
        result.append(None if origin is None else (origin.name, origin.op))
    return result


@pytest.mark.parametrize(
    ("kernel", "op", "origin"),
    [
        ("stem", "Conv", ("stem", "Conv")),
        ("stem", "FusedConv", ("stem", "Conv")),
        ("b_nchwc", "Conv", ("stem", "Conv")),  # a convolution with its activation, named after what it computes
        ("h_nchwc", "GlobalAveragePool", ("mean", "GlobalAveragePool")),
        ("product/MatMulAddFusion", "Gemm", ("product", "MatMul")),
        ("product/MatMulAddFusion/", "Gemm", ("product", "MatMul")),
        ("fused product", "FusedGemm", ("product", "MatMul")),
        ("Add(y)", "Add", None),
        ("ReorderOutput", "ReorderOutput", None),
    ],
)
def test_names_that_fusions_leave(kernel: str, op: str, origin: tuple[str, str] | None) -> None:
    assert origins((kernel, op)) == [origin]


def test_a_sum_is_done_by_the_convolution_that_has_no_kernel_of_its_own() -> None:
    assert origins(("f_nchwc", "Conv"), ("d_nchwc", "Conv")) == [("left", "Conv"), ("right", "Conv")]
    assert origins(("f_nchwc", "Conv"), ("c_nchwc", "Conv")) == [("right", "Conv"), ("left", "Conv")]


def test_nodes_without_a_name_are_called_after_their_tensor() -> None:
    assert origins(("y", "Add")) == [("Add(y)", "Add")]
