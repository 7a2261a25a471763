"""The command line: its commands, its errors, its exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

from onnxshrink.commands import apply, bench, demo, plan, shrink, verify
from onnxshrink.errors import OnnxshrinkError
from onnxshrink.version import __version__


class _Command(Protocol):
    """What a module of `onnxshrink.commands` has."""

    TEXT: str

    def add(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


_COMMANDS: dict[str, _Command] = {
    "shrink": shrink,
    "plan": plan,
    "apply": apply,
    "verify": verify,
    "bench": bench,
    "demo": demo,
}
EXIT_INTERNAL = 4
EXIT_INTERRUPTED = 130
_EPILOG = """exit codes:
  0  done (for shrink, plan and apply: OUT is written)
  1  of the models of a folder, some could not be shrunk; the others are written
  2  bad usage, or a file that cannot be used; nothing is written
  3  the outputs differ; nothing is written
  4  internal error; nothing is written
  130  interrupted; no partial file is left
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
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name, help=module.TEXT, description=module.TEXT, parents=[common], epilog=_EPILOG, formatter_class=layout
        )
        module.add(command)
        command.set_defaults(run=module.run)
    return parser


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
    # onnxruntime would keep an identity in the home folder and report to its makers; only before it is imported can
    # it be told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


def _terminate(number: int, frame: object) -> NoReturn:
    """Being told to stop is an interruption: what is half written is cleaned up."""
    raise KeyboardInterrupt
