"""The command line: `onnxshrink shrink`, `verify` and `demo`."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Timer
from typing import TYPE_CHECKING, Any, NoReturn

from onnxshrink.errors import InputError, OnnxshrinkError
from onnxshrink.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from onnxshrink.weights import Array

EXIT_INTERNAL = 4
EXIT_INTERRUPTED = 130
_PATIENCE = 1.0  # seconds without a sign of progress
_EPILOG = """exit codes:
  0  done (for shrink: OUT is written)
  2  bad usage, or a file that cannot be used; nothing is written
  3  the outputs differ; nothing is written
  4  internal error; nothing is written
"""


class _Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"onnxshrink: error: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The options, as `--help` shows them."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="onnxshrink",
        description="Remove pruned channels from ONNX models: the same function, smaller weights.",
        epilog=_EPILOG,
        formatter_class=layout,
    )
    parser.add_argument("--version", action="version", version=f"onnxshrink {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--traceback", action="store_true", help="show where an error comes from")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name, help=text, description=text, parents=[common], epilog=_EPILOG, formatter_class=layout
        )
        made.set_defaults(run=run)
        return made

    _add_shrink(command("shrink", "Write a smaller model that computes the same.", _shrink))
    _add_verify(command("verify", "Compare the outputs of two models in onnxruntime.", _verify))
    command("demo", "Shrink a small classifier that ships with the package, and compare.", _demo)
    return parser


def _add_shrink(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL.onnx", help="the model, with zeros where it is pruned")
    parser.add_argument("-o", "--output", metavar="OUT.onnx", required=True, help="the smaller model; may be MODEL")
    parser.add_argument(
        "--masks", metavar="FILE", help="0/1 arrays by weight name: .npz, .pt, .pth or .safetensors; applied first"
    )
    parser.add_argument("--report", metavar="FILE.json", help="write what was removed, what stayed and why")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the outputs of both models")
    parser.add_argument(
        "--align", choices=["none"], default="none", help="none: the fewest parameters (the default, and all there is)"
    )
    parser.add_argument(
        "--zero-tolerance", metavar="T", type=float, default=0.0, help="weights up to T count as zero (0); lossy"
    )
    _add_inputs(parser)
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing unless something is wrong")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reference", metavar="A.onnx", help="the model whose outputs count")
    parser.add_argument("candidate", metavar="B.onnx", help="the model that should compute the same")
    _add_inputs(parser)
    parser.add_argument(
        "--samples", metavar="N", type=int, default=2, help="how many sets of random inputs to draw (2)"
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        metavar="NAME=FILE.npy",
        action="append",
        default=[],
        dest="inputs",
        help="values of one input for the comparison; others are drawn at random (repeatable)",
    )
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the random inputs (0)")


# --- commands ------------------------------------------------------------------------------------------------------


def _shrink(arguments: argparse.Namespace) -> int:
    from onnxshrink.shrink import shrink

    inputs = _read_inputs(arguments.inputs)
    with _progress(arguments.quiet) as step:
        result = shrink(
            arguments.model,
            arguments.masks,
            output=arguments.output,
            verify=not arguments.no_verify,
            inputs=inputs,
            seed=arguments.seed,
            align=arguments.align,
            zero_tolerance=arguments.zero_tolerance,
            report=arguments.report,
            progress=step,
        )
    if not arguments.quiet:
        from onnxshrink.tables import print_report

        print_report(_console(), result.report, verified=not arguments.no_verify)
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    from onnxshrink.tables import print_equivalence
    from onnxshrink.verify import verify

    inputs = _read_inputs(arguments.inputs)
    with _progress() as step:
        step("comparing")
        equivalence = verify(
            arguments.reference, arguments.candidate, inputs=inputs, samples=arguments.samples, seed=arguments.seed
        )
    print_equivalence(_console(), equivalence)
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from onnxshrink import demo

    return demo.main()


def _read_inputs(given: Sequence[str]) -> Mapping[str, Array]:
    """`NAME=FILE.npy`, several times, as arrays by name. Raises InputError."""
    inputs: dict[str, Array] = {}
    for text in given:
        name, separator, path = text.rpartition("=")
        if not separator or not name or not path:
            raise InputError(f"--input {text}: must be NAME=FILE.npy")
        if name in inputs:
            raise InputError(f"--input {name}: is given twice")
        inputs[name] = _read_array(name, path)
    return inputs


def _read_array(name: str, path: str) -> Array:
    import numpy as np

    try:
        with open(path, "rb") as file:
            value = np.load(file, allow_pickle=False)
    except OSError as error:
        raise InputError(f"--input {name}: {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"--input {name}: {path} is not a .npy file") from error
    if not isinstance(value, np.ndarray):
        raise InputError(f"--input {name}: {path} holds several arrays; save one with numpy.save")
    return value


def _console() -> Console:
    from rich.console import Console

    return Console(soft_wrap=False, highlight=False)


@contextlib.contextmanager
def _progress(quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A line on the terminal that names the step, once it takes long enough to wonder."""
    if quiet or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console

    status = Console(stderr=True).status("starting")
    timer = Timer(_PATIENCE, status.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda name: status.update(f"{name} ...")
    finally:
        timer.cancel()
        timer.join()
        status.stop()


# --- errors --------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code."""
    try:
        arguments = make_parser().parse_args(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
            code: int = arguments.run(arguments)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # the reader has seen enough, as in `onnxshrink ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED, arguments)
    except OnnxshrinkError as error:
        return _fail(str(error), error.exit_code, arguments)
    except Exception as error:
        hint = "" if arguments.traceback else "; --traceback shows where, please report it"
        return _fail(f"internal error: {_describe(error)}{hint}", EXIT_INTERNAL, arguments)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip(": ")


def _fail(message: str, code: int, arguments: Any) -> int:
    if arguments.traceback:
        traceback.print_exc()
    print(f"onnxshrink: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def run() -> NoReturn:
    """The entry point of the command `onnxshrink`."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


def _terminate(number: int, frame: object) -> NoReturn:
    """Being told to stop is an interruption: what is half written is cleaned up."""
    raise KeyboardInterrupt
