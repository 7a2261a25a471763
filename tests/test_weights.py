"""Weights are read one at a time, and what analysis asks of them again is kept."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxshrink import weights
from onnxshrink.errors import InputError
from onnxshrink.weights import Array, Constant, Values, stored, taken


class Reads:
    """A constant that counts how often its values are read."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self.count = 0
        self.constant = Constant("w", values.shape, values.dtype, self.read)

    def read(self) -> Array:
        self.count += 1
        return self.values


def test_patterns_along_fewer_axes_follow_from_those_along_more() -> None:
    values = np.zeros((64, 96, 3, 3), np.float32)
    values[3, 5, 1, 2] = values[7, 90, 0, 0] = 1
    reads = Reads(values)
    assert np.argwhere(reads.constant.nonzero((0, 1))).tolist() == [[3, 5], [7, 90]]
    assert np.flatnonzero(reads.constant.nonzero((0,))).tolist() == [3, 7]
    assert np.flatnonzero(reads.constant.nonzero((1,))).tolist() == [5, 90]
    assert reads.constant.nonzero(()).tolist() is True
    assert reads.count == 1


# --- in files ------------------------------------------------------------------------------------------------------


def external(folder: Path, values: Array, offset: int = 0) -> onnx.TensorProto:
    """A tensor whose data lie in a file, behind so many other bytes."""
    (folder / "data").write_bytes(b"x" * offset + values.tobytes())
    tensor = onnx.TensorProto(name="w", dims=values.shape, data_type=onnx.TensorProto.FLOAT)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "data"), ("offset", offset), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@pytest.mark.parametrize("offset", [0, 4, 4096, 70_000])
@pytest.mark.parametrize("shape", [(3, 5), (200, 300), (40_000,), (0, 4), ()])
def test_a_tensor_in_a_file(tmp_path: Path, shape: tuple[int, ...], offset: int) -> None:
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = stored(external(tmp_path, values, offset), tmp_path)
    assert (found.shape, found.dtype) == (shape, np.float32)
    assert np.array_equal(found.array(), values)
    assert np.array_equal(np.concatenate([np.atleast_1d(b) for b in found.blocks()]), np.atleast_1d(values))


def test_a_large_tensor_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 1 << 12)
    values = np.random.default_rng(0).standard_normal((50, 40, 3)).astype(np.float32)
    found = stored(external(tmp_path, values, 100), tmp_path)
    assert [block.shape for block in found.blocks()] == [(8, 40, 3)] * 6 + [(2, 40, 3)]
    kept = [np.arange(50) % 3 == 0, None, np.array([True, False, True])]
    cut = found.cut(kept)
    assert cut.shape == (17, 40, 2)
    assert np.array_equal(cut.array(), values[::3][:, :, ::2])
    assert np.array_equal(np.concatenate(list(cut.blocks())), cut.array())
    assert max(block.nbytes for block in cut.blocks()) < 1 << 12


def test_a_row_that_is_larger_than_a_piece_is_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 100)
    values = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    assert [block.shape for block in stored(external(tmp_path, values), tmp_path).blocks()] == [(1, 64)] * 3


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_a_file_that_has_changed_is_not_read(tmp_path: Path, change: str) -> None:
    values = np.ones((100, 200), np.float32)
    found = stored(external(tmp_path, values), tmp_path)
    path = tmp_path / "data"
    if change == "replaced":
        (tmp_path / "other").write_bytes(path.read_bytes())
        os.replace(tmp_path / "other", path)
    else:
        path.write_bytes(bytes(values.nbytes))
        os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match=r"'w': .*data has changed since the model was read"):
        found.array()


def test_a_scalar_is_cut_like_any_other() -> None:
    values = Values.of(np.float32(3).reshape(()))
    assert [block.tolist() for block in values.cut([]).blocks()] == [3.0]
    assert taken(np.ones((2, 1)), [np.array([True, False]), np.array([True, True, False])]).shape == (1, 1)
