"""Where a node of an exported model comes from: what PyTorch's exporters note about its module and source line."""

from __future__ import annotations

import ast
import re
from functools import lru_cache

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_TRACE = "pkg.torch.onnx.stack_trace"
_REWRITES = "pkg.onnxscript.rewriter.rule_name"
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def metadata(node: onnx.NodeProto, key: str) -> str:
    """One entry of a node's metadata, "" when it is not there."""
    return next((entry.value for entry in node.metadata_props if entry.key == key), "")


def module_path(node: onnx.NodeProto) -> str | None:
    """Name of the innermost module that a node was exported from, "" for the outermost; None when nobody says.

    The newer exporter writes it in the metadata of the node, the older one in its name (`/layer1/layer1.0/conv1/Conv`).
    """
    scopes = _parse(metadata(node, _SCOPES))
    if scopes:
        return scopes[-2] if len(scopes) > 1 else ""
    if not node.name.startswith("/"):
        return None
    path: list[str] = []
    for part in node.name.split("/")[1:-1]:
        # A container writes its own name again in front of its children's.
        if path and part.startswith(f"{path[-1]}."):
            path[-1] = part
        else:
            path.append(part)
    return ".".join(path)


def module_classes(node: onnx.NodeProto) -> list[str]:
    """Class names of the modules that a node was exported from, the innermost last; none when nobody says."""
    return [path.rpartition(".")[2] for path in _parse(metadata(node, _CLASSES))[:-1]]


@lru_cache(maxsize=1 << 14)
def _parse(text: str) -> list[str]:
    try:
        found = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return []
    return found if isinstance(found, list) and all(isinstance(scope, str) for scope in found) else []


def source_lines(node: onnx.NodeProto) -> list[tuple[str, int]]:
    """Files and lines of the stack that a node was exported from, the innermost last."""
    return [(file, int(line)) for file, line in _FRAME.findall(metadata(node, _TRACE))]


def absorbed_norm(node: onnx.NodeProto) -> bool:
    """Whether the exporter folded a batch normalisation into the weights of this node."""
    return "FuseBatchNorm" in metadata(node, _REWRITES)
