"""`onnxshrink verify`: compare the outputs of two models."""

from __future__ import annotations

import argparse

from onnxshrink.commands.common import add_inputs, make_console, progress, read_inputs

TEXT = "Compare the outputs of two models in onnxruntime."


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("reference", metavar="A.onnx", help="the model whose outputs count")
    parser.add_argument("candidate", metavar="B.onnx", help="the model that should compute the same")
    add_inputs(parser)
    parser.add_argument(
        "--samples", metavar="N", type=int, default=2, help="how many sets of random inputs to draw (2)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from onnxshrink.tables import print_equivalence
    from onnxshrink.verify import verify

    inputs = read_inputs(arguments.inputs)
    with progress() as step:
        step("comparing")
        equivalence = verify(
            arguments.reference, arguments.candidate, inputs=inputs, samples=arguments.samples, seed=arguments.seed
        )
    print_equivalence(make_console(), equivalence)
    return 0
