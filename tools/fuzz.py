"""Shrink many random graphs and compare each with its original: `python tools/fuzz.py --graphs 2000 --seed 0`.

Exits with 1 when a graph fails; the failing models are saved in a folder, named by their seed. `--smoke` runs 30.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from onnxshrink.testing import InputsCannotRun, check_shrink, run

TESTS = Path(__file__).resolve().parent.parent / "tests"


@dataclass
class Result:
    """What a run found."""

    checked: int = 0
    invalid: int = 0
    shrunk: int = 0
    unfinished: int = 0
    before: int = 0
    after: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[int, str]] = field(default_factory=list)


def make_graph(seed: int) -> Any:
    """The random graph of a seed; the generator is the one that the tests use."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    chooser = importlib.import_module("graph_builder").RandomChooser(seed)
    return importlib.import_module("strategies").random_graph(chooser)


def runnable(graph: Any) -> list[Any]:
    """Inputs that the original runs on; the second set, with other free extents, only where it does."""
    onnx.checker.check_model(graph.model, full_check=True)
    feeds: list[Any] = graph.feeds(0)
    run(graph.model, feeds[:1])
    try:
        run(graph.model, feeds)
    except InputsCannotRun:
        return feeds[:1]
    return feeds


def check(seed: int, align: int, result: Result) -> onnx.ModelProto | None:
    """Check one graph; the model when it fails."""
    graph = make_graph(seed)
    try:
        feeds = runnable(graph)
    except (InputsCannotRun, onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        result.invalid += 1
        return None
    try:
        found = check_shrink(graph.model, feeds, again=False, align=align)
    except InputsCannotRun:
        result.invalid += 1
        return None
    except Exception as error:
        # Whatever a graph provokes is a finding: the run goes on and tells all of them at the end.
        result.failures.append((seed, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
        return graph.model  # type: ignore[no-any-return]
    result.checked += 1
    result.shrunk += found.removed > 0
    result.unfinished += found.unfinished
    result.before += found.before
    result.after += found.after
    result.operators.update({node.op_type for node in graph.model.graph.node})
    return None


def summary(result: Result, seconds: float) -> str:
    """The figures of a run, in words."""
    checked = max(result.checked, 1)
    lines = [f"{'seed':>8}  failure"] if result.failures else []
    lines += [f"{seed:>8}  {message}" for seed, message in result.failures]
    lines += [
        f"{result.checked} graphs agree, {len(result.failures)} do not, {result.invalid} were not valid",
        f"{result.shrunk / checked:.1%} lost something; {result.before} parameters became {result.after}",
        f"{result.unfinished} would lose more in a second run",
        f"{len(result.operators)} operators; the rarest: "
        + ", ".join(f"{op} {count}" for op, count in result.operators.most_common()[:-9:-1]),
        f"{seconds:.0f} s",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=int, default=2000, help="how many graphs (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first graph; the others follow (default 0)")
    parser.add_argument("--folder", type=Path, default=Path("fuzz-failures"), help="where failing models are saved")
    parser.add_argument("--align", type=int, default=1, help="multiple that widths are raised to (default 1: none)")
    parser.add_argument("--smoke", action="store_true", help="30 graphs only")
    options = parser.parse_args(argv)
    warnings.simplefilter("error")
    result, start = Result(), time.perf_counter()
    for seed in range(options.seed, options.seed + (30 if options.smoke else options.graphs)):
        model = check(seed, options.align, result)
        if model is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
            onnx.save(model, str(options.folder / f"{seed}.onnx"))
    print(summary(result, time.perf_counter() - start))
    return 1 if result.failures else 0


if __name__ == "__main__":
    sys.exit(main())
