"""The README does what it says: its code runs, its tables are the tool's, its options exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from onnxshrink import cli, demo

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
FRESH_MACHINE = (
    "python -m venv .venv && .venv/bin/pip install -q . && .venv/bin/onnxshrink demo",
    "python -m venv .venv && .venv/bin/pip install -q -e '.[test]' -c constraints.txt && .venv/bin/pytest -q",
)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.split("\n", 1)[0])
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import torch" in code:
        pytest.importorskip("torch", reason="PyTorch is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_is_code_for_python_and_for_pytorch() -> None:
    assert len(BLOCKS) == 3
    assert [("import torch" in code) for code in BLOCKS] == [False, True, True]


@pytest.mark.parametrize("command", FRESH_MACHINE, ids=["demo", "tests"])
def test_the_first_screen_has_the_commands(command: str) -> None:
    first_screen = README.splitlines()[:40]
    assert f"    {command}" in first_screen


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def test_the_report_is_what_the_tool_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["shrink", str(demo.model_path()), "-o", str(tmp_path / "out.onnx"), "--align", "none"]) == 0
    shown = lines(README)
    # How much the outputs differ depends on the machine.
    printed = [line for line in lines(capsys.readouterr().out) if not re.search(r"e-\d\d", line)]
    assert len(printed) > 15
    assert [line for line in printed if line not in shown] == []


def test_the_demo_is_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    demo.main()
    # Latency, what is fastest, and the last digits of the outputs depend on the machine.
    rows = [line for line in lines(capsys.readouterr().out) if "│" in line and " ms " not in line]
    assert len(rows) == 3
    assert [cells(row) for row in rows if cells(row) not in [cells(line) for line in lines(README)]] == []


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("│").split("│")][:3]


def options(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


@pytest.mark.parametrize("command", ["shrink", "plan", "apply", "verify", "bench"])
def test_usage_names_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage = " ".join(re.findall(rf"    onnxshrink {command} (.*?)(?=\n    onnxshrink|\n\n)", README, re.DOTALL))
    assert usage
    assert cli.main([command, "--help"]) == 0
    offered = {option for option in options(capsys.readouterr().out.partition("exit codes")[0]) if option[:2] == "--"}
    named = {option for option in options(usage) if option[:2] == "--"}
    assert named == offered - {"--help", "--traceback", "--output", "--quiet"}


def test_nothing_is_left_to_do() -> None:
    assert not re.search(r"\bTODO\b|\bFIXME\b", README, re.IGNORECASE)
