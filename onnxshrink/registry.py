"""The table of rules: one per operator, domain and opset range. An operator without one is kept whole."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx

from onnxshrink.errors import RuleError
from onnxshrink.facts import Known, Line
from onnxshrink.graph import Node
from onnxshrink.notation import Relation, resolve
from onnxshrink.view import Fold, View
from onnxshrink.weights import Array, BoolArray

NEWEST = 10_000
ENTRY_POINTS = "onnxshrink.rules"


@dataclass(frozen=True, eq=False)
class Keep:
    """Indices of one input axis that a node needs although no element there is live, and the reason."""

    slot: int
    axis: int
    indices: BoolArray
    reason: str


@dataclass(frozen=True, eq=False)
class Rewrite:
    """What changes at a node besides the slices that its notation tells.

    Attributes:
        constants: new values of constant inputs by slot; arrays, or functions that make them when written.
        attributes: new attribute values; None removes one.
        add: array to be added to the first output, broadcast.
        multiply: array to multiply the first output by, broadcast; before `add`.
        partly: inputs that stay computed except for the elements given, `(mask, values)`.
        append: inputs that get one more index, of ones, at the end of the axis given.
        fixed: elements of the first output that are given a value, `(mask, values)`.
        bypass: input that the readers of the output may read instead.
        select: per output, the axes of which the node still makes every index, though fewer are kept; and these.
        nodes: what takes the place of the node; they name its inputs and outputs as it does.
        weights: constants of `nodes`, by the name that they have there.
    """

    constants: Mapping[int, Array | Callable[[], Array]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    add: Array | None = None
    multiply: Array | None = None
    partly: Mapping[int, tuple[BoolArray, Array]] = field(default_factory=dict)
    append: Mapping[int, int] = field(default_factory=dict)
    fixed: tuple[BoolArray, Array] | None = None
    bypass: int | None = None
    select: Mapping[int, Mapping[int, Array]] = field(default_factory=dict)
    nodes: tuple[onnx.NodeProto, ...] = ()
    weights: Mapping[str, Array] = field(default_factory=dict)


Relate = Callable[[View], Relation]
Forward = Callable[[View], "list[Known | None]"]
Backward = Callable[[View], "list[BoolArray | None]"]
Retain = Callable[[View], Iterable[Keep]]
FoldFunction = Callable[[View], Mapping[int, Fold]]
RewriteFunction = Callable[[View], Rewrite]
Unit = Callable[[View], "int | None"]
Blind = Callable[[View], Mapping[int, int]]
Infinite = Callable[[View], "list[BoolArray | None]"]
Frame = Callable[[View], "Known | None"]
LineFunction = Callable[[View], "Line | None"]
Slots = Callable[[View], "tuple[int, ...]"]


@dataclass(frozen=True, eq=False)
class Rule:
    """What is to be said of an operator.

    Attributes:
        relate: notation, or a function that makes the relation of a node.
        forward: what is known of the outputs; None: only what follows when all inputs are known.
        backward: what is needed of the inputs; None: what the relation says.
        retain: indices of inputs that must stay.
        represent: asked when nothing else grows: indices that should stay so that others can be folded in them.
        fold: constants other than zero that leave.
        rewrite: what changes besides slicing.
        absorbs: inputs whose known elements the operator takes as a compressed constant of any broadcastable shape.
        target: input that holds the output's shape.
        partial: inputs for some values of which the function has no finite value (see `families.partial_in`).
        shape_only: whether inputs without axes in the relation are read for their extents alone, not their elements.
        decodes: whether it makes numbers of stored ones: weights then stay as they are stored, and the node with them.
        unit: the axis along which the elements of the first output sum to one.
        blind: per input, an axis along which one number may be added to all elements without an effect that counts.
        infinite: elements of the outputs that may be minus infinity; None: all, where an input or constant has any.
        frame: what the first output holds but for a frame of zeros, where the operator moves every channel (axis 1) of
            its first input alike, and puts zeros around: a known element holds its value times the image of a one.
        framed: inputs of which constants within such a frame are folded as those without are.
        line: indices of one axis of the first output that all follow one number per position.
        lined: inputs of which such indices may leave but for one, which stands for them.
        plain: the rule for a node that must stay one node, with its inputs and outputs as they are; None: this one.
        refusal: why the operator is kept whole.
        named: whether a model-local function of that name stays a function for this rule, and is not inlined.
        unproven: what the rule rests on, where that is not the operator's specification; the result is then compared
            with the original whatever the user says.
    """

    op: str
    domain: str = ""
    since: int = 1
    until: int = NEWEST
    relate: Relate | str = ""
    forward: Forward | None = None
    backward: Backward | None = None
    retain: Retain | None = None
    represent: Retain | None = None
    fold: FoldFunction | None = None
    rewrite: RewriteFunction | None = None
    absorbs: bool = False
    target: int | None = None
    partial: tuple[int, ...] = ()
    shape_only: bool = False
    decodes: bool = False
    unit: Unit | None = None
    blind: Blind | None = None
    infinite: Infinite | None = None
    frame: Frame | None = None
    framed: tuple[int, ...] = ()
    line: LineFunction | None = None
    lined: Slots | None = None
    plain: Rule | None = None
    refusal: str | None = None
    named: bool = False
    unproven: str = ""

    def relation(self, view: View) -> Relation:
        """The relation of one node. Raises UnresolvedError."""
        if isinstance(self.relate, str):
            found = resolve(self.relate, view.shapes(view.inputs), view.shapes(view.outputs))
        else:
            found = self.relate(view)
        return found if self.shape_only else found.whole(view.shapes(view.inputs))


_rules: dict[tuple[str, str], list[Rule]] = {}
_loaded = False


def register(rule: Rule, replace: bool = False) -> Rule:
    """Add a rule, in the place of all others for the operator with `replace`.

    Raises RuleError when one for the same operator and opset is there already.
    """
    if replace:
        _rules.pop((rule.domain, rule.op), None)
    for other in _rules.setdefault((rule.domain, rule.op), []):
        if rule.since <= other.until and other.since <= rule.until:
            raise RuleError(
                f"two rules for {rule.domain or 'ai.onnx'}.{rule.op} at opset {max(rule.since, other.since)}"
            )
    _rules[rule.domain, rule.op].append(rule)
    return rule


def load() -> None:
    """Import every module of `onnxshrink.ops` and those of installed packages, each of which registers its rules.

    A package names its module under the entry point group `onnxshrink.rules`. Raises RuleError when one fails.
    """
    global _loaded
    if _loaded:
        return
    package = importlib.import_module("onnxshrink.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"onnxshrink.ops.{module.name}")
    _loaded = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # whatever the code of another package raises
            _loaded = False
            raise RuleError(f"entry point {entry.name!r} ({entry.value}) of {ENTRY_POINTS}: {error!r}") from error


def find(op: str, domain: str, version: int) -> Rule | None:
    """The rule of an operator at an opset version, None when there is none."""
    load()
    for rule in _rules.get((domain, op), ()):
        if rule.since <= version <= rule.until:
            return rule
    return None


Lookup = Callable[[Node], "Rule | None"]


def rule_of(node: Node) -> Rule | None:
    """The rule of a node, None when there is none."""
    return find(node.op, node.domain, node.version)


def plain_rule_of(node: Node) -> Rule | None:
    """The rule of a node that must stay one node, with its inputs and outputs as they are."""
    rule = rule_of(node)
    return rule.plain or rule if rule is not None else None


def rules() -> list[Rule]:
    """Every rule, by domain, operator and opset."""
    load()
    return sorted((r for some in _rules.values() for r in some), key=lambda r: (r.domain, r.op, r.since))
