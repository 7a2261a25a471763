"""Figures of the runtime's kernels: looked up by width, measured, cached."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxshrink.speed import kernels
from onnxshrink.speed.kernels import BLOCK, NOMINAL, Kernels, load_kernels, measure_kernels

TABLE = tuple(float(width) for width in (*range(17, 33), *range(49, 65)))


@pytest.mark.parametrize(
    ("width", "figure"),
    [(1, 17), (15, 31), (16, 32), (17, 17), (32, 32), (33, 33), (49, 49), (61, 61), (64, 64), (512, 64)],
)
def test_a_width_has_the_figure_of_one_that_leaves_the_same_remainder(width: int, figure: float) -> None:
    assert Kernels({"product": TABLE}, 1.0).unit("product", width) == figure


def test_measured_figures_are_those_of_real_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ROUNDS", 2)
    found = measure_kernels()
    assert set(found.units) == {"convolution", "pointwise", "depthwise", "product"}
    for row in found.units.values():
        assert len(row) == 2 * BLOCK
        assert all(1e-13 < unit < 1e-7 for unit in row)  # between 10 and 0.00001 Tera multiply-adds a second
    assert 1e-12 < found.element < 1e-7


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """An empty cache; the list grows by one for every measurement."""
    measured: list[int] = []

    def measure() -> Kernels:
        measured.append(1)
        return NOMINAL

    monkeypatch.setattr(kernels, "measure_kernels", measure)
    monkeypatch.setattr(kernels, "_cache_file", lambda: tmp_path / "folder" / "kernels.json")
    return measured


def test_figures_are_measured_once(cache: list[int]) -> None:
    assert load_kernels() == load_kernels()
    assert len(cache) == 1


@pytest.mark.parametrize("content", ["", "{}", '{"units": {}, "element": 1}', '{"units": 3}', "[1]"])
def test_a_broken_cache_is_measured_anew(cache: list[int], tmp_path: Path, content: str) -> None:
    load_kernels()
    (tmp_path / "folder" / "kernels.json").write_text(content)
    assert load_kernels() == NOMINAL
    assert len(cache) == 2


def test_a_cache_that_cannot_be_written_is_no_error(
    cache: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kernels, "_cache_file", lambda: tmp_path / "file" / "kernels.json")
    assert load_kernels() == NOMINAL


def test_the_cache_belongs_to_one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels._cache_file()
    monkeypatch.setattr("onnxruntime.__version__", "0.0.1")
    assert kernels._cache_file() != before
    assert "0.0.1" in kernels._cache_file().name
