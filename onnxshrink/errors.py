"""The errors that onnxshrink raises, and the exit code that each one has on the command line."""

from __future__ import annotations


class OnnxshrinkError(Exception):
    """Base of every error that onnxshrink raises on purpose. Its message is one line: what, where, what to do."""

    exit_code = 4


class InputError(OnnxshrinkError):
    """The model, an option, or an input file cannot be used."""

    exit_code = 2


class MaskError(InputError):
    """A mask matches nothing, has the wrong shape, or holds values other than 0 and 1."""


class DifferenceError(OnnxshrinkError):
    """The two models do not compute the same function."""

    exit_code = 3


class RuleError(OnnxshrinkError):
    """A rule is malformed, registered twice, or contradicts the operator that it describes."""
