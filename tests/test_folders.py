"""Folders of models: which are shrunk, what becomes of each, what stays of those that fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
from networks import chain, normed

from onnxshrink import folders, shrink
from onnxshrink.cli import main
from onnxshrink.errors import InputError
from onnxshrink.folders import Outcome, find_models, shrink_folder
from onnxshrink.measure import parameters
from onnxshrink.processes import python_command


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models, in folders too, and other things."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    folder = tmp_path / "models"
    (folder / "sub" / "deep").mkdir(parents=True)
    onnx.save(chain(True), folder / "a.onnx")
    onnx.save(normed(True), folder / "sub" / "deep" / "b.onnx")
    (folder / "sub" / "notes.txt").write_text("no model")
    (folder / "sub" / "c.onnx").write_text("no model either")
    (folder / "d.onnx").mkdir()
    return folder


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def faked(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let a line of Python stand for the command; `model`, `output` and `report` are its paths."""

    def command(module: str, *words: str) -> list[str]:
        assert (module, words[0], words[2], words[4]) == ("onnxshrink", "shrink", "-o", "--report")
        names = f"model, output, report, options = {words[1]!r}, {words[3]!r}, {words[5]!r}, {words[6:]!r}"
        return [sys.executable, "-S", "-c", f"import os, sys; {names}\n{code}"]

    monkeypatch.setattr(folders, "python_command", command)


REPORT = "open(report, 'w').write('{}'); open(output, 'x').close()"


# --- which models ----------------------------------------------------------------------------------------------------


def test_models_in_folders_too(models: Path) -> None:
    assert [path.as_posix() for path in find_models(models, Path("out"))] == ["a.onnx", "sub/c.onnx", "sub/deep/b.onnx"]


def test_results_of_an_earlier_run_are_no_models(models: Path) -> None:
    (models / "small").mkdir()
    onnx.save(chain(True), models / "small" / "a.onnx")
    found = [path.as_posix() for path in find_models(models, models / "small")]
    assert found == ["a.onnx", "sub/c.onnx", "sub/deep/b.onnx"]
    assert len(find_models(models, models)) == 4


# --- the whole way ---------------------------------------------------------------------------------------------------


def test_one_that_fails_and_one_that_dies_keep_no_other(
    models: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    onnx.save(chain(True), models / "killed.onnx")

    def command(module: str, *words: str) -> list[str]:
        if not words[1].endswith("killed.onnx"):
            return python_command(module, *words)
        left = f".killed.onnx.{'0' * 16}.tmp"
        code = f"import os, signal; open('out/{left}', 'w').close(); os.kill(os.getpid(), signal.SIGKILL)"
        return [sys.executable, "-S", "-c", code]

    monkeypatch.setattr(folders, "python_command", command)
    Path("out").mkdir()
    Path("out/killed.onnx").write_text("as it was")
    words = ["--jobs", "2", "--align", "none", "--no-verify", "--report", "report.json"]
    assert main(["shrink", "models", "-o", "out", *words]) == 1
    out, err = capfd.readouterr()

    assert tree(Path("out")) == ["a.onnx", "killed.onnx", "sub/deep/b.onnx"]
    assert onnx.load("out/a.onnx") == shrink(chain(True), align="none").model
    assert onnx.load("out/sub/deep/b.onnx") == shrink(normed(True), align="none").model
    assert Path("out/killed.onnx").read_text() == "as it was"
    assert not Path("out/sub/c.onnx").exists()

    assert sorted(err.splitlines()) == [
        "onnxshrink: error: killed.onnx: the process was killed by SIGKILL, out of memory perhaps",
        "onnxshrink: error: models/sub/c.onnx: not an ONNX file, or truncated",
    ]
    rows = [line.split() for line in out.splitlines()]
    assert rows[2][:4] == ["a.onnx", "122", "62", "50.8%"]
    assert rows[3][:2] == ["killed.onnx", "failed"]
    assert rows[4][:2] == ["sub/c.onnx", "failed"]
    assert rows[5][:2] == ["sub/deep/b.onnx", str(parameters(normed(True)))]
    assert out.splitlines()[-1] == "2 of 4 models written, 2 failed."

    told = json.loads(Path("report.json").read_text())["models"]
    assert [(model["model"], model["exit_code"]) for model in told] == [
        ("a.onnx", 0),
        ("killed.onnx", -signal.SIGKILL),
        ("sub/c.onnx", 2),
        ("sub/deep/b.onnx", 0),
    ]
    assert told[0]["report"]["after"]["parameters"] == 62
    assert told[0]["error"] is None
    assert (told[2]["error"], told[2]["report"]) == ("models/sub/c.onnx: not an ONNX file, or truncated", None)


def test_all_went_well(models: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    faked(monkeypatch, REPORT)
    assert main(["shrink", "models", "-o", "new/out", "-q", "--align", "8"]) == 0
    assert capfd.readouterr() == ("", "")
    assert tree(Path("new")) == ["out/a.onnx", "out/sub/c.onnx", "out/sub/deep/b.onnx"]


def test_options_reach_every_model(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, f"{REPORT}; open('options.' + os.path.basename(model), 'w').write('|'.join(options))")
    words = ["--align", "8", "--seed", "3", "--zero-tolerance", "0.5", "--no-verify", "--no-timing"]
    assert main(["shrink", "models", "-o", "out", "-q", *words, "--input", "x=a.npy", "--input", "y=b c.npy"]) == 0
    found = {path.read_text() for path in Path().glob("options.*")}
    assert len(list(Path().glob("options.*"))) == 3
    assert found == {
        "-q|--align|8|--seed|3|--zero-tolerance|0.5|--no-verify|--no-timing|--input|x=a.npy|--input|y=b c.npy"
    }


def test_the_largest_begins(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, REPORT)
    done: list[Outcome] = []
    outcomes = shrink_folder(models, Path("out"), [], 1, done.append)
    sizes = [(models / outcome.model).stat().st_size for outcome in done]
    assert sizes == sorted(sizes, reverse=True)
    assert [outcome.model for outcome in outcomes] == ["a.onnx", "sub/c.onnx", "sub/deep/b.onnx"]


def test_folders_for_results_that_did_not_come_are_removed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, "sys.exit(3) if 'deep' in model or 'sub' in model else None\n" + REPORT)
    Path("there").mkdir()
    shrink_folder(models, Path("there/out"), [], 2, lambda outcome: None)
    assert sorted(path.as_posix() for path in Path("there").rglob("*")) == ["there/out", "there/out/a.onnx"]
    faked(monkeypatch, "sys.exit(3)")
    shrink_folder(models, Path("gone/out"), [], 2, lambda outcome: None)
    assert not Path("gone").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["empty", "-o", "out"], "empty: not a file, and a folder without any *.onnx file"),
        (["models", "-o", "file"], "output file: is not a folder, and models is one"),
        (["models", "-o", "file/out"], "output file/out: cannot be made: Not a directory"),
        (["models", "-o", "out", "--jobs", "0"], "jobs must be at least 1, not 0"),
        (["models", "-o", "out", "--jobs", "x"], "--jobs"),
        (["models", "-o", "out", "--masks", "m.npz"], "--masks m.npz: is for one model; models is a folder"),
        (["models", "-o", "out", "--report", "no/r.json"], "the folder no does not exist"),
        (["models", "-o", "out", "--report", "models/a.onnx"], "could overwrite a model"),
        (
            ["models/a.onnx", "-o", "out.onnx", "--jobs", "2"],
            "--jobs 2: is for a folder of models; models/a.onnx is none",
        ),
    ],
    ids=" ".join,
)
def test_what_cannot_be_used(
    models: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, "sys.exit(9)")
    Path("empty").mkdir()
    Path("file").touch()
    before = tree(Path())
    assert main(["shrink", *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("onnxshrink: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert tree(Path()) == before
    assert not Path("out").exists()


def test_jobs_is_a_number() -> None:
    with pytest.raises(InputError, match="jobs must be at least 1"):
        shrink_folder(Path(), Path(), [], 0, lambda outcome: None)


# --- interrupted -----------------------------------------------------------------------------------------------------

# While the new file lies beside its target, it waits for the signal.
WAITING = """
import os, sys, time
def wait(*paths):
    open('waiting', 'x').close()
    time.sleep(60)
os.replace = wait
sys.argv = ['onnxshrink', *{words!r}]
from onnxshrink.cli import run
run()
"""
PARENT = """
import sys
from onnxshrink import folders
folders.python_command = lambda module, *words: [sys.executable, '-c', {waiting!r}.format(words=words)]
from onnxshrink.cli import run
run()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_a_signal_stops_all_and_leaves_no_partial_file(models: Path, number: signal.Signals) -> None:
    words = ["shrink", "models", "-o", "out", "--align", "none", "--no-verify", "--jobs", "1"]
    code = PARENT.format(waiting=WAITING)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(folders.__file__).parent.parent), *sys.path])}
    options: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    with subprocess.Popen([sys.executable, "-c", code, *words], **options) as process:
        limit = time.monotonic() + 60
        while not Path("waiting").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        assert any(name.endswith(".tmp") for name in tree(Path("out")))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "onnxshrink: error: interrupted"
    assert tree(Path()) == [
        "models/a.onnx",
        "models/sub/c.onnx",
        "models/sub/deep/b.onnx",
        "models/sub/notes.txt",
        "waiting",
    ]
