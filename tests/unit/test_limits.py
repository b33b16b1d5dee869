"""How much a verifier takes on from one source."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_verifier import limits
from kagimori_verifier.limits import RateLimit


class Clock:
    """Monotonic seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Tell the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands."""
    return Clock()


def test_a_burst_is_served_and_the_next_request_waits(clock: Clock) -> None:
    """And is told for how long: one token's worth of time."""
    rate = RateLimit(per_minute=60, burst=3, clock=clock)
    assert [rate.wait_s("a") for _ in range(3)] == [0, 0, 0]
    assert rate.wait_s("a") == pytest.approx(1)


def test_who_waits_as_told_is_served(clock: Clock) -> None:
    """Retry-After is a promise."""
    rate = RateLimit(per_minute=60, burst=1, clock=clock)
    assert rate.wait_s("a") == 0
    clock.now += rate.wait_s("a")
    assert rate.wait_s("a") == 0


def test_asking_while_waiting_costs_nothing(clock: Clock) -> None:
    """Refused requests take no token, so an impatient guest is not locked out."""
    rate = RateLimit(per_minute=60, burst=1, clock=clock)
    rate.wait_s("a")
    for _ in range(100):
        assert rate.wait_s("a") > 0
    clock.now += 1
    assert rate.wait_s("a") == 0


def test_one_source_does_not_use_up_another_ones(clock: Clock) -> None:
    """A flood from one address leaves all others their bucket."""
    rate = RateLimit(per_minute=1, burst=1, clock=clock)
    assert rate.wait_s("a") == 0
    assert rate.wait_s("a") > 0
    assert rate.wait_s("b") == 0


def test_a_long_silence_saves_up_no_more_than_a_burst(clock: Clock) -> None:
    """The bucket has a rim."""
    rate = RateLimit(per_minute=60, burst=2, clock=clock)
    clock.now += 1_000_000
    assert [rate.wait_s("a") == 0 for _ in range(4)] == [True, True, False, False]


def test_a_clock_that_goes_back_gives_nothing_away(clock: Clock) -> None:
    """Time only ever fills buckets."""
    rate = RateLimit(per_minute=60, burst=1, clock=clock)
    rate.wait_s("a")
    clock.now -= 500
    assert rate.wait_s("a") == pytest.approx(1)


def test_a_flood_of_addresses_allocates_no_more_than_a_bound(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source that was silent for longest is forgotten, not the one that asks."""
    monkeypatch.setattr(limits, "MAX_SOURCES", 10)
    rate = RateLimit(per_minute=1, burst=1, clock=clock)
    for number in range(50):
        rate.wait_s("busy")
        rate.wait_s(f"source {number}")
    assert len(rate._buckets) == 10
    assert rate.wait_s("busy") > 0


@given(gaps=st.lists(st.floats(min_value=0, max_value=30), max_size=60))
def test_no_pattern_of_requests_gets_more_than_rate_and_burst(gaps: list[float]) -> None:
    """Over any span: at most the burst and what the span has filled."""
    clock = Clock()
    rate = RateLimit(per_minute=30, burst=5, clock=clock)
    served = 0
    for gap in gaps:
        clock.now += gap
        served += rate.wait_s("a") == 0
    assert served <= 5 + sum(gaps) * 0.5 + 1e-6


def test_threads_share_one_bucket() -> None:
    """Requests are answered in threads; together they get one burst."""
    rate = RateLimit(per_minute=1, burst=20, clock=lambda: 0.0)
    served: list[float] = []
    threads = [
        threading.Thread(target=lambda: served.extend(rate.wait_s("a") for _ in range(10))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.count(0) == 20
