"""Where the time of a run goes: onnxruntime's profile, per node of the model."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from onnxshrink.graph import label_of
from onnxshrink.inputs import Feed
from onnxshrink.runtime import Model

_RUNS = 7
_SUFFIX = re.compile(r"(_nchwc|_token_\d+)*_kernel_time$")
_STEPS = 8  # how many nodes the runtime is taken to fuse at most


def profile(model: Model, feed: Feed) -> dict[str, float]:
    """Median seconds per run by what messages call a node; what is fused counts as one."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder, "profile"))
        session = model.load(options, ())
        for _ in range(_RUNS):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return _per_node(model.light.graph, events)


def _per_node(graph: onnx.GraphProto, events: list[Mapping[str, object]]) -> dict[str, float]:
    nodes = {node.name: node for node in graph.node if node.name}
    makers = {name: node for node in graph.node for name in node.output if name}
    samples: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        name, given = str(event.get("name", "")), event.get("args")
        if event.get("cat") == "Node" and name.endswith("_kernel_time") and isinstance(given, dict):
            found = _node_of(_SUFFIX.sub("", name), str(given.get("op_name", "")), nodes, makers)
            if found is not None:
                samples[label_of(found)].append(float(str(event["dur"])) * 1e-6)
    # A node that runs several times in one run (in a loop) is counted as one run of all of them.
    return {name: float(np.median(s)) * max(1, round(len(s) / _RUNS)) for name, s in samples.items()}


def _node_of(
    name: str, op: str, nodes: Mapping[str, onnx.NodeProto], makers: Mapping[str, onnx.NodeProto]
) -> onnx.NodeProto | None:
    """The node that a kernel runs for; its name is a node's, or that of the last tensor of what was fused."""
    node = nodes.get(name) or makers.get(name) or nodes.get(name.rpartition("/")[0])
    first = node
    for _ in range(_STEPS):
        if node is None or node.op_type == op or not node.input:
            break
        node = makers.get(node.input[0])
    return node if node is not None and node.op_type == op else first
