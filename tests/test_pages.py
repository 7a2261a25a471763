"""The page on many models: every block of code on it runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from shutil import copy

import pytest

from onnxshrink import demo
from onnxshrink.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what the page speaks of."""
    monkeypatch.chdir(tmp_path)
    copy(demo.model_path(), "model.onnx")
    Path("models").mkdir()
    copy(demo.model_path(), "models/digits.onnx")


def test_there_are_commands_and_code() -> None:
    assert [language for language, _ in BLOCKS] == ["sh", "sh", "python"]


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
def test_code_runs(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "scaling.md", "exec"), {"__name__": "scaling"})
    assert capsys.readouterr().out.startswith("the plan is for another model: ")


@pytest.mark.parametrize("text", [code for language, code in BLOCKS if language == "sh"], ids=["folder", "plan"])
def test_commands_run(text: str) -> None:
    for line in text.splitlines():
        program, *words = shlex.split(line)
        assert program == "onnxshrink"
        assert main(words) == 0
    written = [Path(name) for name in ("small/digits.onnx", "reports.json", "plan.json", "small.onnx")]
    assert sum(path.is_file() for path in written) == 2


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGE)
    assert [link for link in links if not (Path(__file__).parent.parent / "docs" / link).exists()] == []
