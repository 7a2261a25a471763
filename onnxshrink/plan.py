"""Which indices of which axis stay: the least fixpoint of *kept*, with a cause for each growth. Names no operator.

Every axis starts from the indices that hold a live element. Then, node by node until nothing grows, the sets are made
to agree with the node's factors and index maps. Growth only, so it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnxshrink.analyse import Analysis, find_needed
from onnxshrink.collector import paused
from onnxshrink.planning.agreement import level
from onnxshrink.planning.align import Aligner, Alignment
from onnxshrink.planning.data import INTERFACE, LIVE, Cause, Kept, Plan
from onnxshrink.planning.executed import Demand, Executed
from onnxshrink.planning.planner import Planner

__all__ = ["INTERFACE", "LIVE", "Cause", "Demand", "Kept", "Plan", "level", "make_plan"]


@paused()
def make_plan(analysis: Analysis, alignment: Alignment | None = None, demands: Sequence[Demand] | None = None) -> Plan:
    """The smallest sets that agree with every node of the graph, and with the widths that are asked for.

    With `demands`, even without any in it, every node stays: see `Executed`.
    """
    apart: set[int] = set()
    while True:
        planner = Planner(analysis, apart) if alignment is None else Aligner(analysis, apart, alignment)
        if demands is not None:
            planner = Executed(analysis, apart, demands)
        planner.start()
        planner.grow()
        planner.choose_blocks()
        planner.grow()
        while planner.settle():
            planner.grow()
        careless, misjoined = planner.careless(), planner.misjoined()
        if not careless and not misjoined:
            return planner.finish()
        apart |= misjoined
        if careless:
            analysis.throughout.update(careless)
            find_needed(analysis)
