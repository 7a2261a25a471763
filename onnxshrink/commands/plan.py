"""`onnxshrink plan`: decide what of a model goes, for `onnxshrink apply` to carry out, perhaps elsewhere."""

from __future__ import annotations

import argparse
import os

from onnxshrink.commands.common import add_inputs, add_masks, add_widths, make_console, progress, read_inputs
from onnxshrink.errors import InputError

TEXT = "Decide what of a model goes, and write that down for `onnxshrink apply`."


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("model", metavar="MODEL.onnx", help="the model, with zeros where it is pruned")
    parser.add_argument("-o", "--output", metavar="PLAN.json", required=True, help="the plan")
    add_masks(parser)
    add_widths(parser)
    add_inputs(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing unless something is wrong")


def run(arguments: argparse.Namespace) -> int:
    """Carry it out; the exit code."""
    from pathlib import Path

    from onnxshrink.save import check_target, write_text
    from onnxshrink.transfer.steps import make_plan

    target = check_target(arguments.output, "output")
    for name, file in (("the model", arguments.model), ("the masks", arguments.masks)):
        if file is not None and os.path.realpath(file) == os.path.realpath(target):
            raise InputError(f"output {arguments.output}: would overwrite {name}")
    inputs = read_inputs(arguments.inputs)
    with progress(arguments.quiet) as step:
        plan = make_plan(
            arguments.model,
            arguments.masks,
            inputs=inputs,
            seed=arguments.seed,
            align=arguments.align,
            timing=not arguments.no_timing,
            zero_tolerance=arguments.zero_tolerance,
            progress=step,
        )
        step("writing")
        write_text(plan.to_json(), Path(target))
    if not arguments.quiet:
        from onnxshrink.tables import line

        line(make_console(), plan.summary())
    return 0
