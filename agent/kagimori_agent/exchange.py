"""Carry a body to a verifier and bring back an answer: bytes, deadlines and a signature, nothing of what they mean.

Only a signed reply is an answer (PROTOCOL.md section 3). Whatever else comes, or does not come, is "verifier away": a
NetworkError whose code says in which way, for whoever has to repair it. The host between VM and verifier may do
anything to the bytes; all that it gains here is what it can do anyway, to keep an answer away.

Import budget: no requests and no urllib3, which the first attempt loads. ``preload`` does it earlier, in a thread,
while the network comes up.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from kagimori_agent.away import away, in_short
from kagimori_agent.lean import load_requests
from kagimori_agent.line import Line, Received, Request
from kagimori_protocol import signature
from kagimori_protocol.errors import NetworkError, NotAuthentic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kagimori_agent.budget import Backoff, Budget

_log = logging.getLogger(__name__)

_UNBELIEVED: Final = {"reply.unsigned": "network.unsigned", "reply.key": "network.unknown-key"}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One verifier: its URLs in the order of preference, and its raw Ed25519 public keys, which authenticate it.

    ``ca_file`` holds the PEM certificates of who may issue its TLS certificate.
    """

    name: str
    urls: tuple[str, ...]
    keys: tuple[bytes, ...]
    ca_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: a body, and the key whose signature over it was verified. ``status`` is HTTP's, and not signed."""

    body: bytes = field(repr=False)
    key: bytes
    url: str
    status: int


def preload() -> None:
    """Load what the first attempt would have to load."""
    load_requests()


def post(  # noqa: PLR0913 - what, whereto, and three limits that have no good default
    endpoint: Endpoint, path: str, body: bytes, *, attempt_s: float, connect_s: float, budget: Budget
) -> Reply:
    """Ask one verifier, at its URLs in turn, until one of them gives an answer.

    Each URL gets ``attempt_s`` seconds for everything from resolving its name to the last byte, and ``connect_s`` of
    them for each address to connect to. Raises NetworkError: with the code of what happened where that is the same
    at all URLs (``network.*``), with ``verifier-away`` where it differs, with ``budget.spent`` where no URL could be
    tried.
    """
    return _Question(path, body, attempt_s, connect_s, budget).ask(endpoint)


def ask_all(  # noqa: PLR0913 - as post, and how long to gather, and whom to tell
    endpoints: Sequence[Endpoint],
    path: str,
    body: bytes,
    *,
    gather_s: float,
    attempt_s: float,
    connect_s: float,
    budget: Budget,
    say: Callable[[str], None],
) -> list[tuple[Endpoint, Reply | NetworkError]]:
    """Ask all verifiers at once; ``gather_s`` seconds after the first answer, do without those still missing.

    The results are in the order of ``endpoints``; a missing one is a NetworkError with code ``network.ended``. ``say``
    is called in this thread only, with lines such as ``home: connection refused``.
    """
    questions = [_Question(path, body, attempt_s, connect_s, budget) for _ in endpoints]
    arrived: SimpleQueue[tuple[int, Reply | Exception]] = SimpleQueue()

    def ask(index: int) -> None:
        try:
            arrived.put((index, questions[index].ask(endpoints[index])))
        except Exception as error:  # noqa: BLE001 - raised again below, in the thread that can report it
            arrived.put((index, error))

    for index, endpoint in enumerate(endpoints):
        threading.Thread(target=ask, args=(index,), daemon=True, name=f"ask {endpoint.name}").start()
    results: dict[int, Reply | NetworkError] = {}
    try:
        for index, result in _gathered(arrived, len(endpoints), gather_s):
            if not isinstance(result, Reply | NetworkError):
                raise result
            results[index] = result
            if isinstance(result, NetworkError):
                say(f"{endpoints[index].name}: {in_short(result)}")
                _log.debug("%s: %s: %s", endpoints[index].name, result.code, result.found)
    finally:
        for question in questions:
            question.end()
    return [
        (endpoint, results[index] if index in results else away(endpoint.name, "network.ended"))
        for index, endpoint in enumerate(endpoints)
    ]


def until_answered(
    ask: Callable[[], list[tuple[Endpoint, Reply | NetworkError]]],
    budget: Budget,
    backoff: Backoff,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> list[tuple[Endpoint, Reply | NetworkError]]:
    """Repeat ``ask`` until its results hold at least one Reply, and return them.

    Raises NetworkError with code ``budget.spent``, caused by what was away last, once the budget has no room for
    another try.
    """
    tries = 0
    while True:
        results = ask()
        tries += 1
        away_now = [result for _, result in results if isinstance(result, NetworkError)]
        if len(away_now) < len(results):
            return results
        last = away_now[0] if away_now else None
        wait_s = backoff.next_s()
        if wait_s >= budget.remaining_s():
            # No try would come after this pause, so it would be for nothing.
            raise budget.spent(last)
        say(f"no verifier answers, try {tries + 1} in {wait_s:.1f} s ({budget.words()})")
        sleep(wait_s)


class _Question:
    """What one verifier is asked, at one URL after the other, until it answers or another thread ends it."""

    def __init__(self, path: str, body: bytes, attempt_s: float, connect_s: float, budget: Budget) -> None:
        self._path = path
        self._body = body
        self._attempt_s = attempt_s
        self._connect_s = connect_s
        self._budget = budget
        self._lock = threading.Lock()
        self._line: Line | None = None
        self._ended = False

    def ask(self, endpoint: Endpoint) -> Reply:
        failures: list[tuple[str, NetworkError]] = []
        for base in endpoint.urls:
            try:
                return self._ask_at(endpoint, base.rstrip("/") + self._path)
            except NetworkError as error:
                failures.append((base, error))
                if self._ended or error.code == "budget.spent":
                    break
        if not failures:
            raise away(endpoint.name, "network.url", found="no URL at all")
        if len(failures) == 1:
            raise failures[0][1]
        codes = {error.code for _, error in failures}
        raise NetworkError(
            f"{endpoint.name}: away at each of its URLs.",
            code=codes.pop() if len(codes) == 1 else NetworkError.default_code,
            expected="a signed answer at one of them",
            found="; ".join(f"{base}: {in_short(error)}" for base, error in failures),
            todo=next((error.todo for _, error in failures if error.todo), None),
        )

    def end(self) -> None:
        with self._lock:
            self._ended = True
            if self._line is not None:
                self._line.hang_up()

    def _ask_at(self, endpoint: Endpoint, url: str) -> Reply:
        limit_s = self._budget.attempt_s(self._attempt_s)
        with self._lock:
            line = self._line = Line(limit_s)
            if self._ended:
                line.hang_up()
        received = line.ask(
            Request(endpoint.name, url, self._body, endpoint.ca_file, self._connect_s, endpoint.keys)
        )
        return _verified(endpoint, url, self._body, received)


def _gathered(
    arrived: SimpleQueue[tuple[int, Reply | Exception]], count: int, gather_s: float
) -> Iterator[tuple[int, Reply | Exception]]:
    """Give results as they come. Before the first answer each is waited for: its own deadlines end it."""
    until: float | None = None
    for _ in range(count):
        try:
            index, result = arrived.get(timeout=None if until is None else max(0.0, until - time.monotonic()))
        except Empty:
            return
        if until is None and isinstance(result, Reply):
            until = time.monotonic() + gather_s
        yield index, result


def _verified(endpoint: Endpoint, url: str, request: bytes, received: Received) -> Reply:
    """Make an answer of what came, or raise NetworkError: whatever its status, without a signature it is none."""
    try:
        key = signature.verify(endpoint.keys, received.signature, request, received.body)
    except NotAuthentic as error:
        raise away(
            endpoint.name,
            _UNBELIEVED.get(error.code, "network.bad-signature"),
            url=url,
            expected=error.expected or "a signed answer",
            found=f"HTTP status {received.status}, {len(received.body)} bytes, signature: {error.found}",
        ) from error
    return Reply(received.body, key, url, received.status)
