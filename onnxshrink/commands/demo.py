"""`onnxshrink demo`: the shipped classifier, shrunk and compared."""

from __future__ import annotations

import argparse

TEXT = "Shrink a small classifier that ships with the package, and compare."


def add(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from onnxshrink import demo

    return demo.main()
