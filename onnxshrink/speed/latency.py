"""How long a model takes before and after, as the report tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Latency:
    """One run in onnxruntime, on one thread.

    Attributes:
        before: of the input, seconds; the median.
        after: of the result, seconds; the median.
        ratio: after by before, the median over rounds in which both ran.
        low, high: a 95 % interval of the ratio.
        runs: how many rounds there were.
        align: how the widths of the result are chosen: "none", "mixed" or a multiple.
        tried: every form that was timed, seconds, by how its widths were chosen.
        nodes: per node, seconds before and after, where onnxruntime's profile tells both.
    """

    before: float
    after: float
    ratio: float
    low: float
    high: float
    runs: int
    align: str
    tried: Mapping[str, float] = field(default_factory=dict)
    nodes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
