"""The whole path: load, mask, analyse, plan, apply, verify, save."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from onnxshrink.analyse import analyse
from onnxshrink.apply import apply
from onnxshrink.graph import Graph, ModelLike
from onnxshrink.plan import Plan, make_plan
from onnxshrink.weights import Array


@dataclass(frozen=True, eq=False)
class ShrinkResult:
    model: onnx.ModelProto
    plan: Plan
    report: Any


def shrink(
    model: ModelLike,
    masks: Any = None,
    *,
    output: str | os.PathLike[str] | None = None,
    verify: bool = True,
    inputs: Mapping[str, Array] | None = None,
    seed: int = 0,
    align: str = "none",
) -> ShrinkResult:
    graph = Graph(model)
    analysis = analyse(graph)
    plan = make_plan(analysis)
    small = apply(analysis, plan)
    if output:
        onnx.save(small, str(output))
    return ShrinkResult(small, plan, None)
