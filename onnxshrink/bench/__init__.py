"""Which model is faster, by how much, and how sure that is."""

from __future__ import annotations

from onnxshrink.bench.comparison import Comparison, compare_all
from onnxshrink.bench.statistics import Timing, make_timing
from onnxshrink.bench.timing import compare, measure

__all__ = ["Comparison", "Timing", "compare", "compare_all", "make_timing", "measure"]
