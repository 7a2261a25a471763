"""A plan as a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from onnxshrink.errors import InputError
from onnxshrink.facts import Known
from onnxshrink.planning.data import Cause, Kept, Plan
from onnxshrink.transfer import encoding as e
from onnxshrink.transfer.facts import Facts
from onnxshrink.transfer.fingerprint import Fingerprint
from onnxshrink.version import __version__
from onnxshrink.view import Fold

_FORMAT = "onnxshrink plan"


@dataclass(frozen=True, eq=False)
class ShrinkPlan:
    """What is to be done to one model: made by `make_plan`, carried out by `apply_plan`, here or elsewhere. Data only.

    Attributes:
        plan: what stays of every tensor, and what is folded where.
        facts: what analysis found out.
        fingerprint: of the model that it is for, masks applied.
        parameters: of that model, and of the smaller one.
        whole: whether the model stays as it is.
        note: why it does, although something could go.
        version: of the onnxshrink that made it, the only one that carries it out.
    """

    plan: Plan
    facts: Facts
    fingerprint: Fingerprint
    parameters: tuple[int, int]
    whole: bool = False
    note: str | None = None
    version: str = __version__

    def summary(self) -> str:
        """What the plan does, in a sentence."""
        if self.whole:
            return f"Nothing goes: {self.note or 'no channel can go'}."
        before, after = self.parameters
        return f"{before:,} parameters become {after:,}" + (f" ({after / before:.1%})." if before else ".")

    def to_json(self) -> str:
        """The plan as text in JSON, to be read by `from_json`."""
        data = {
            "format": _FORMAT,
            "version": self.version,
            "fingerprint": {"graph": self.fingerprint.graph, "weights": dict(self.fingerprint.weights)},
            "parameters": self.parameters,
            "whole": self.whole,
            "note": self.note,
            "plan": _encode_plan(self.plan),
            "facts": _encode_facts(self.facts),
        }
        return json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> ShrinkPlan:
        """A plan from what `to_json` wrote. Raises InputError when it is none, or another version's."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InputError(f"not a plan: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise InputError("not a plan: `onnxshrink plan` writes one")
        if data.get("version") != __version__:
            raise InputError(f"the plan is one of onnxshrink {data.get('version')}, this is {__version__}: plan again")
        try:
            return cls(
                plan=_decode_plan(data["plan"]),
                facts=_decode_facts(data["facts"]),
                fingerprint=Fingerprint(str(data["fingerprint"]["graph"]), dict(data["fingerprint"]["weights"])),
                parameters=(int(data["parameters"][0]), int(data["parameters"][1])),
                whole=bool(data["whole"]),
                note=data["note"],
            )
        except Exception as error:
            raise InputError(f"the plan is damaged: {type(error).__name__}: {error}") from error


def read_plan(path: str | os.PathLike[str]) -> ShrinkPlan:
    """A plan from a file. Raises InputError."""
    try:
        with open(path, "rb") as file:
            text = file.read()
    except OSError as error:
        raise InputError(f"plan {os.fspath(path)}: cannot be read: {error.strerror or error}") from error
    try:
        return ShrinkPlan.from_json(text)
    except InputError as error:
        raise InputError(f"plan {os.fspath(path)}: {error}") from error


# --- the plan ------------------------------------------------------------------------------------------------------


def _encode_plan(plan: Plan) -> dict[str, Any]:
    return {
        "kept": {name: list(map(e.encode_mask, kept)) for name, kept in plan.kept.items()},
        "present": sorted(plan.present),
        "folds": {index: {s: _encode_fold(fold) for s, fold in slots.items()} for index, slots in plan.folds.items()},
        "frozen": {index: {s: e.encode_array(a) for s, a in slots.items()} for index, slots in plan.frozen.items()},
        "constants": {
            index: {slot: list(map(e.encode_mask, kept)) for slot, kept in slots.items()}
            for index, slots in plan.constants.items()
        },
        "settled": {index: list(map(e.encode_array, values)) for index, values in plan.settled.items()},
        "blocks": plan.blocks,
        "causes": list(map(_encode_cause, plan.causes)),
        "cause": {name: list(map(e.encode_numbers, numbers)) for name, numbers in plan.cause.items()},
        "unaligned": list(map(_encode_cause, plan.unaligned)),
    }


def _decode_plan(data: dict[str, Any]) -> Plan:
    return Plan(
        kept=e.by_name(data["kept"], _decode_kept),
        present=set(data["present"]),
        folds=e.by_index(data["folds"], lambda slots: e.by_index(slots, _decode_fold)),
        frozen=e.by_index(data["frozen"], lambda slots: e.by_index(slots, e.decode_array)),
        constants=e.by_index(data["constants"], lambda slots: e.by_index(slots, _decode_kept)),
        settled=e.by_index(data["settled"], lambda values: list(map(e.decode_array, values))),
        blocks=e.by_index(data["blocks"], int),
        causes=[Cause(*map(str, cause)) for cause in data["causes"]],
        cause=e.by_name(data["cause"], lambda numbers: list(map(e.decode_numbers, numbers))),
        unaligned=[Cause(*map(str, cause)) for cause in data["unaligned"]],
    )


def _decode_kept(data: Any) -> Kept:
    return [e.decode_mask(mask) for mask in data]


def _encode_cause(cause: Cause) -> list[str]:
    return [cause.node, cause.source, cause.reason]


def _encode_fold(fold: Fold) -> dict[str, Any]:
    arrays = {"indices": fold.indices, "values": fold.values, "into": fold.into, "scale": fold.scale}
    arrays["offsets"] = fold.offsets
    return {"axis": fold.axis} | {n: None if a is None else e.encode_array(a) for n, a in arrays.items()}


def _decode_fold(data: dict[str, Any]) -> Fold:
    further = (None if data[name] is None else e.decode_array(data[name]) for name in ("into", "scale", "offsets"))
    return Fold(int(data["axis"]), e.decode_array(data["indices"]), e.decode_array(data["values"]), *further)


# --- the facts -----------------------------------------------------------------------------------------------------


def _encode_facts(facts: Facts) -> dict[str, Any]:
    return {
        "known": {n: [e.encode_array(k.mask), e.encode_array(k.value)] for n, k in facts.known.items()},
        "needed": {name: e.encode_array(mask) for name, mask in facts.needed.items()},
        "unit": dict(facts.unit),
        "blind": dict(facts.blind),
        "infinite": {name: e.encode_array(mask) for name, mask in facts.infinite.items()},
        "throughout": sorted(facts.throughout),
        "types": {name: [e.encode_shape(shape), kind] for name, (shape, kind) in facts.types.items()},
        "unruled": sorted(facts.unruled),
    }


def _decode_facts(data: dict[str, Any]) -> Facts:
    return Facts(
        known=e.by_name(data["known"], lambda pair: Known(e.decode_array(pair[0]), e.decode_array(pair[1]))),
        needed=e.by_name(data["needed"], e.decode_array),
        unit=e.by_name(data["unit"], int),
        blind=e.by_name(data["blind"], lambda axis: None if axis is None else int(axis)),
        infinite=e.by_name(data["infinite"], e.decode_array),
        throughout=e.natural_numbers(data["throughout"]),
        types=e.by_name(data["types"], lambda pair: (e.decode_shape(pair[0]), int(pair[1]))),
        unruled=e.natural_numbers(data["unruled"]),
    )
