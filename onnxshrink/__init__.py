"""onnxshrink removes pruned channels from ONNX models: the same function, smaller weights, proven with onnxruntime.

Importing the package imports nothing else: each public name is fetched when it is first asked for.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from onnxshrink.errors import DifferenceError, InputError, MaskError, OnnxshrinkError, RuleError
from onnxshrink.version import __version__

if TYPE_CHECKING:
    from onnxshrink.custom import rule
    from onnxshrink.report import Report
    from onnxshrink.result import ShrinkResult
    from onnxshrink.shrink import shrink
    from onnxshrink.transfer.portable import ShrinkPlan
    from onnxshrink.transfer.steps import apply_plan, make_plan
    from onnxshrink.verify import Equivalence, OutputsDiffer, verify

__all__ = [
    "DifferenceError",
    "Equivalence",
    "InputError",
    "MaskError",
    "OnnxshrinkError",
    "OutputsDiffer",
    "Report",
    "RuleError",
    "ShrinkPlan",
    "ShrinkResult",
    "__version__",
    "apply_plan",
    "export",
    "make_plan",
    "rule",
    "shrink",
    "verify",
]

_HOMES = {
    "Equivalence": "verify",
    "OutputsDiffer": "verify",
    "Report": "report",
    "ShrinkPlan": "transfer.portable",
    "ShrinkResult": "result",
    "apply_plan": "transfer.steps",
    "make_plan": "transfer.steps",
    "rule": "custom",
    "shrink": "shrink",
    "verify": "verify",
}


def export(*args: Any, **kwargs: Any) -> ShrinkResult:
    """Export a PyTorch module with its masks applied, and shrink the model; see `onnxshrink.torch.export`.

    Needs the extra `torch`; importing onnxshrink does not import PyTorch, calling this does.
    """
    from onnxshrink.torch import export as export_module

    return export_module(*args, **kwargs)


class _Package(ModuleType):
    """A package some of whose functions have the name of the module that they are defined in."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing a module sets it as an attribute of its package, where the function of its name belongs.
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
