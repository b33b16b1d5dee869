"""What a sender who has nothing to show can take from a verifier: not the places in which answers are made."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any

import pytest
from starlette.applications import Starlette

from kagimori_verifier import server
from kagimori_verifier.limits import Arriving, RateLimit, source_of
from kagimori_verifier.metrics import Metrics
from kagimori_verifier.server import application
from kagimori_verifier.service import Reply


class _Service:
    """Answers everything at once."""

    def challenge(self, body: bytes, source: str, pinned: str) -> Reply:
        return Reply(200, body, "signed")

    release = confirm = challenge


def _application(*, concurrency: int = 2, burst: int = 1000) -> Starlette:
    service: Any = _Service()
    return application(
        service=service,
        metrics=Metrics(),
        rate=RateLimit(per_minute=1, burst=burst, clock=lambda: 0.0),
        concurrency=concurrency,
        ready=lambda: None,
    )


async def _post(
    app: Starlette, address: str, *, slow: asyncio.Event | None = None, gone: bool = False
) -> int:
    """Post a body, or the start of one that goes on when ``slow`` is set, or none; returns the status."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/challenge",
        "raw_path": b"/v1/challenge",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "client": (address, 1),
        "server": ("verifier", 80),
    }
    parts = itertools.count()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if gone:
            return {"type": "http.disconnect"}
        if slow is None:
            return {"type": "http.request", "body": b"{}", "more_body": False}
        if next(parts):
            await slow.wait()
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message: Any) -> None:  # noqa: ANN401 - whatever ASGI sends
        sent.append(message)

    await app(scope, receive, send)
    return int(sent[0]["status"])


def test_bodies_that_never_end_do_not_keep_an_honest_vm_from_its_answer() -> None:
    """As many slow senders as there are places for answers take none of these places."""

    async def attack() -> int:
        app, go_on = _application(concurrency=2), asyncio.Event()
        slow = [asyncio.create_task(_post(app, "192.0.2.1", slow=go_on)) for _ in range(8)]
        await asyncio.sleep(0.05)
        status = await _post(app, "192.0.2.2")
        go_on.set()
        await asyncio.gather(*slow)
        return status

    assert asyncio.run(attack()) == 200


def test_one_source_cannot_have_all_bodies_that_may_be_arriving() -> None:
    """A source has few of them, and gets them back when they have ended."""

    async def attack() -> tuple[int, int, int]:
        app, go_on = _application(), asyncio.Event()
        most = server.ARRIVING_PER_SOURCE
        slow = [asyncio.create_task(_post(app, "192.0.2.1", slow=go_on)) for _ in range(most)]
        await asyncio.sleep(0.05)
        one_more, other = await _post(app, "192.0.2.1"), await _post(app, "192.0.2.2")
        go_on.set()
        await asyncio.gather(*slow)
        return one_more, other, await _post(app, "192.0.2.1")

    assert asyncio.run(attack()) == (503, 200, 200)


def test_a_body_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place among those arriving is free again."""
    monkeypatch.setattr(server, "BODY_S", 0.01)
    monkeypatch.setattr(server, "ARRIVING_PER_SOURCE", 1)

    async def attack() -> tuple[int, int]:
        app = _application()
        return await _post(app, "192.0.2.1", slow=asyncio.Event()), await _post(app, "192.0.2.1")

    assert asyncio.run(attack()) == (408, 200)


def test_a_sender_who_goes_away_in_the_middle_leaves_no_traceback_in_the_log() -> None:
    """Anyone can do that as often as they like; an exception would be written down each time."""
    assert asyncio.run(_post(_application(), "192.0.2.1", gone=True)) == 400


def test_bodies_arriving_are_counted_at_all_and_for_each_source() -> None:
    """Both limits hold, and what has ended counts no more."""
    arriving = Arriving(most=3, per_source=2)
    with contextlib.ExitStack() as stack:
        assert [stack.enter_context(arriving.one("a")) for _ in range(3)] == [True, True, False]
        assert [stack.enter_context(arriving.one("b")) for _ in range(2)] == [True, False]
    with arriving.one("a") as admitted:
        assert admitted


def test_all_addresses_of_an_ipv6_host_are_one_source() -> None:
    """Whoever has a /64 would otherwise have 2^64 full buckets."""
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert source_of("2001:db8:0:1::1") != source_of("2001:db8::1")
    assert source_of("fe80::1%eth0") == source_of("fe80::2")
    assert source_of("::ffff:192.0.2.1") == source_of("192.0.2.1") == "192.0.2.1"
    assert source_of("unknown") == "unknown"


def test_an_ipv6_host_cannot_ask_more_often_by_changing_its_address() -> None:
    """The second request of one /64 finds the bucket empty."""

    async def attack() -> tuple[int, int, int]:
        app = _application(burst=1)
        addresses = ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")
        first, second, other = [await _post(app, address) for address in addresses]
        return first, second, other

    assert asyncio.run(attack()) == (200, 429, 200)
