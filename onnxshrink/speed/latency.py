"""How long a model takes before and after, as the report tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnxshrink.bench.statistics import Timing


@dataclass(frozen=True)
class Latency:
    """One run in onnxruntime, on one thread.

    Attributes:
        timing: of the result, compared with the input.
        align: how the widths of the result are chosen: "none", "mixed" or a multiple.
        tried: every form that was timed, seconds, by how its widths were chosen.
        nodes: per node, seconds before and after, where onnxruntime's profile tells both.
    """

    timing: Timing
    align: str
    tried: Mapping[str, float] = field(default_factory=dict)
    nodes: Mapping[str, tuple[float, float]] = field(default_factory=dict)
