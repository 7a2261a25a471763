"""Taking turns, against a clock that only the timed functions move."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest

from onnxshrink.bench import turns
from onnxshrink.bench.turns import in_turns


class Clock:
    """Time that passes while a function runs, and a record of which one did."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def function(self, name: str, *seconds: float) -> Callable[[], object]:
        """A function that takes `seconds[i]` at its i-th call, and then always the last of them."""
        count = 0

        def run() -> None:
            nonlocal count
            self.now += seconds[min(count, len(seconds) - 1)]
            self.calls.append(name)
            count += 1

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(turns, "time", made)
    return made


def test_rounds_run_forwards_and_backwards(clock: Clock) -> None:
    taken = in_turns([clock.function(name, 1.0) for name in "abc"], 10.0, rounds=3)
    assert "".join(clock.calls) == "aaabbbccc" + "abc" + "cba" + "abc"
    assert [samples.tolist() for samples in taken] == [[1.0] * 3] * 3


def test_the_first_runs_do_not_count(clock: Clock) -> None:
    (taken,) = in_turns([clock.function("a", 9.0, 5.0, 4.0, 2.0)], 1.0, rounds=2)
    assert taken.tolist() == [2.0, 2.0]


def test_short_runs_fill_the_caches_again_and_count_by_the_median_of_their_turn(clock: Clock) -> None:
    # Three runs beforehand; then a turn is one that does not count, and 10 ms of those that do.
    seconds = [0.002] * 3 + [0.5, 0.002, 0.003, 0.009, 0.002, 0.003] + [0.5, 0.001, 0.001, 0.001, 0.001, 0.001]
    (taken,) = in_turns([clock.function("a", *seconds)], 1.0, rounds=2)
    assert taken.tolist() == pytest.approx([0.003, 0.001])
    assert len(clock.calls) == len(seconds)


def test_a_turn_has_a_bounded_number_of_runs(clock: Clock) -> None:
    in_turns([clock.function("a", 1e-7)], 1.0, rounds=1)
    assert len(clock.calls) == 3 + 1 + 100


@pytest.mark.parametrize(
    ("seconds", "rounds"),
    [
        (20.0, 20),  # as long as asked for
        (4.0, 6),  # the fewest that say anything
        (1.5, 5),  # unless they take three times as long
        (0.1, 1),  # at least one
    ],
)
def test_how_long_it_takes(clock: Clock, seconds: float, rounds: int) -> None:
    (taken,) = in_turns([clock.function("a", 1.0)], seconds)
    assert len(taken) == rounds


def test_no_garbage_is_collected_meanwhile(clock: Clock) -> None:
    seen = []
    in_turns([lambda: seen.append(gc.isenabled())], 1.0, rounds=1)
    assert seen[-1] is False
    assert gc.isenabled()
