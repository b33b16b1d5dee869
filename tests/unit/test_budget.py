from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_agent.budget import Backoff, Budget
from kagimori_protocol.errors import NetworkError


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_budget_counts_down_and_stops_at_nothing() -> None:
    """What is left is what was given less what passed."""
    clock = Clock()
    budget = Budget(10, clock)
    assert budget.remaining_s() == 10
    clock.now += 4
    assert budget.remaining_s() == 6
    clock.now += 100
    assert budget.remaining_s() == 0


def test_an_attempt_gets_its_own_limit_or_what_is_left() -> None:
    """No attempt outlives the budget."""
    clock = Clock()
    budget = Budget(10, clock)
    assert budget.attempt_s(3) == 3
    clock.now += 8
    assert budget.attempt_s(3) == 2


def test_a_budget_says_what_is_left() -> None:
    """A person at the console wants to know how long this goes on."""
    clock = Clock()
    budget = Budget(10, clock)
    clock.now += 4
    assert budget.words() == "6 s left"
    assert Budget(math.inf, clock).words() == "without end"


def test_a_spent_budget_raises() -> None:
    """Both questions end the waiting, with one code."""
    clock = Clock()
    budget = Budget(10, clock)
    budget.require()
    clock.now += 10
    with pytest.raises(NetworkError) as of_require:
        budget.require()
    with pytest.raises(NetworkError) as of_attempt:
        budget.attempt_s(3)
    assert of_require.value.code == of_attempt.value.code == "budget.spent"
    assert of_require.value.expected == "an answer within 10 s"


def test_a_spent_budget_tells_what_failed_last() -> None:
    """The reason survives: its text, its cause and what to do about it."""
    last = NetworkError("home: connection refused.", code="network.refused", found="port 1", todo="Start it.")
    with pytest.raises(NetworkError) as raised:
        Budget(0).require(last)
    assert raised.value.__cause__ is last
    assert raised.value.found == "home: connection refused. port 1"
    assert raised.value.todo == "Start it."


def test_a_budget_that_was_spent_below_is_not_wrapped_again() -> None:
    """An error that says so already stays as it is."""
    with pytest.raises(NetworkError) as first:
        Budget(0).require()
    with pytest.raises(NetworkError) as second:
        Budget(0).require(first.value)
    assert second.value is first.value


@pytest.mark.parametrize("total_s", [0, -1, math.nan])
def test_an_empty_budget_is_spent(total_s: float) -> None:
    """Nothing, less than nothing and no number at all are no time."""
    with pytest.raises(NetworkError):
        Budget(total_s).require()


def test_a_boot_may_wait_forever() -> None:
    """Attempts keep their limit then."""
    assert Budget(math.inf).attempt_s(5) == 5


def test_the_bound_of_pauses_doubles_up_to_its_most() -> None:
    """With the largest draw each time, the bound itself shows."""
    backoff = Backoff(1, 10, random=lambda: 1.0)
    assert [backoff.next_s() for _ in range(6)] == [1, 2, 4, 8, 10, 10]


def test_a_pause_may_be_short() -> None:
    """Full jitter: a pause is drawn from nothing on, or VMs that failed together come back together."""
    backoff = Backoff(1, 10, random=lambda: 0.25)
    assert [backoff.next_s() for _ in range(3)] == [0.25, 0.5, 1]


def test_two_machines_pause_differently() -> None:
    """The draw is random where none is given."""
    one, other = Backoff(1, 10), Backoff(1, 10)
    assert [one.next_s() for _ in range(4)] != [other.next_s() for _ in range(4)]


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.integers(1, 50))
def test_no_pause_is_longer_than_the_most(min_s: float, max_s: float, tries: int) -> None:
    """Whatever the limits and however many tries."""
    backoff = Backoff(min_s, max_s)
    assert all(0 <= backoff.next_s() <= max_s for _ in range(tries))
