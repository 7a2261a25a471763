"""What `onnxshrink bench` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from onnxshrink.bench.comparison import Comparison
from onnxshrink.bench.statistics import ALIKE, FEWEST, Timing
from onnxshrink.tables import line, make_table

_MOST_OPERATORS = 10
_MOST_NODES = 8
_DRIFT = 0.1  # a machine whose speed changes by more while it measures is worth a word
_SHORTEST = 1e-6  # seconds; nodes whose time changes by less are not listed: the profiler's own resolution


def print_comparison(console: Console, comparison: Comparison) -> None:
    """The figures of two models, called A and B, and the verdict."""
    for letter, name in zip("AB", comparison.models, strict=True):
        line(console, f"{letter}: {name}")
    inputs = ", ".join(f"{name} {shape}" for name, shape in comparison.inputs.items())
    line(console, f"inputs: {inputs or 'none'}")
    console.print()
    console.print(_figures(comparison))
    _print_operators(console, comparison)
    _print_nodes(console, comparison)
    console.print()
    for text in _notes(comparison):
        line(console, text)
    line(console, verdict(comparison.timing, comparison.threads))


def verdict(timing: Timing, threads: int) -> str:
    """One sentence: is B faster, and how sure is that."""
    found = {
        "faster": "B is faster than A.",
        "slower": "B is slower than A.",
        "no difference": "No difference can be told.",
    }[timing.verdict]
    circumstances = f"{timing.runs} rounds, {threads} thread{'' if threads == 1 else 's'}"
    if math.isinf(timing.high):
        return f"{found} B takes {timing.ratio:.3f} times as long; fewer than {FEWEST} rounds ({circumstances})."
    interval = f"95% interval {timing.low:.3f} to {timing.high:.3f}"
    return f"{found} B takes {timing.ratio:.3f} times as long ({interval}; {circumstances})."


def _notes(comparison: Comparison) -> Iterable[str]:
    for letter, found in zip("AB", comparison.denormals, strict=True):
        if found:
            yield (
                f"{letter} has denormal numbers: {found.weights:,} in its weights, {found.activations:,} in the "
                f"{found.looked_at} tensors looked at. They are timed as zeros; where the runtime keeps them (unless "
                "session.set_denormal_as_zero is set) some processors are much slower."
            )
    if abs(comparison.timing.drift) > _DRIFT:
        slower = "slower" if comparison.timing.drift > 0 else "faster"
        yield f"The machine became {abs(comparison.timing.drift):.0%} {slower} meanwhile; both models were hit alike."
    low, high = comparison.timing.low, comparison.timing.high
    if comparison.timing.verdict == "no difference" and not low <= 1 <= high:
        yield f"Models that differ by less than {ALIKE:.0%} are as good as equal: so do two sessions of one model."


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _ratio(first: float | None, second: float | None) -> str:
    return f"{second / first:.3f}" if first and second else ""


def _figures(comparison: Comparison) -> Table:
    made = make_table("", "A", "B", "B / A")
    timing = comparison.timing
    made.add_row("latency, ms", *(f"{1e3 * seconds:.4g}" for seconds in timing.seconds), f"{timing.ratio:.3f}")
    first, second = comparison.memory
    if first is not None and second is not None:
        rows = {
            "peak memory, loading, MB": (first.loading, second.loading),
            "peak memory, running, MB": (first.running, second.running),
        }
        for name, peaks in rows.items():
            made.add_row(name, *(f"{peak / 1e6:.1f}" for peak in peaks), _ratio(*peaks))
    return made


def _print_operators(console: Console, comparison: Comparison) -> None:
    if not comparison.operators:
        return
    made = make_table("operator", "A", "ms", "B", "ms", "B / A")
    for operator in comparison.operators[:_MOST_OPERATORS]:
        counts = [str(count) if count else "" for count in operator.nodes]
        times = [_milliseconds(seconds) for seconds in operator.seconds]
        made.add_row(operator.op, counts[0], times[0], counts[1], times[1], _ratio(*operator.seconds))
    console.print()
    console.print(made)
    rest = comparison.operators[_MOST_OPERATORS:]
    if rest:
        line(console, f"and {len(rest)} operators that take less (--report FILE.json lists all)", 1)


def _print_nodes(console: Console, comparison: Comparison) -> None:
    changed = [node for node in comparison.nodes if abs(node.change) >= _SHORTEST][:_MOST_NODES]
    if not changed:
        return
    made = make_table("nodes that changed most", "operator", "A, ms", "B, ms", "change, ms", names=2)
    for node in changed:
        kernels = " -> ".join(dict.fromkeys(kernel for kernel in node.kernels if kernel is not None))
        times = [_milliseconds(seconds) for seconds in node.seconds]
        made.add_row(node.name, kernels, *times, f"{1e3 * node.change:+.3g}")
    console.print()
    console.print(made)
