"""What the documentation says of the code is what the code says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATORS = ROOT / "docs" / "operators.md"
# The table tells when an operator came into being, so it is made with an onnx that knows them all.
NEWEST_OPSET = 28


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < NEWEST_OPSET, reason="this onnx does not know all operators yet")
def test_the_table_of_operators_is_up_to_date(tmp_path: Path) -> None:
    # In a process of its own, where no test has registered a rule.
    fresh = tmp_path / "docs" / "operators.md"
    subprocess.run([sys.executable, str(ROOT / "tools" / "op_table.py"), "--output", str(fresh)], check=True)
    hint = "run `python tools/op_table.py --output docs/operators.md`"
    assert OPERATORS.read_text(encoding="utf-8") == fresh.read_text(encoding="utf-8"), hint


def test_the_readme_names_every_tool_and_no_other() -> None:
    named = set(re.findall(r"`tools/(\w+\.py)", README))
    assert named == {path.name for path in (ROOT / "tools").glob("[!_]*.py")}


PAGES = {
    path.name: "\n".join(
        re.findall(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
    for path in sorted((ROOT / "docs").glob("*.md"))
}


@pytest.mark.parametrize("page", [name for name, code in PAGES.items() if code])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import torch" in PAGES[page]:
        pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(PAGES[page], page, "exec"), {"__name__": "page"})


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_changelog_has_this_version() -> None:
    from onnxshrink import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
