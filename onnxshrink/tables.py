"""What the command line prints."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from onnxshrink.measure import Size
from onnxshrink.report import Layer, Report
from onnxshrink.speed.latency import Latency
from onnxshrink.verify import Equivalence

_MOST_LAYERS = 24
_MOST_STAYS = 5
_WIDTHS = {
    "none": "with the fewest parameters",
    "mixed": "with widths that suit each layer",
    **{str(n): f"with widths that are multiples of {n}" for n in (4, 8, 16)},
    "1": "with a constant channel kept where one would be added",
}
_ROWS = ("parameters", "bytes", "multiply-adds", "nodes")


def print_report(console: Console, report: Report, verified: bool) -> None:
    """The report of one model, in at most a few screens."""
    if report.zeroed:
        line(
            console, f"{report.zeroed:,} weights near zero were set to zero: the input's function is not kept exactly."
        )
    if not report.changed:
        line(console, f"Nothing removed: {report.note or 'no channel can go'}. The result equals the input.")
    else:
        console.print(_sizes(report.before, report.after))
        if not report.fixed:
            line(console, "multiply-adds count free dimensions as 1", indent=1)
        _print_layers(console, report.layers, report.latency)
        _print_latency(console, report)
        _print_equivalence(console, report.equivalence, verified)
        _print_folds(console, report)
    _print_stays(console, report)


def print_equivalence(console: Console, equivalence: Equivalence) -> None:
    """The figures of a comparison."""
    table = make_table("", "")
    for name, value in (
        ("largest difference, of the output's range", f"{equivalence.error:.1e}"),
        ("largest difference, absolute", f"{equivalence.absolute:.1e}"),
        ("the first model's own rounding noise", f"{equivalence.noise:.1e}"),
        ("limit", f"{equivalence.limit:.1e}"),
        ("outputs x input sets", f"{equivalence.outputs} x {equivalence.samples}"),
    ):
        table.add_row(name, value)
    table.show_header = False
    console.print("The models compute the same.", highlight=False)
    console.print(table)


def line(console: Console, text: str, indent: int = 0) -> None:
    """A paragraph, wrapped between words only: names are not broken."""
    lines = wrap(
        text,
        console.width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
    console.print(Text("\n".join(lines)), soft_wrap=True)


def make_table(*headings: str, names: int = 1) -> Table:
    """A table whose first columns hold names, which may be folded; the others hold numbers, which stay whole."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings[:names]:
        table.add_column(heading, overflow="fold")
    for heading in headings[names:]:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _sizes(before: Size, after: Size) -> Table:
    table = make_table("", "before", "after", "left")
    for label in _ROWS:
        field = label.replace("-", "_")
        old, new = getattr(before, field), getattr(after, field)
        table.add_row(label, f"{old:,}", f"{new:,}", f"{new / old:.1%}" if old else "")
    return table


def _shape(extents: Sequence[int]) -> str:
    return "x".join(map(str, extents))


def _saved(layer: Layer) -> int:
    before = after = 1
    for old in layer.before:
        before *= old
    for new in layer.after:
        after *= new
    return before - after


def _print_layers(console: Console, layers: Sequence[Layer], latency: Latency | None) -> None:
    if not layers:
        return
    largest = sorted(layers, key=_saved, reverse=True)[:_MOST_LAYERS]
    timed = latency is not None and bool(latency.nodes)
    table = make_table("node", "weight", "before", "after", *(["µs"] if timed else []), names=2)
    for layer in layers:
        if layer in largest:  # in graph order
            times = latency.nodes.get(layer.node, ()) if latency is not None else ()
            cell = " > ".join(f"{1e6 * seconds:,.0f}" for seconds in times)
            cells = (layer.node, layer.weight, _shape(layer.before), _shape(layer.after), cell)
            table.add_row(*cells[: len(table.columns)])
    console.print()
    console.print(table)
    if len(layers) > len(largest):
        line(console, f"and {len(layers) - len(largest)} layers that lost less (--report FILE.json lists all)", 1)


def _print_latency(console: Console, report: Report) -> None:
    found = report.latency
    if found is None:
        if report.untimed:
            console.print()
            line(console, f"Not timed: {report.untimed}.")
        return
    console.print()
    timing = found.timing
    before, after = map(_milliseconds, timing.seconds)
    line(
        console,
        f"One run takes {after} instead of {before}: {timing.ratio:.2f} of the time (between {timing.low:.2f} and "
        f"{timing.high:.2f} at 95 %), {_WIDTHS.get(found.align, 'with some layers whole')}.",
    )
    others = [f"{_milliseconds(seconds)} {name}" for name, seconds in found.tried.items() if name != found.align]
    if others:
        line(console, f"Other widths: {', '.join(others)}.", indent=2)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _print_equivalence(console: Console, equivalence: Equivalence | None, verified: bool) -> None:
    console.print()
    if equivalence is None:
        line(console, "Not verified." if not verified else "Nothing to verify.")
        return
    line(
        console,
        f"Verified: the outputs differ by at most {equivalence.error:.1e} of their range "
        f"(limit {equivalence.limit:.1e}; the input's own rounding noise {equivalence.noise:.1e}).",
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _print_folds(console: Console, report: Report) -> None:
    if report.folded:
        carried = f", {_count(report.appended, 'channel')} of ones added to carry them" if report.appended else ""
        line(console, f"{_count(report.folded, 'constant channel')} folded into the layers behind{carried}.")


def _print_stays(console: Console, report: Report) -> None:
    """What stayed, and what rests on less than a proof."""
    stays = [f"{stay.channels:,} for {stay.node or 'the graph'}: {stay.reason}" for stay in report.stays]
    rest = report.stays[_MOST_STAYS:]
    more = f"{sum(stay.channels for stay in rest):,} for {_count(len(rest), 'other reason')}"
    _print_list(console, "Channels without effect that stay:", stays, more)
    widths = [f"{width.node}: {width.reason}" for width in report.unaligned]
    _print_list(console, "Widths that could not be raised:", widths)
    unproven = [
        f"{found.op} {found.node}: {found.how}"
        + (f"; {_count(found.constant, 'constant element')}" if found.constant else "")
        for found in report.unproven
    ]
    _print_list(console, "Operators whose shrinking rests on the comparison alone:", unproven)
    refusals = [f"{len(refusal.nodes):,} {refusal.op}: {refusal.reason}" for refusal in report.refusals]
    _print_list(console, "Operators kept whole:", refusals)


def _print_list(console: Console, heading: str, entries: Sequence[str], more: str | None = None) -> None:
    """The first of some entries under a heading, if there are any; `more` tells of the others."""
    if not entries:
        return
    console.print()
    line(console, heading)
    for entry in entries[:_MOST_STAYS]:
        line(console, entry, indent=2)
    if len(entries) > _MOST_STAYS:
        line(console, more or f"and {len(entries) - _MOST_STAYS:,} more (--report FILE.json lists all)", indent=2)
