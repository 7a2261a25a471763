"""`onnxshrink shrink` for a folder: every model in it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from onnxshrink.commands.common import make_console, progress
from onnxshrink.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from onnxshrink.folders import Outcome

EXIT_SOME_FAILED = 1


def run(arguments: argparse.Namespace) -> int:
    """Shrink every model of a folder; the exit code."""
    from pathlib import Path

    from onnxshrink.folders import shrink_folder, to_json
    from onnxshrink.save import write_text

    _check(arguments)
    if arguments.align == "auto" and arguments.jobs > 1:
        from onnxshrink.speed.kernels import load_kernels

        load_kernels()  # measured before the jobs disturb each other, and kept for them
    done: list[Outcome] = []
    with progress(arguments.quiet) as step:
        step("shrinking")

        def tell(outcome: Outcome) -> None:
            done.append(outcome)
            step(f"shrinking: {len(done)} done")
            if outcome.error is not None:
                named = outcome.model in outcome.error
                print(f"onnxshrink: error: {'' if named else outcome.model + ': '}{outcome.error}", file=sys.stderr)

        folders = Path(arguments.model), Path(arguments.output)
        outcomes = shrink_folder(*folders, options(arguments), arguments.jobs, tell)
    if arguments.report is not None:
        write_text(to_json(outcomes), Path(arguments.report))
    if not arguments.quiet:
        print_outcomes(make_console(), outcomes)
    return EXIT_SOME_FAILED if any(outcome.error is not None for outcome in outcomes) else 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise InputError for options that do not go together with a folder, or a report that cannot be written."""
    from pathlib import Path

    from onnxshrink.folders import find_models

    find_models(Path(arguments.model), Path(arguments.output))
    if arguments.masks is not None:
        raise InputError(f"--masks {arguments.masks}: is for one model; {arguments.model} is a folder")
    if arguments.report is not None:
        from onnxshrink.save import check_target

        target = os.path.realpath(check_target(arguments.report, "report"))
        if target.endswith(".onnx"):
            raise InputError(f"report {arguments.report}: could overwrite a model; give it another name")


def options(arguments: argparse.Namespace) -> list[str]:
    """The options of a command that are the same for each model."""
    words = ["--align", str(arguments.align), "--seed", str(arguments.seed)]
    words += ["--zero-tolerance", str(arguments.zero_tolerance)]
    words += ["--no-verify"] * arguments.no_verify + ["--no-timing"] * arguments.no_timing
    for given in arguments.inputs:
        words += ["--input", given]
    return words


def print_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """One row per model, and what they add up to."""
    from onnxshrink.tables import line, make_table

    rows = make_table("model", "parameters", "after", "left", "seconds")
    for outcome in outcomes:
        if outcome.report is None:
            cells = ["", "failed", ""]
        else:
            before, after = (outcome.report[side]["parameters"] for side in ("before", "after"))
            cells = [f"{before:,}", f"{after:,}", f"{after / before:.1%}" if before else ""]
        rows.add_row(outcome.model, *cells, f"{outcome.seconds:.1f}")
    console.print(rows)
    failed = sum(outcome.error is not None for outcome in outcomes)
    console.print()
    rest = f", {failed} failed" if failed else ""
    line(console, f"{len(outcomes) - failed} of {len(outcomes)} models written{rest}.")
