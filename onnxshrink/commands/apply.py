"""`onnxshrink apply`: write the smaller model that a plan describes."""

from __future__ import annotations

import argparse

from onnxshrink.commands.common import add_inputs, add_masks, make_console, progress, read_inputs

TEXT = "Write the smaller model that a plan of `onnxshrink plan` describes: the same as `shrink` writes."


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("model", metavar="MODEL.onnx", help="the model that the plan was made for")
    parser.add_argument("plan", metavar="PLAN.json", help="the plan")
    parser.add_argument("-o", "--output", metavar="OUT.onnx", required=True, help="the smaller model; may be MODEL")
    add_masks(parser)
    parser.add_argument("--report", metavar="FILE.json", help="write what was removed, what stayed and why")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the outputs of both models")
    add_inputs(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing unless something is wrong")


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    import os

    from onnxshrink.errors import InputError
    from onnxshrink.transfer.portable import read_plan
    from onnxshrink.transfer.steps import apply_plan

    inputs = read_inputs(arguments.inputs)
    for name, file in (("output", arguments.output), ("report", arguments.report)):
        if file is not None and os.path.realpath(file) == os.path.realpath(arguments.plan):
            raise InputError(f"{name} {file}: would overwrite the plan")
    plan = read_plan(arguments.plan)
    with progress(arguments.quiet) as step:
        result = apply_plan(
            arguments.model,
            plan,
            arguments.masks,
            output=arguments.output,
            verify=not arguments.no_verify,
            inputs=inputs,
            seed=arguments.seed,
            zero_tolerance=arguments.zero_tolerance,
            report=arguments.report,
            progress=step,
        )
    if not arguments.quiet:
        from onnxshrink.tables import print_report

        print_report(make_console(), result.report, verified=not arguments.no_verify)
    return 0
