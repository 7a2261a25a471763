"""The command line: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import importlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import build, draw
from networks import chain, normed, residual, unknown

import onnxshrink
from onnxshrink.cli import main
from onnxshrink.lazy import LazyModel
from onnxshrink.measure import parameters
from onnxshrink.processes import python_command

engine: Any = importlib.import_module("onnxshrink.shrink")  # the name in the package is the function
Run = Callable[..., tuple[int, str, str]]
# As in test_shrink: `chain` whole, and without two of its four channels.
WHOLE, SMALL = 122, 62


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A command in an empty folder: exit code, what it printed, what it complained."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run_it(*words: str) -> tuple[int, str, str]:
        code = main(words)
        printed = capfd.readouterr()
        return code, printed.out, printed.err

    return run_it


def one_line(error: str) -> str:
    assert error.startswith("onnxshrink: error: ")
    assert error.count("\n") == 1
    return error


# --- shrink -----------------------------------------------------------------------------------------------------


def test_shrink_writes_the_model_and_prints_what_it_did(run: Run) -> None:
    onnx.save(chain(True), "big.onnx")
    code, out, err = run("shrink", "big.onnx", "-o", "small.onnx")
    assert (code, err) == (0, "")
    assert parameters(onnx.load("small.onnx")) == SMALL
    lines = out.splitlines()
    assert "parameters" in lines[2]
    assert lines[2].split() == ["parameters", "122", "62", "50.8%"]
    assert any(line.split() == ["Conv(a)", "w1", "4x3x3x3", "2x3x3x3"] for line in lines)
    assert any(line.split() == ["Conv(y)", "w2", "2x4x1x1", "2x2x1x1"] for line in lines)
    assert any(line.startswith("Verified: the outputs differ by at most ") for line in lines)
    assert all(len(line) <= 80 for line in lines)
    assert "\x1b" not in out


def test_what_stays_is_named_with_its_reason(run: Run) -> None:
    onnx.save(residual(True), "big.onnx")
    _, out, _ = run("shrink", "big.onnx", "-o", "small.onnx")
    assert "Channels without effect that stay:\n  1 for Add(t): " in out


def test_operators_without_a_rule_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = sys.modules["onnxshrink.registry"]
    find = registry.find
    monkeypatch.setattr(registry, "find", lambda op, *rest: None if op == "Hardmax" else find(op, *rest))
    onnx.save(unknown(True), "big.onnx")
    _, out, _ = run("shrink", "big.onnx", "-o", "small.onnx")
    assert "Operators kept whole:\n  1 Hardmax: no rule for this operator\n" in out


def test_long_names_and_numbers_stay_readable_in_80_columns(run: Run) -> None:
    model = normed(True)
    for number, node in enumerate(model.graph.node):
        node.name = "/backbone/features/stage3/block12/" * 3 + f"{node.op_type}_{number}"
    onnx.save(model, "big.onnx")
    _, out, _ = run("shrink", "big.onnx", "-o", "small.onnx")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "4x3x1x1" in out


def test_quiet_prints_nothing(run: Run) -> None:
    onnx.save(chain(True), "big.onnx")
    assert run("shrink", "big.onnx", "-o", "small.onnx", "-q") == (0, "", "")
    assert parameters(onnx.load("small.onnx")) == SMALL


def test_report_is_json_with_every_index(run: Run) -> None:
    onnx.save(chain(True), "big.onnx")
    assert run("shrink", "big.onnx", "-o", "small.onnx", "--report", "report.json")[0] == 0
    report = json.loads(Path("report.json").read_text())
    assert report["before"]["parameters"] == WHOLE
    assert report["after"]["parameters"] == SMALL
    assert report["after"]["bytes"] == Path("small.onnx").stat().st_size
    assert report["weights"]["w1"] == [
        {"axis": 0, "kept": [[0, 0], [2, 2]], "removed": [[1, 1], [3, 3]], "node": "Conv(a)"}
    ]


def test_nothing_to_remove_is_said(run: Run) -> None:
    onnx.save(chain(False), "big.onnx")
    code, out, _ = run("shrink", "big.onnx", "-o", "small.onnx")
    assert code == 0
    assert out.startswith("Nothing removed")
    assert Path("small.onnx").read_bytes() == Path("big.onnx").read_bytes()


def test_masks_and_inputs_from_files(run: Run) -> None:
    onnx.save(chain(False), "big.onnx")
    mask = np.ones((4, 3, 3, 3))
    mask[[1, 3]] = 0
    np.savez("masks.npz", w1=mask, b1=mask[:, 0, 0, 0])
    np.save("x.npy", draw(2, 3, 6, 6))
    code, _, err = run("shrink", "big.onnx", "-o", "small.onnx", "--masks", "masks.npz", "--input", "x=x.npy")
    assert (code, err) == (0, "")
    assert parameters(onnx.load("small.onnx")) == SMALL


def test_seed_and_no_verify_reach_the_engine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def shrink(*given: Any, **options: Any) -> Any:
        seen.update(options)
        return onnxshrink.shrink(*given, **{**options, "progress": None})

    monkeypatch.setattr(engine, "shrink", shrink)
    onnx.save(chain(True), "big.onnx")
    code, out, _ = run("shrink", "big.onnx", "-o", "small.onnx", "--seed", "7", "--no-verify", "--align", "none")
    assert code == 0
    assert (seen["seed"], seen["verify"], seen["align"]) == (7, False, "none")
    assert "Not verified." in out


def test_output_may_be_the_input(run: Run) -> None:
    onnx.save(chain(True), "model.onnx")
    assert run("shrink", "model.onnx", "-o", "model.onnx", "-q") == (0, "", "")
    assert parameters(onnx.load("model.onnx")) == SMALL
    assert os.listdir() == ["model.onnx"]


# --- verify and demo --------------------------------------------------------------------------------------------


def test_verify_prints_the_figures(run: Run) -> None:
    onnx.save(chain(True), "a.onnx")
    onnxshrink.shrink("a.onnx", output="b.onnx")
    code, out, err = run("verify", "a.onnx", "b.onnx", "--samples", "3", "--seed", "5")
    assert (code, err) == (0, "")
    assert out.startswith("The models compute the same.")
    assert out.splitlines()[-1].split()[-3:] == ["1", "x", "3"]


def test_verify_names_the_first_tensor_that_diverges(run: Run) -> None:
    onnx.save(chain(True), "a.onnx")
    onnx.save(chain(False), "b.onnx")
    code, out, err = run("verify", "a.onnx", "b.onnx")
    assert (code, out) == (3, "")
    assert "first tensor that diverges: 'a' of Conv" in one_line(err)


def test_demo_compares_the_models(run: Run) -> None:
    code, out, err = run("demo")
    assert (code, err) == (0, "")
    assert "predictions on 450 held-out images: identical" in out


# --- bad input --------------------------------------------------------------------------------------------------


def save_chain() -> None:
    onnx.save(chain(True), "model.onnx")


def save_text() -> None:
    Path("model.onnx").write_text("this is no model")


def save_truncated() -> None:
    data = chain(True).SerializeToString()
    Path("model.onnx").write_bytes(data[: len(data) // 2])


def save_empty() -> None:
    Path("model.onnx").touch()


def save_folder() -> None:
    Path("model.onnx").mkdir()


def save_undefined_name() -> None:
    model = chain(True)
    model.graph.node[0].input[0] = "nowhere"
    onnx.save(model, "model.onnx")


def save_short_weight() -> None:
    model = chain(True)
    model.graph.initializer[0].raw_data = b"\0" * 8
    onnx.save(model, "model.onnx")


def save_external(location: str, write: bool = True) -> None:
    model = chain(True)
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    if write:
        Path(location).parent.mkdir(exist_ok=True)
        Path(location).write_bytes(data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="length", value=str(len(data)))
    onnx.save(model, "model.onnx")


def save_cut_external() -> None:
    save_external("weights")
    Path("weights").write_bytes(b"\0" * 8)


def save_linked_external() -> None:
    """A link inside the folder to a file outside of it."""
    Path("../elsewhere").write_bytes(b"\0" * 432)
    Path("weights").symlink_to("../elsewhere")
    save_external("weights", write=False)


BAD_MODELS: dict[str, tuple[Callable[[], None], str]] = {
    "missing": (lambda: None, "model.onnx: no such file"),
    "folder": (save_folder, "model.onnx: not a file"),
    "text": (save_text, "not an ONNX file"),
    "truncated": (save_truncated, "not an ONNX file, or truncated"),
    "empty": (save_empty, "not an ONNX file"),
    "undefined name": (save_undefined_name, "nowhere"),
    "short weight": (save_short_weight, "w1"),
    "external missing": (lambda: save_external("weights", write=False), "is missing"),
    "external cut": (save_cut_external, "truncated"),
    "external outside": (lambda: save_external("../weights"), "outside the model's folder"),
    "external absolute": (lambda: save_external("/etc/hostname", write=False), "outside the model's folder"),
    "external through a link": (save_linked_external, "outside the model's folder"),
}


@pytest.mark.parametrize(("prepare", "message"), BAD_MODELS.values(), ids=list(BAD_MODELS))
@pytest.mark.parametrize("masks", [False, True], ids=["", "masks"])
def test_models_that_cannot_be_used(run: Run, prepare: Callable[[], None], message: str, masks: bool) -> None:
    prepare()
    np.savez("masks.npz", b1=np.ones(4))
    Path("out.onnx").write_text("as it was")
    before = sorted(os.listdir())
    code, out, err = run("shrink", "model.onnx", "-o", "out.onnx", *(["--masks", "masks.npz"] if masks else []))
    assert (code, out) == (2, "")
    assert message in one_line(err)
    assert Path("out.onnx").read_text() == "as it was"
    assert sorted(os.listdir()) == before


class Evil:
    """What a malicious pickle does when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch evil",)


def save_masks(name: str) -> None:
    """A mask file of each bad kind, by its name."""
    one = np.ones(4)
    buffer = io.BytesIO()
    match Path(name).stem:
        case "object":
            np.savez(buffer, b1=np.array([Evil()], dtype=object))
        case "pickle":
            buffer.write(pickle.dumps({"b1": Evil()}))
        case "text":
            buffer.write(b"b1 1 1 1 1")
        case "shape":
            np.savez(buffer, b1=np.ones(3))
        case "values":
            np.savez(buffer, b1=one / 2)
        case "name":
            np.savez(buffer, b1_=one)
        case "single":
            np.save(buffer, one)
    Path(name).write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.npz", "no such file"),
        ("text.csv", "unknown format '.csv'"),
        ("text.npz", "broken"),
        ("object.npz", "broken, or not plain tensors"),
        ("pickle.npz", "broken, or not plain tensors"),
        ("pickle.pt", "broken, or not plain tensors"),
        ("pickle.pth", "broken, or not plain tensors"),
        ("shape.npz", "has shape [3]"),
        ("values.npz", "holds 0.5"),
        ("name.npz", "'b1_' matches no initializer; near names: 'b1'"),
        ("single.npz", "holds a single array"),
    ],
)
def test_masks_that_cannot_be_used(run: Run, name: str, message: str) -> None:
    if name.endswith((".pt", ".pth")):
        pytest.importorskip("torch", reason="PyTorch is not installed")
    save_chain()
    if "missing" not in name:
        save_masks(name)
    code, out, err = run("shrink", "model.onnx", "-o", "out.onnx", "--masks", name)
    assert (code, out) == (2, "")
    assert message in one_line(err)
    assert not Path("out.onnx").exists()
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "missing/out.onnx"], "the folder missing does not exist"),
        (["-o", "model.onnx/out.onnx"], "the folder model.onnx does not exist"),
        (["-o", "out.onnx", "--report", "missing/report.json"], "the folder missing does not exist"),
        (["-o", "out.onnx", "--report", "model.onnx"], "would overwrite the model"),
        (["-o", "out.onnx", "--input", "x"], "must be NAME=FILE.npy"),
        (["-o", "out.onnx", "--input", "x=missing.npy"], "missing.npy cannot be read"),
        (["-o", "out.onnx", "--input", "x=model.onnx"], "is not a .npy file"),
        (["-o", "out.onnx", "--input", "x=x.npz"], "holds several arrays"),
        (["-o", "out.onnx", "--input", "z=x.npy"], "'z'"),
        (["-o", "out.onnx", "--input", "x=x.npy"], "'x'"),
        (["-o", "out.onnx", "--input", "x=x.npy", "--input", "x=x.npy"], "given twice"),
        (["-o", "out.onnx", "--align", "some"], "--align"),
        (["-o", "out.onnx", "--align", "0"], "--align"),
        (["-o", "out.onnx", "--seed", "x"], "--seed"),
        (["-o", "out.onnx", "--nonsense"], "--nonsense"),
        ([], "-o/--output"),
    ],
    ids=" ".join,
)
def test_options_that_cannot_be_used(run: Run, words: list[str], message: str) -> None:
    save_chain()
    np.save("x.npy", np.zeros((1, 3, 6, 7), np.float32))
    np.savez("x.npz", x=np.zeros(1))
    before = sorted(os.listdir())
    code, out, err = run("shrink", "model.onnx", *words)
    assert (code, out) == (2, "")
    assert message in one_line(err)
    assert sorted(os.listdir()) == before


def test_a_folder_that_is_not_writable(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save_chain()
    monkeypatch.setattr(os, "access", lambda *given: False)
    code, _, err = run("shrink", "model.onnx", "-o", "out.onnx")
    assert code == 2
    assert "not writable" in one_line(err)


def test_a_write_that_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save_chain()

    def refuse(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if "x" in mode:
            raise PermissionError(13, "Permission denied")
        return original(path, mode, *rest, **options)

    original = Path.open
    monkeypatch.setattr(Path, "open", refuse)
    code, _, err = run("shrink", "model.onnx", "-o", "out.onnx")
    assert code == 2
    assert "out.onnx: cannot be written: Permission denied" in one_line(err)
    assert os.listdir() == ["model.onnx"]


@pytest.mark.parametrize("words", [[], ["nonsense"], ["verify", "a.onnx"], ["verify", "missing.onnx", "missing.onnx"]])
def test_other_commands_say_no_in_one_line(run: Run, words: list[str]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    one_line(err)


# --- what goes wrong inside -------------------------------------------------------------------------------------


def break_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    apply = engine.apply

    def broken(*given: Any) -> LazyModel:
        model = apply(*given).whole()
        (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "b2"]
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, "b2"))
        return LazyModel(model)

    monkeypatch.setattr(engine, "apply", broken)


def test_outputs_that_differ_have_a_code_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save_chain()
    Path("out.onnx").write_text("as it was")
    break_weight(monkeypatch)
    code, out, err = run("shrink", "model.onnx", "-o", "out.onnx", "--report", "report.json")
    assert (code, out) == (3, "")
    assert "first tensor that diverges: 'y' of Conv" in one_line(err)
    assert Path("out.onnx").read_text() == "as it was"
    assert sorted(os.listdir()) == ["model.onnx", "out.onnx"]


def fail(*given: Any, **options: Any) -> Any:
    raise ZeroDivisionError("a fault\nof two lines")


def test_unexpected_errors_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save_chain()
    monkeypatch.setattr(engine, "analyse", fail)
    code, out, err = run("shrink", "model.onnx", "-o", "out.onnx")
    assert (code, out) == (4, "")
    assert "internal error: ZeroDivisionError: a fault of two lines; --traceback shows where" in one_line(err)


def test_traceback_shows_where(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save_chain()
    monkeypatch.setattr(engine, "analyse", fail)
    code, _, err = run("shrink", "model.onnx", "-o", "out.onnx", "--traceback")
    assert code == 4
    assert err.startswith("Traceback")
    assert err.splitlines()[-1] == "onnxshrink: error: internal error: ZeroDivisionError: a fault of two lines"


def test_interrupting_is_no_fault(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any) -> Any:
        raise KeyboardInterrupt

    save_chain()
    monkeypatch.setattr(engine, "analyse", interrupt)
    code, _, err = run("shrink", "model.onnx", "-o", "out.onnx")
    assert code == 130
    assert one_line(err) == "onnxshrink: error: interrupted\n"
    assert os.listdir() == ["model.onnx"]


# --- as a process -----------------------------------------------------------------------------------------------


def process(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "onnxshrink", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_the_module_runs_without_a_warning(tmp_path: Path) -> None:
    onnx.save(normed(True), tmp_path / "big.onnx")
    done = process("shrink", "big.onnx", "-o", "small.onnx", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert parameters(onnx.load(tmp_path / "small.onnx")) < parameters(normed(True))
    done = process("shrink", "missing.onnx", "-o", "small.onnx", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "onnxshrink: error: missing.onnx: no such file\n"


def test_nothing_is_written_outside_the_folder_of_the_output(tmp_path: Path) -> None:
    """The runtime, left to itself, keeps an identity in the home folder."""
    folders = {name: tmp_path / name for name in ("home", "in", "out")}
    for folder in folders.values():
        folder.mkdir()
    onnx.save(chain(True), folders["in"] / "big.onnx")
    home = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR"), str(folders["home"]))
    command = python_command("onnxshrink", "shrink", "../in/big.onnx", "-o", "../out/small.onnx", "--align", "none")
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    done = subprocess.run(command, cwd=folders["home"], env=environment | home, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Verified" in done.stdout
    assert [os.listdir(folder) for folder in folders.values()] == [[], ["big.onnx"], ["small.onnx"]]


def test_a_process_that_is_told_to_stop_cleans_up(tmp_path: Path) -> None:
    onnx.save(chain(True), tmp_path / "big.onnx")
    code = """
import os, signal
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGTERM)  # while the file is beside its target
from onnxshrink.cli import run
run()
"""
    command = [sys.executable, "-c", code, "shrink", "big.onnx", "-o", "small.onnx"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "onnxshrink: error: interrupted\n")
    assert os.listdir(tmp_path) == ["big.onnx"]


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"onnxshrink {onnxshrink.__version__}\n", "")
    for words in (["--help"], ["shrink", "--help"], ["verify", "--help"]):
        code, out, _ = run(*words)
        assert code == 0
        for number in "0234":
            assert f"\n  {number}  " in out


def test_runtime_and_library_chatter_does_not_reach_the_user(run: Run) -> None:
    """An initializer that nothing reads makes onnxruntime warn; so does folding in graph-surgeon."""
    model = chain(True)
    model.graph.initializer.append(onnx.numpy_helper.from_array(draw(3), "unused"))
    onnx.save(model, "big.onnx")
    assert run("shrink", "big.onnx", "-o", "small.onnx", "-q") == (0, "", "")
    text = "g (float[N, 5] x) => (float[N, 5] y) { s = Sqrt(w) y = Mul(x, s) }"
    onnx.save(build(text, w=-np.ones(5, np.float32)), "nan.onnx")
    code, _, err = run("shrink", "nan.onnx", "-o", "small.onnx", "-q")
    assert (code, err) == (0, "")
