"""Shrink small networks of many architectures in many variants: `python tools/sweep.py --smoke`, or `--full`.

Each is pruned at random, exported by torch, shrunk, and compared with what it was in onnxruntime. A line for each says
is left; `--why` adds what stays beyond the live channels, and why. Exits with 1 when a result differs or nothing was
removed; what a second run would remove is told.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent / "tests"


def line(finding: Any) -> tuple[bool, str]:
    """Whether a case passes, and its figures."""
    faults = [] if finding.exact else ["WRONG"]
    faults += [] if finding.after < finding.before else ["nothing removed"]
    told = [] if finding.again == finding.after else [f"a second run: {finding.again}"]
    more = sum(count - 1 for count, _ in finding.extra.values() if count > 1)
    share = finding.after / finding.before
    text = f"{finding.before:7d} -> {finding.after:6d} ({share:4.0%})  error {finding.error:.0e}  extra {more:3d}"
    return not faults, "  ".join([text, *told, *faults])


def why(finding: Any) -> list[str]:
    """What stays beyond the live channels."""
    return [f"    {name}: {count}, {text}" for name, (count, text) in finding.extra.items() if count > 1]


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--smoke", action="store_true", help="the variants that the tests try")
    which.add_argument("--full", action="store_true", help="every variant")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these architectures")
    parser.add_argument("--why", action="store_true", help="say what stays beyond the live channels")
    options = parser.parse_args(argv)
    sys.path.insert(0, str(TESTS))
    logging.disable(logging.CRITICAL)
    catalogue: Any = importlib.import_module("architectures.catalogue")
    sweep: Any = importlib.import_module("architectures.sweep").sweep
    failed, start = 0, time.perf_counter()
    for architecture in catalogue.ARCHITECTURES:
        if options.only and architecture.name not in options.only:
            continue
        for variant in catalogue.full(architecture) if options.full else catalogue.smoke(architecture):
            label = f"{architecture.name:10s} {variant!s:34s}"
            try:
                finding = sweep(architecture.build, architecture.shape, variant)
            except Exception as error:  # whatever a network provokes is a finding, and the run goes on
                failed += 1
                print(f"{label} {type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}", flush=True)
                continue
            passes, text = line(finding)
            failed += not passes
            print("\n".join([f"{label} {text}", *(why(finding) if options.why else [])]), flush=True)
    print(f"{failed} failed; {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
