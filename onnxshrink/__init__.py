"""onnxshrink removes pruned channels from ONNX models: the same function, smaller weights, proven with onnxruntime."""

from __future__ import annotations

from typing import Any

from onnxshrink.errors import DifferenceError, InputError, MaskError, OnnxshrinkError, RuleError
from onnxshrink.report import Report
from onnxshrink.shrink import ShrinkResult, shrink
from onnxshrink.verify import Equivalence, OutputsDiffer, verify
from onnxshrink.version import __version__

__all__ = [
    "DifferenceError",
    "Equivalence",
    "InputError",
    "MaskError",
    "OnnxshrinkError",
    "OutputsDiffer",
    "Report",
    "RuleError",
    "ShrinkResult",
    "__version__",
    "export",
    "shrink",
    "verify",
]


def export(*args: Any, **kwargs: Any) -> ShrinkResult:
    """Export a PyTorch module with its masks applied, and shrink the model; see `onnxshrink.torch.export`.

    Needs the extra `torch`; importing onnxshrink does not import PyTorch, calling this does.
    """
    from onnxshrink.torch import export as export_module

    return export_module(*args, **kwargs)
