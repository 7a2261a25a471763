"""Checkers for whoever writes a rule: what it claims is compared with what onnxruntime computes.

Each checker takes a model (one node, or any other) and inputs, and raises `RuleViolation` where a claim is wrong:

- `check_forward`: elements claimed known hold their value whatever the inputs are;
- `check_backward`: elements claimed unneeded may hold anything without an output moving;
- `check_shrink`: the smaller model is valid, has the same interface, and computes the same function.

`embed` makes a model out of a single node in which there is something to claim: dead slices before it and behind it.
`check_rule` does all of this for many cases of one operator, and counts what was claimed: a rule that learns nothing
passes every check. Cases are onnx's own, or made by `make_case`.
"""

from __future__ import annotations

from onnxshrink.testing.cases import Case, Tally, check_rule, embed, make_case, node_cases
from onnxshrink.testing.checks import Shrinkage, check_backward, check_forward, check_shrink, parameters, shrink_model
from onnxshrink.testing.running import Feed, InputsCannotRun, RuleViolation, compare, run

__all__ = [
    "Case",
    "Feed",
    "InputsCannotRun",
    "RuleViolation",
    "Shrinkage",
    "Tally",
    "check_backward",
    "check_forward",
    "check_rule",
    "check_shrink",
    "compare",
    "embed",
    "make_case",
    "node_cases",
    "parameters",
    "run",
    "shrink_model",
]
