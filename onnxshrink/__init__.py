from onnxshrink.shrink import shrink
