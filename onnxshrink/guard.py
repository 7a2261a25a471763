"""A rule that fails costs no run: its node is kept whole, as one without a rule is, and the report says so."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from onnxshrink.errors import OnnxshrinkError
from onnxshrink.graph import Node
from onnxshrink.notation import UnresolvedError
from onnxshrink.registry import Lookup, Rule
from onnxshrink.view import View

T = TypeVar("T")


class RuleWarning(UserWarning):
    """A rule failed where it should have given an answer or a reason: a fault of the rule."""


class _RuleFailure(Exception):  # noqa: N818 - never seen outside
    def __init__(self, node: Node, error: Exception) -> None:
        super().__init__(f"its rule failed ({type(error).__name__}: {error})")
        self.node = node


def despite_faults(lookup: Lookup, run: Callable[[Lookup], T]) -> T:
    """What `run` returns with rules from `lookup`, once more without a rule for each node where one fails.

    A rule that fails twice is not asked again.
    """
    guarded = _Guarded(lookup)
    while True:
        try:
            return run(guarded)
        except _RuleFailure as failure:
            guarded.give_up(failure)
            warnings.warn(
                f"{failure.node.op} {failure.node.label!r} is kept whole: {failure}", RuleWarning, stacklevel=2
            )


@dataclass
class _Guarded:
    """A lookup of rules whose unforeseen errors name the node."""

    lookup: Lookup
    _failed: dict[int | Rule, str] = field(default_factory=dict)
    _nodes: list[Node] = field(default_factory=list)
    _rules: dict[Rule, Rule] = field(default_factory=dict)

    def __call__(self, node: Node) -> Rule | None:
        rule = self.lookup(node)
        if rule is None:
            return None
        reason = self._failed.get(node.index, self._failed.get(rule))
        if reason is not None:
            return Rule(node.op, node.domain, refusal=reason)
        if rule not in self._rules:
            self._rules[rule] = _guarded(rule)
        return self._rules[rule]

    def give_up(self, failure: _RuleFailure) -> None:
        """Ask the rule no more: at this node, or at any where it has failed before."""
        rule = self.lookup(failure.node)
        again = rule is not None and any(self.lookup(node) is rule for node in self._nodes)
        self._failed[rule if again and rule is not None else failure.node.index] = str(failure)
        self._nodes.append(failure.node)


def _guarded(rule: Rule) -> Rule:
    parts: dict[str, Any] = {part.name: getattr(rule, part.name) for part in fields(rule)}
    guards: dict[str, Any] = {name: _guard(part) for name, part in parts.items() if callable(part)}
    return replace(rule, **guards)


def _guard(function: Callable[[View], Any]) -> Callable[[View], Any]:
    @functools.wraps(function)
    def guarded(view: View) -> Any:
        try:
            found = function(view)
            return list(found) if inspect.isgenerator(found) else found
        except (OnnxshrinkError, UnresolvedError, MemoryError, _RuleFailure):
            raise
        except Exception as error:
            raise _RuleFailure(view.node, error) from error

    return guarded
