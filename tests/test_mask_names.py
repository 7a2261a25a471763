"""Names of masks: what of a file is a mask, and which weight it is for. With exported modules: torch/test_masks.py."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import build, draw
from onnx import numpy_helper

from onnxshrink.errors import MaskError
from onnxshrink.mask_names import fitted, select_masks, spellings
from onnxshrink.masks import apply_masks

M, W = np.array([1, 0]), np.array([0.5, 2.0])


@pytest.mark.parametrize(
    ("entries", "selected"),
    [
        ({"a.weight": M, "b.bias": M}, {"a.weight": M, "b.bias": M}),
        ({"a.weight_orig": W, "a.weight_mask": M, "a.bias": W, "n.running_mean": W}, {"a.weight": M}),
        ({"a.weight": W, "a.weight_mask": M, "b.weight": W}, {"a.weight": M}),
        ({"a.weight_mask": M, "a.bias_mask": M}, {"a.weight": M, "a.bias": M}),
        # A buffer of that name is no mask of a weight.
        ({"a.weight_orig": W, "a.weight_mask": M, "b.attn_mask": W}, {"a.weight": M}),
        ({"a.weight": M, "b.attn_mask": M}, {"a.weight": M, "b.attn_mask": M}),
        ({"a.block_mask": M, "a.weight": W, "b.weight": W}, {"a": M}),
        ({}, {}),
    ],
    ids=["masks", "pruned", "beside", "endings", "another buffer", "no ending", "blocks", "nothing"],
)
def test_the_masks_of_a_file(entries, selected) -> None:
    found = select_masks(entries)
    assert set(found) == set(selected)
    assert all(found[name] is selected[name] for name in found)


def test_what_a_name_may_stand_for() -> None:
    assert list(spellings("module.a")) == [
        ("module.a", False), ("module.a.weight", True), ("a", False), ("a.weight", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "blocks", "expected"),
    [
        ([[1, 0, 1, 1]], False, [[1, 0, 1, 1], [1, 0, 1, 1]]),
        ([[1], [0]], False, [[1, 1, 1, 1], [0, 0, 0, 0]]),
        ([[1, 0], [0, 1]], True, [[1, 1, 0, 0], [0, 0, 1, 1]]),
        ([[1, 0], [0, 1]], False, [[1, 0], [0, 1]]),
        ([[1, 0, 1]], True, [[1, 0, 1]]),
        ([1, 0], True, [1, 0]),
    ],
    ids=["row", "column", "blocks", "no blocks", "does not divide", "rank"],
)
def test_masks_that_are_repeated(mask, blocks: bool, expected) -> None:
    assert fitted(np.array(mask), (2, 4), blocks).tolist() == expected


@pytest.mark.parametrize(
    ("body", "shape", "axis"),
    [
        ("y = Conv(x, w)", (4, 3, 1, 1), 0),
        ("y = ConvTranspose(x, w)", (3, 4, 1, 1), 1),
        ("y = MatMul(x, w)", (6, 4), 1),
        ("y = MatMul(w, x)", (4, 6), 0),
        ("f = Flatten(x) z = Gemm <transB = 1> (f, w) y = Unsqueeze(z, axes)", (4, 108), 0),
        ("f = Flatten(x) z = Gemm(f, w) y = Unsqueeze(z, axes)", (108, 4), 1),
        ("y = Mul(x, w)", (1, 3, 1, 1), 1),
    ],
)
def test_masks_of_channels_are_along_the_axis_that_makes_them(body: str, shape: tuple[int, ...], axis: int) -> None:
    weight = draw(*shape)
    axes = np.array([2, 3], np.int64)
    model = build(f"g (float[2, 3, 6, 6] x) => (float[A, B, C, D] y) {{ {body} }}", w=weight, axes=axes)
    kept = np.arange(shape[axis]) != 1
    found = numpy_helper.to_array(apply_masks(model, {"w": kept}).graph.initializer[0])
    rows = kept.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    np.testing.assert_array_equal(found, weight * rows)


def test_masks_of_channels_of_each_group() -> None:
    weight = draw(4, 3, 2, 2)
    model = build("g (float[2, 4, 6, 6] x) => (float[A, B, C, D] y) { y = ConvTranspose <group = 2> (x, w) }", w=weight)
    kept = np.array([1, 1, 0, 0, 1, 1])
    found = numpy_helper.to_array(apply_masks(model, {"w": kept}).graph.initializer[0])
    grid = kept.reshape(2, 1, 3).repeat(2, axis=1).reshape(4, 3, 1, 1)
    np.testing.assert_array_equal(found, weight * grid)


def test_channels_that_may_be_of_two_axes() -> None:
    model = build("g (float[2, 3, 4, 4] x) => (float[A, B, C, D] y) { y = Mul(x, w) }", w=draw(4, 4))
    with pytest.raises(MaskError, match="mask 'w': 4 channels may be more than one axis of the weight; give all of it"):
        apply_masks(model, {"w": np.array([1, 1, 0, 1])})


def test_channels_that_nothing_makes() -> None:
    model = build("g (float[2, 6] x) => (float[N, M] y) { y = MatMul(x, w) }", w=draw(6, 4))
    with pytest.raises(MaskError, match=r"mask 'w' has shape \[6\], its weight has \[6, 4\]"):
        apply_masks(model, {"w": np.array([1, 1, 0, 1, 1, 1])})


def test_channels_reach_a_weight_that_is_transposed_before_use() -> None:
    weight = draw(4, 6)
    model = build("g (float[2, 6] x) => (float[N, M] y) { t = Transpose(w) y = MatMul(x, t) }", w=weight)
    kept = np.array([1, 0, 0, 1])
    found = numpy_helper.to_array(apply_masks(model, {"w": kept}).graph.initializer[0])
    np.testing.assert_array_equal(found, weight * kept[:, None])


def test_names_in_metadata_that_are_no_list() -> None:
    model = build("g (float[2, 6] x) => (float[N, M] y) { y = MatMul(x, w) }", w=draw(6, 4))
    for text in ("not python (", "'text'", "[1, 2]"):
        del model.graph.node[0].metadata_props[:]
        model.graph.node[0].metadata_props.append(
            onnx.StringStringEntryProto(key="pkg.torch.onnx.name_scopes", value=text)
        )
        with pytest.raises(MaskError, match=r"mask 'a\.weight' matches no initializer"):
            apply_masks(model, {"a.weight": np.ones((4, 6))})
