"""Rules of one's own, for the operators of one's own domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace as changed
from typing import Any, overload

from onnxshrink.notation import Relation, parse, resolve
from onnxshrink.registry import NEWEST, Backward, FoldFunction, Forward, Retain, RewriteFunction, Rule, register
from onnxshrink.view import View

Described = str | tuple[str, Mapping[str, int]] | Relation
"""Notation; notation and the extents of factors that shapes do not tell (`{"g": groups}`); or a finished relation."""
Describe = Callable[[View], Described]


@overload
def rule(
    op: str,
    notation: str,
    *,
    domain: str = ...,
    since: int = ...,
    until: int = ...,
    forward: Forward | None = ...,
    backward: Backward | None = ...,
    retain: Retain | None = ...,
    fold: FoldFunction | None = ...,
    rewrite: RewriteFunction | None = ...,
    partial: tuple[int, ...] = ...,
    replace: bool = ...,
) -> Rule: ...


@overload
def rule(
    op: str,
    notation: None = ...,
    *,
    domain: str = ...,
    since: int = ...,
    until: int = ...,
    forward: Forward | None = ...,
    backward: Backward | None = ...,
    retain: Retain | None = ...,
    fold: FoldFunction | None = ...,
    rewrite: RewriteFunction | None = ...,
    partial: tuple[int, ...] = ...,
    replace: bool = ...,
) -> Callable[[Describe], Describe]: ...


def rule(
    op: str,
    notation: str | None = None,
    *,
    domain: str = "",
    since: int = 1,
    until: int = NEWEST,
    replace: bool = False,
    **functions: Any,
) -> Rule | Callable[[Describe], Describe]:
    """Register what is to be said of an operator.

    With `notation`, the rule is complete: `rule("Scale", "n c *x, c -> n c *x", domain="com.acme")`. Without, this is a
    decorator of a function that gets a `View` of each node and returns the notation for it:

        @rule("GroupedScale", domain="com.acme")
        def grouped_scale(view):
            return "n (g c) *x, g -> n (g c) *x", {"g": view.attribute("groups")}

    A function may raise `UnresolvedError` with the reason why a node is kept whole. A model-local function of this
    name and domain is then not inlined: the rule counts, and not the function's body.

    Args:
        op: operator type.
        notation: how the axes of inputs and outputs hang together; see the page on writing rules.
        domain: operator domain.
        since, until: opset versions of the domain that the rule holds for.
        forward, backward, retain, fold, rewrite, partial: as in `onnxshrink.registry.Rule`; all may be left out.
        replace: take the place of rules that are there already, for a cell that is run again.

    Raises:
        RuleError: the notation is malformed, or there is a rule for this operator and opset.
    """
    whole = Rule(op, domain, since, until, named=True, **functions)
    if notation is not None:
        parse(notation)
        return register(changed(whole, relate=notation), replace)

    def decorate(describe: Describe) -> Describe:
        register(changed(whole, relate=lambda view: _relation(view, describe(view))), replace)
        return describe

    return decorate


def _relation(view: View, described: Described) -> Relation:
    if isinstance(described, Relation):
        return described
    notation, sizes = (described, {}) if isinstance(described, str) else described
    return resolve(notation, view.shapes(view.inputs), view.shapes(view.outputs), dict(sizes))
