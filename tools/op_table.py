"""Print what is known of every operator as a Markdown table: opsets, how its axes hang together, traits, refusals.

python tools/op_table.py            the whole table
python tools/op_table.py --smoke    check that it can be made, and print how many rows it has
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import onnx

from onnxshrink.registry import NEWEST, Rule, rules

HEADER = ("operator", "opsets", "axes", "traits")
_TRAITS = {
    "forward": "own constants",
    "backward": "own needs",
    "retain": "keeps what it must",
    "represent": "lets one constant stand for others",
    "fold": "folds constants",
    "rewrite": "changes attributes or weights",
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
    lines = [HEADER, ["---"] * len(HEADER), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="print the table of operators as Markdown")
    parser.add_argument("--smoke", action="store_true", help="make the table and print its number of rows only")
    arguments = parser.parse_args(argv)
    cells = rows()
    print(f"{len(cells)} rules" if arguments.smoke else table(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
