"""The PyTorch front: modules and their masks, exported to ONNX and shrunk. Needs the extra `torch`."""

from __future__ import annotations

try:
    import torch.nn as _torch_nn  # noqa: F401
except ImportError as error:
    raise ImportError("onnxshrink.torch needs PyTorch: pip install 'onnxshrink[torch]'") from error

from onnxshrink.torch.export import export, export_onnx, masked_copy
from onnxshrink.torch.speedup import ModelSpeedup

__all__ = ["ModelSpeedup", "export", "export_onnx", "masked_copy"]
