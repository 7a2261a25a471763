"""`python -m onnxshrink`."""

from onnxshrink.cli import run

if __name__ == "__main__":
    run()
