"""Print what is known of every operator as a Markdown table: opsets, how its axes hang together, traits, refusals.

python tools/op_table.py                             print the table
python tools/op_table.py --output docs/operators.md  write the page of the documentation
python tools/op_table.py --smoke                     check that it can be made, and print how many rows it has
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import onnx

from onnxshrink.registry import NEWEST, Rule, rules

HEADER = ("operator", "opsets", "axes", "traits")
TITLE = "# Operators"
NOTES = """\
Written by `tools/op_table.py --output docs/operators.md`.

One line per operator, and per range of opsets where its rules differ; a range begins where the operator, or the form
of it that the rule knows, begins. Operators that are not listed, and those of unknown domains, are kept whole:
everything that they read is needed, and nothing of what they write is known.

**axes** tells how the axes of inputs and outputs hang together, one letter for one factor, `*a` for any number of axes
with a factor each. A factor between square brackets is not separable, so its axis stays as it is; an axis between
parentheses is a product of factors, as after a Reshape. `1` is an axis of one element. Where the relation depends on
attributes or extents, the rule makes it from the node, and the line says so.

**traits** are what a rule says beyond its axes. *own constants*: it computes outputs that do not depend on the
model's inputs. *own needs*: it says which elements of its inputs the needed outputs read. *keeps what it must*: some
elements stay although nothing reads them. *lets one constant stand for others*: one constant channel stays where a
bias cannot carry what the others add. *folds constants*: constants that leave are added to a bias. *changes
attributes or weights*: what must be rewritten when an axis shrinks. *takes compressed constants*: a constant that is
the same along an axis may have one element there. *not finite everywhere*: infinite or no result for some inputs, so
that its inputs are never made up. *may sum to one*: along one axis, so that equal values weighed by it come out as
they went in. *may frame constants in zeros*: the same frame for every channel, behind which one channel stands for the
others. *may be shifted*: one number added along an axis of its input is lost in it, or comes out added. *may follow one
number*: some of its channels are multiples of one number per position, each with its own offset. *lets one channel
follow for others*: of such channels of its input, one may stay and stand for all."""
_TRAITS = {
    "forward": "own constants",
    "backward": "own needs",
    "retain": "keeps what it must",
    "represent": "lets one constant stand for others",
    "fold": "folds constants",
    "rewrite": "changes attributes or weights",
    "unit": "may sum to one",
    "frame": "may frame constants in zeros",
    "blind": "may be shifted",
    "line": "may follow one number",
    "lined": "lets one channel follow for others",
}


def first_versions() -> dict[tuple[str, str], int]:
    """Per domain and operator, the opset that brought it in."""
    found: dict[tuple[str, str], int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        key = (schema.domain, schema.name)
        found[key] = min(schema.since_version, found.get(key, schema.since_version))
    return found


def opsets(rule: Rule, first: int = 1) -> str:
    """The range of opset versions, from the one that brought the operator in."""
    since = max(rule.since, first)
    if rule.until == NEWEST:
        return f"{since}-"
    return str(since) if since == rule.until else f"{since}-{rule.until}"


def axes(rule: Rule) -> str:
    """The notation, or the words of the function that makes it."""
    if rule.refusal is not None:
        return f"kept whole: {rule.refusal}"
    if isinstance(rule.relate, str):
        return f"`{rule.relate}`"
    words = (rule.relate.__doc__ or "").strip().partition("\n")[0].rstrip(".")
    return words or "from its attributes and shapes"


def traits(rule: Rule) -> str:
    """Which parts of the rule the operator has of its own."""
    found = [text for name, text in _TRAITS.items() if getattr(rule, name) is not None]
    found += ["takes compressed constants"] * rule.absorbs + ["not finite everywhere"] * bool(rule.partial)
    return ", ".join(found)


def rows() -> list[tuple[str, str, str, str]]:
    """One row per rule, by domain and operator."""
    first = first_versions()
    return [
        (
            f"{rule.domain}.{rule.op}" if rule.domain else rule.op,
            opsets(rule, first.get((rule.domain, rule.op), 1)),
            axes(rule),
            traits(rule),
        )
        for rule in rules()
        if rule.since < NEWEST
    ]


def table(cells: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown."""
    lines: list[Sequence[str]] = [HEADER, ["---"] * len(HEADER), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def page() -> str:
    """The table as a page of its own."""
    return f"{TITLE}\n\n{NOTES}\n\n{table(rows())}\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="print the table of operators as Markdown")
    parser.add_argument("--smoke", action="store_true", help="make the table and print its number of rows only")
    parser.add_argument("--output", type=Path, help="write the table to this file, with a heading and an explanation")
    arguments = parser.parse_args(argv)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page(), encoding="utf-8")
        return 0
    cells = rows()
    print(f"{len(cells)} rules" if arguments.smoke else table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
