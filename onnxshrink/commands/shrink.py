"""`onnxshrink shrink`: write a smaller model that computes the same."""

from __future__ import annotations

import argparse
import os

from onnxshrink.commands import folder
from onnxshrink.commands.common import add_inputs, add_masks, add_widths, make_console, progress, read_inputs
from onnxshrink.errors import InputError

TEXT = "Write a smaller model that computes the same."


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "model", metavar="MODEL.onnx", help="the model, with zeros where it is pruned; or a folder with models"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT.onnx",
        required=True,
        help="the smaller model, or the folder for them; may be MODEL",
    )
    add_masks(parser)
    parser.add_argument("--report", metavar="FILE.json", help="write what was removed, what stayed and why")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the outputs of both models")
    add_widths(parser)
    parser.add_argument(
        "--jobs", metavar="N", type=int, default=1, help="of a folder, so many models at a time, a process each (1)"
    )
    add_inputs(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing unless something is wrong")


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    if os.path.isdir(arguments.model):
        return folder.run(arguments)
    if arguments.jobs != 1:
        raise InputError(f"--jobs {arguments.jobs}: is for a folder of models; {arguments.model} is none")
    from onnxshrink.shrink import shrink

    inputs = read_inputs(arguments.inputs)
    with progress(arguments.quiet) as step:
        result = shrink(
            arguments.model,
            arguments.masks,
            output=arguments.output,
            verify=not arguments.no_verify,
            inputs=inputs,
            seed=arguments.seed,
            align=arguments.align,
            timing=not arguments.no_timing,
            zero_tolerance=arguments.zero_tolerance,
            report=arguments.report,
            progress=step,
        )
    if not arguments.quiet:
        from onnxshrink.tables import print_report

        print_report(make_console(), result.report, verified=not arguments.no_verify)
    return 0
