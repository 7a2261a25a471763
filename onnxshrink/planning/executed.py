"""A plan for programs that cannot be rewritten: everything is computed, by the operators that compute it now.

No node vanishes, nothing is replaced by a constant, and no channel of ones is appended: constants that no bias can
carry across a border are carried by one of them that stays. What the program fixes is demanded index by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxshrink.analyse import Analysis
from onnxshrink.planning.data import Cause
from onnxshrink.planning.planner import Planner
from onnxshrink.weights import BoolArray


@dataclass(frozen=True, eq=False)
class Demand:
    """Indices of one axis of a computed tensor that must stay, and why."""

    tensor: str
    axis: int
    indices: BoolArray
    cause: Cause


class Executed(Planner):
    """A planner that leaves every node in place."""

    def __init__(self, analysis: Analysis, apart: set[int], demands: Sequence[Demand]) -> None:
        super().__init__(analysis, apart)
        self._demands = demands

    def start(self) -> None:
        super().start()
        self.settled.clear()
        self.frozen = {index: {} for index in self.frozen}
        self.free = {
            name: {axis: np.ones(mask.size, np.bool_) for axis, mask in enumerate(kept) if mask is not None}
            for name, kept in self.kept.items()
        }
        self.present.update(self.kept)
        for demand in self._demands:
            self._add(demand.tensor, demand.axis, demand.indices, demand.cause)
        for node in reversed(self.nodes):
            self._enqueue(node)
