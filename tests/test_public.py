"""The public names: there, documented, and cheap to import."""

from __future__ import annotations

import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys

import pytest

import onnxshrink

NAMES = [
    "DifferenceError",
    "Equivalence",
    "InputError",
    "MaskError",
    "OnnxshrinkError",
    "OutputsDiffer",
    "Report",
    "RuleError",
    "ShrinkPlan",
    "ShrinkResult",
    "__version__",
    "apply_plan",
    "export",
    "make_plan",
    "rule",
    "shrink",
    "verify",
]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_names() -> None:
    assert set(NAMES) <= set(onnxshrink.__all__)
    assert onnxshrink.__all__ == sorted(onnxshrink.__all__)
    assert all(hasattr(onnxshrink, name) for name in onnxshrink.__all__)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_everything_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(onnxshrink, name))


def test_version() -> None:
    assert importlib.metadata.version("onnxshrink") == onnxshrink.__version__


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        (
            "shrink",
            "model masks * output verify inputs samples seed align report progress",
        ),
        ("verify", "reference candidate * inputs samples seed kept"),
        ("make_plan", "model masks * inputs seed align timing zero_tolerance progress"),
        (
            "apply_plan",
            "model plan masks * output verify inputs samples seed zero_tolerance report progress",
        ),
    ],
)
def test_signatures(name: str, parameters: str) -> None:
    found = inspect.signature(getattr(onnxshrink, name)).parameters.values()
    positional = [p.name for p in found if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in found if p.kind is p.KEYWORD_ONLY]
    expected_positional, _, expected_keywords = parameters.partition(" * ")
    assert positional == expected_positional.split()
    assert set(expected_keywords.split()) <= set(keywords)


@pytest.mark.parametrize(
    ("error", "base", "code"),
    [
        ("InputError", "OnnxshrinkError", 2),
        ("MaskError", "InputError", 2),
        ("DifferenceError", "OnnxshrinkError", 3),
        ("OutputsDiffer", "DifferenceError", 3),
        ("RuleError", "OnnxshrinkError", 4),
        ("OnnxshrinkError", None, 4),
    ],
)
def test_errors(error: str, base: str | None, code: int) -> None:
    found = getattr(onnxshrink, error)
    assert issubclass(found, getattr(onnxshrink, base) if base else Exception)
    assert found.exit_code == code


def test_importing_does_not_import_torch() -> None:
    assert python("import sys, onnxshrink, onnxshrink.cli; print('torch' in sys.modules)") == "False"


def test_importing_imports_little_and_names_come_when_they_are_asked_for() -> None:
    code = """
import sys, onnxshrink, onnxshrink.cli
onnxshrink.cli.make_parser()
print([name for name in ("numpy", "onnx", "onnxruntime", "rich", "onnx_graphsurgeon") if name in sys.modules])
print(onnxshrink.shrink.__module__, onnxshrink.Equivalence.__module__, set(onnxshrink.__all__) <= set(dir(onnxshrink)))
"""
    assert python(code).splitlines() == ["[]", "onnxshrink.shrink onnxshrink.verify True"]


def test_the_runtime_is_imported_when_it_runs_something() -> None:
    code = """
import sys, onnxshrink
onnxshrink.shrink
print("onnxruntime" in sys.modules)
"""
    assert python(code) == "False"


def test_what_runs_models_and_reads_masks_is_imported_where_it_is_used() -> None:
    code = """
import sys, onnxshrink
from onnxshrink.demo import model_path
names = ["onnxshrink." + name for name in ("verify", "segments", "masks", "mask_names", "replacement", "speed.auto")]
onnxshrink.shrink(model_path(), verify=False, align="none")
print([name for name in names if name in sys.modules])
onnxshrink.shrink(model_path(), {}, align="none")
print([name for name in names if name not in sys.modules])
"""
    assert python(code).splitlines() == ["[]", "['onnxshrink.replacement', 'onnxshrink.speed.auto']"]


def test_names_that_do_not_exist_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="module 'onnxshrink' has no attribute 'shrunk'"):
        _ = onnxshrink.shrunk


def test_functions_stay_functions_when_the_modules_of_their_name_are_imported() -> None:
    code = (
        "import onnxshrink.shrink, onnxshrink.verify; print(callable(onnxshrink.shrink), callable(onnxshrink.verify))"
    )
    assert python(code) == "True True"


def test_without_torch_export_says_what_to_install() -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["torch.nn"] = None
import onnxshrink
try:
    onnxshrink.export(None, ())
except ImportError as error:
    print(error)
"""
    assert python(code) == "onnxshrink.torch needs PyTorch: pip install 'onnxshrink[torch]'"


def test_the_package_is_typed() -> None:
    files = importlib.resources.files("onnxshrink")
    assert files.joinpath("py.typed").is_file()
