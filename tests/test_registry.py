"""The table of rules: every operator is there, none twice, and each for the opsets that it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from onnxshrink.errors import RuleError
from onnxshrink.registry import NEWEST, Rule, find, register, rules

# Operators whose rules are still to be written.
EXPECTED_LATER: frozenset[str] = frozenset()
# What optimisers and exporters put in the place of ONNX's own operators.
MICROSOFT = [
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "EmbedLayerNormalization",
    "FastGelu",
    "BiasGelu",
    "QuickGelu",
    "FusedMatMul",
    "RotaryEmbedding",
]
TABLE = Path(__file__).parent.parent / "tools" / "op_table.py"


def newest_operators() -> list[str]:
    """Operators of the default domain that are not deprecated at the newest opset."""
    newest: dict[str, onnx.defs.OpSchema] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and schema.since_version > getattr(newest.get(schema.name), "since_version", 0):
            newest[schema.name] = schema
    return sorted(name for name, schema in newest.items() if not schema.deprecated)


def test_every_operator_has_a_rule_or_a_refusal() -> None:
    version = onnx.defs.onnx_opset_version()
    missing = {op for op in newest_operators() if find(op, "", version) is None}
    assert missing == EXPECTED_LATER & set(newest_operators())


@pytest.mark.parametrize("op", MICROSOFT)
def test_fused_operators_have_a_rule_or_a_refusal(op: str) -> None:
    assert find(op, "com.microsoft", 1) is not None


def test_a_refusal_says_why_and_nothing_else() -> None:
    for rule in rules():
        if rule.refusal is not None and not rule.domain.startswith("test."):
            assert len(rule.refusal.split()) >= 4, rule.op
            functions = (rule.forward, rule.backward, rule.retain, rule.represent, rule.fold, rule.rewrite)
            assert not any(functions), rule.op
            assert not rule.relate, rule.op


def test_every_rule_is_for_a_version_that_exists() -> None:
    """The range of a rule holds at least one version of its operator, or lies within one."""
    versions: dict[str, list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions.setdefault(schema.name, []).append(schema.since_version)
    for rule in rules():
        if not rule.domain and rule.op in versions and rule.since < NEWEST:
            assert min(versions[rule.op]) <= rule.until, rule.op


def test_every_rule_is_of_an_operator() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    # The exporter of onnxruntime puts this one in the default domain.
    assert {rule.op for rule in rules() if not rule.domain} - known <= {"SimplifiedLayerNormalization"}


@pytest.mark.parametrize(("since", "until"), [(1, 10_000), (7, 7), (14, 20)])
def test_a_second_rule_for_one_opset_raises(since: int, until: int) -> None:
    with pytest.raises(RuleError, match=r"two rules for ai\.onnx\.LSTM at opset"):
        register(Rule("LSTM", since=since, until=until))


def test_ranges_of_opsets_may_touch() -> None:
    for since, until in ((1, 4), (5, 9)):
        register(Rule("Made", "test.touching", since=since, until=until, refusal=f"since {since}"))
    with pytest.raises(RuleError, match=r"two rules for test\.touching\.Made at opset 9"):
        register(Rule("Made", "test.touching", since=9))
    found = [find("Made", "test.touching", version) for version in (4, 5, 9, 10)]
    assert [rule.refusal if rule else None for rule in found] == ["since 1", "since 5", "since 5", None]


def test_the_same_name_in_another_domain_is_another_operator() -> None:
    assert find("Gather", "test.elsewhere", 17) is None


@pytest.mark.parametrize(
    ("op", "version", "there"),
    [
        ("LSTM", 7, True),
        ("LSTM", 6, False),
        ("Scatter", 9, True),
        ("ScatterElements", 11, True),
        ("ScatterElements", 10, False),
        ("CumProd", 25, False),
        ("CumProd", 26, True),
    ],
)
def test_rules_begin_with_their_opset(op: str, version: int, there: bool) -> None:
    assert (find(op, "", version) is not None) == there


def run_table(*arguments: str) -> str:
    command = [sys.executable, str(TABLE), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_table_lists_every_rule() -> None:
    lines = run_table().splitlines()
    assert lines[0] == "| operator | opsets | axes | traits |"
    rows = {line.split(" | ")[0].lstrip("| "): line for line in lines[2:]}
    assert set(newest_operators()) - EXPECTED_LATER <= set(rows)
    assert rows["GridSample"].startswith("| GridSample | 16- | `n c [*x], n *y [d] -> n c *y` |")
    assert rows["Optional"] == (
        "| Optional | 15- | kept whole: it works on an optional value, which may not be there |  |"
    )
    assert run_table("--smoke") == f"{len(lines) - 2} rules\n"
