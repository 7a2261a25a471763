"""Another Python that finds the same modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onnxshrink.processes import python_command


def test_the_same_modules_are_found_whatever_lies_in_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    code = "import json, sys; print(json.__file__, sys.argv[1:], __name__)"
    (tmp_path / "modules" / "shown.py").write_text(code)
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.setattr(sys, "path", [*(path for path in sys.path if path), str(tmp_path / "modules")])
    command = python_command("shown", "a b", "c")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    import json

    assert done.stdout.strip() == f"{json.__file__} ['a b', 'c'] __main__"
