"""What the documentation says of the code is what the code says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import onnx
import pytest

from onnxshrink import cli, demo, registry

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


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
WITH_CODE = [name for name, text in PAGES.items() if BLOCK.search(text)]
# What the commands of a page write.
WRITTEN = {
    "getting-started.md": ("small.onnx", "smallest.onnx", "block.onnx", "state.pt"),
    "faq.md": ("small.onnx",),
    "migration.md": ("small.onnx",),
    "scaling.md": ("small/digits.onnx", "reports.json", "plan.json", "small.onnx"),
}


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules that a page registers are gone afterwards."""
    registry.load()
    monkeypatch.setattr(registry, "_rules", {key: list(rules) for key, rules in registry._rules.items()})


@pytest.mark.usefixtures("own_rules")
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block by block, in a folder with a model and a folder of models."""
    if "import torch" in PAGES[page]:
        pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")
    monkeypatch.chdir(tmp_path)
    shutil.copy(demo.model_path(), "model.onnx")
    Path("models").mkdir()
    shutil.copy(demo.model_path(), "models/digits.onnx")
    names: dict[str, object] = {"__name__": "page"}
    for language, code in BLOCK.findall(PAGES[page]):
        RUN[language](code, page, names)
    assert [name for name in WRITTEN.get(page, ()) if not Path(name).is_file()] == []


def run_python(code: str, page: str, names: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="to_torch: ")
        exec(compile(code, page, "exec"), names)


def run_commands(text: str, page: str, names: dict[str, object]) -> None:
    for line in text.splitlines():
        program, *words = shlex.split(line)
        assert program == "onnxshrink"
        assert cli.main(words) == 0


def read_entry_points(text: str, page: str, names: dict[str, object]) -> None:
    (group,) = re.findall(r'^\[project\.entry-points\."(.*)"\]$', text, re.MULTILINE)
    assert group == registry.ENTRY_POINTS


RUN = {"python": run_python, "sh": run_commands, "toml": read_entry_points}


def test_the_pages_that_there_should_be() -> None:
    assert set(PAGES) >= {
        "getting-started.md",
        "how-it-works.md",
        "exactness.md",
        "migration.md",
        "writing-rules.md",
        "faq.md",
        "speed.md",
        "scaling.md",
        "operators.md",
    }
    assert [name for name in PAGES if f"(docs/{name})" not in README] == []


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        name, _, anchor = target.partition("#")
        assert name in PAGES, target
        anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", PAGES[name], re.MULTILINE)}
        assert not anchor or anchor in anchors, target


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_changelog_has_this_version() -> None:
    from onnxshrink import __version__

    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
