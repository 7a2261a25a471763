"""`onnxshrink bench`: compare the speed and memory of two models."""

from __future__ import annotations

import argparse
import os

from onnxshrink.commands.common import add_inputs, make_console, progress, read_inputs
from onnxshrink.errors import InputError

TEXT = "Compare latency, memory and time by operator of two models in onnxruntime."


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("first", metavar="A.onnx", help="the model that B is compared with")
    parser.add_argument("second", metavar="B.onnx", help="another model with the same inputs")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="threads that one operator may use (1)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", metavar="S", type=float, default=10.0, help="how long to measure latency, once loaded (10)"
    )
    length.add_argument("--runs", metavar="N", type=int, help="this many rounds, each of which runs both, instead")
    parser.add_argument("--report", metavar="FILE.json", help="write all figures, of every operator and node")
    add_inputs(parser)


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from pathlib import Path

    from onnxshrink.bench.comparison import compare_all
    from onnxshrink.bench.printing import print_comparison

    _check_report(arguments)
    inputs = read_inputs(arguments.inputs)
    with progress() as step:
        comparison = compare_all(
            arguments.first,
            arguments.second,
            threads=arguments.threads,
            inputs=inputs,
            seconds=arguments.seconds,
            rounds=arguments.runs,
            seed=arguments.seed,
            progress=step,
        )
    print_comparison(make_console(), comparison)
    if arguments.report is not None:
        from onnxshrink.save import write_text

        write_text(comparison.to_json(), Path(arguments.report))
    return 0


def _check_report(arguments: argparse.Namespace) -> None:
    """Raise InputError where the report could not be written, or would overwrite a model."""
    if arguments.report is None:
        return
    from onnxshrink.save import check_target

    target = os.path.realpath(check_target(arguments.report, "report"))
    for model in (arguments.first, arguments.second):
        if os.path.realpath(model) == target:
            raise InputError(f"report {arguments.report}: would overwrite {model}")
