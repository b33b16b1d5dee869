"""Several verifiers at once, again and again, and a process that does not wait for any of them to hang up."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from kagimori_agent import exchange
from kagimori_agent.budget import Backoff, Budget
from kagimori_agent.exchange import Endpoint, Reply
from kagimori_protocol import signature
from kagimori_protocol.errors import NetworkError

if TYPE_CHECKING:
    from tests.unit.exchange.conftest import Loopback

AWAY = NetworkError("home: connection refused.", code="network.refused")
HOME = Endpoint("home", (), ())
REPLY = Reply(b"{}", bytes(32), "http://home", 200)
Results = list[tuple[Endpoint, Reply | NetworkError]]


class Clock:
    """Seconds that pass only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def run(program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def ask_all(*endpoints: Endpoint, gather_s: float = 0.3, attempt_s: float = 5) -> tuple[Results, list[str]]:
    """Ask all; gives the results and what was said."""
    said: list[str] = []
    results = exchange.ask_all(
        endpoints,
        "/v1/challenge",
        b"{}",
        gather_s=gather_s,
        attempt_s=attempt_s,
        connect_s=5,
        budget=Budget(60),
        say=said.append,
    )
    return results, said


def codes(results: Results) -> list[str]:
    """Shorten results: the name of an endpoint, and its code or that it answered."""
    return [
        f"{one.name} {'answered' if isinstance(result, Reply) else result.code}" for one, result in results
    ]


def test_all_are_asked_at_once_and_results_keep_the_order(loopback: Loopback) -> None:
    """Three answers that take 0.4 s each take not much longer together."""
    urls = [loopback.serve(loopback.slow(0.4)).url for _ in range(3)]
    endpoints = [Endpoint(name, (url,), (loopback.public,)) for name, url in zip("abc", urls, strict=True)]
    start = time.monotonic()
    results, said = ask_all(*endpoints, gather_s=5)
    assert time.monotonic() - start < 1.1
    assert codes(results) == ["a answered", "b answered", "c answered"]
    assert said == []


def test_a_dead_verifier_does_not_hold_up_a_live_one(loopback: Loopback) -> None:
    """After the first answer the others have their grace and no more; their connections are closed."""
    hanging = loopback.serve(loopback.drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"))
    start = time.monotonic()
    results, said = ask_all(
        Endpoint("hangs", (hanging.url, hanging.url), (loopback.public,)),
        Endpoint("dead", (loopback.closed_port(),), (loopback.public,)),
        Endpoint("home", (loopback.serve(loopback.honest).url,), (loopback.public,)),
        attempt_s=30,
    )
    assert time.monotonic() - start < 2
    assert codes(results) == ["hangs network.ended", "dead network.refused", "home answered"]
    assert said == ["dead: connection refused"]
    assert hanging.hung_up.wait(3)
    assert loopback.attempts_end()
    assert hanging.connections == 1


def test_an_answer_within_the_grace_counts(loopback: Loopback) -> None:
    """One report serves all who answered in time, so it is worth a moment."""
    results, _ = ask_all(
        Endpoint("later", (loopback.serve(loopback.slow(0.2)).url,), (loopback.public,)),
        Endpoint("home", (loopback.serve(loopback.honest).url,), (loopback.public,)),
        gather_s=3,
    )
    assert codes(results) == ["later answered", "home answered"]


def test_when_all_are_away_each_says_why(loopback: Loopback) -> None:
    """Lines for the console, one for each."""
    portal = loopback.serve(loopback.says(loopback.response(b"<html>")))
    results, said = ask_all(
        Endpoint("dead", (loopback.closed_port(),), (loopback.public,)),
        Endpoint("portal", (portal.url,), (loopback.public,)),
    )
    assert codes(results) == ["dead network.refused", "portal network.unsigned"]
    assert sorted(said) == ["dead: connection refused", "portal: the answer is not signed"]


def test_asking_nobody_gives_nothing() -> None:
    """And does not wait."""
    assert ask_all() == ([], [])


def test_a_bug_in_a_thread_is_not_swallowed(loopback: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is no failure of the network is raised where it can be seen."""

    def bug(*_arguments: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(signature, "verify", bug)
    with pytest.raises(KeyError):
        ask_all(Endpoint("home", (loopback.serve(loopback.honest).url,), (loopback.public,)))


def test_asking_is_repeated_until_somebody_answers() -> None:
    """With growing pauses that are announced."""
    clock, said = Clock(), list[str]()
    outcomes: Iterator[Reply | NetworkError] = iter([AWAY, AWAY, REPLY])
    results = exchange.until_answered(
        lambda: [(HOME, next(outcomes))],
        Budget(60, clock),
        Backoff(1, 10, random=lambda: 1.0),
        said.append,
        clock.sleep,
    )
    assert results == [(HOME, REPLY)]
    assert said == [
        "no verifier answers, try 2 in 1.0 s (60 s left)",
        "no verifier answers, try 3 in 2.0 s (59 s left)",
    ]
    assert clock.now == 3


def test_asking_ends_with_the_budget() -> None:
    """No pause is begun that no try can follow, and the error tells what was away last."""
    clock, said = Clock(), list[str]()

    def ask() -> Results:
        clock.sleep(9)
        return [(HOME, AWAY)]

    with pytest.raises(NetworkError) as raised:
        exchange.until_answered(
            ask, Budget(20, clock), Backoff(1, 10, random=lambda: 1.0), said.append, clock.sleep
        )
    assert raised.value.code == "budget.spent"
    assert raised.value.__cause__ is AWAY
    assert said == ["no verifier answers, try 2 in 1.0 s (11 s left)"]
    assert clock.now == 19


def test_importing_the_exchange_loads_no_network_library() -> None:
    """They cost a boot a tenth of a second, so they load while the network comes up."""
    done = run(
        """
        import sys
        from kagimori_agent import exchange
        assert not {"requests", "urllib3"} & set(sys.modules), sorted(sys.modules)
        exchange.preload()
        assert {"requests", "urllib3"} <= set(sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr


def test_a_process_exits_while_a_server_hangs() -> None:
    """No thread of the exchange keeps a boot's process alive."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        done = run(
            f"""
            import threading, time
            from kagimori_agent import exchange
            from kagimori_agent.budget import Budget
            home = exchange.Endpoint("home", ("http://127.0.0.1:{listener.getsockname()[1]}",), (bytes(32),))
            limits = dict(attempt_s=60, connect_s=60, budget=Budget(60))
            asking = threading.Thread(
                target=exchange.ask_all,
                args=((home, home), "/", b""),
                kwargs=dict(limits, gather_s=1, say=print),
                daemon=True,
            )
            asking.start()
            time.sleep(1)
            assert asking.is_alive()
            """
        )
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - start < 10
