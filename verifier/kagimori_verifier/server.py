"""HTTP only: bytes to the service, signed bytes back. Only a signed reply is an answer; 503 is none.

Work that blocks (the database, cryptography) runs in threads, never in the event loop.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final

import structlog
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route

from kagimori_protocol.errors import OperatorError
from kagimori_protocol.messages import MAX_BODY, PATH_CHALLENGE, PATH_CONFIRM, PATH_RELEASE
from kagimori_protocol.signature import HEADER, HEADER_KEYS
from kagimori_verifier.limits import Arriving, source_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Executor

    from starlette.requests import Request

    from kagimori_verifier.limits import RateLimit
    from kagimori_verifier.metrics import Metrics
    from kagimori_verifier.service import Reply, Service

JSON: Final = "application/json"
PROMETHEUS: Final = "text/plain; version=0.0.4; charset=utf-8"
RETRY_S: Final = 2
BODY_S: Final = 20
"""Seconds in which a body must have arrived."""
ARRIVING: Final = 128
ARRIVING_PER_SOURCE: Final = 16
"""Bodies that may be arriving at once: at most so many times MAX_BODY of memory, and few from one slow source."""

_log = structlog.get_logger("kagimori")


class _TooLargeError(Exception):
    """A body is larger than any message may be."""


def application(
    *, service: Service, metrics: Metrics, rate: RateLimit, concurrency: int, ready: Callable[[], None]
) -> Starlette:
    """Build the ASGI application. ``ready`` raises OperatorError while the verifier cannot serve."""
    slots = asyncio.Semaphore(concurrency)
    # Of our own: a thread of Starlette's costs each request a tenth of a millisecond more.
    threads = ThreadPoolExecutor(concurrency, thread_name_prefix="answer")
    arriving = Arriving(most=ARRIVING, per_source=ARRIVING_PER_SOURCE)
    looking = asyncio.Lock()

    def endpoint(answer: Callable[[bytes, str, str], Reply]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            address = request.client.host if request.client else "unknown"
            source = source_of(address)
            if wait_s := rate.wait_s(source):
                metrics.unavailable("rate")
                return _away(429, "too many requests from this address", int(wait_s) + 1)
            with arriving.one(source) as admitted:
                body = await _body(request) if admitted else None
            if isinstance(body, Response):
                return body
            # Only now: a body that never ends must not hold what answers are made in.
            if body is None or slots.locked():
                metrics.unavailable("busy")
                return _away(503, "busy", RETRY_S)
            async with slots:
                asked = (body, address, request.headers.get(HEADER_KEYS, ""))
                return await _answer(request.url.path, asked, answer, metrics, threads)

        return handle

    async def healthz(_: Request) -> Response:
        return Response("alive\n", media_type="text/plain")

    async def readyz(_: Request) -> Response:
        try:
            async with looking:  # one look at a time, whoever asks how often: answers need the threads
                await run_in_threadpool(ready)
        except OperatorError as error:
            return _away(503, error.code, RETRY_S)
        return Response("ready\n", media_type="text/plain")

    async def show_metrics(_: Request) -> Response:
        return Response(metrics.text(), media_type=PROMETHEUS)

    return Starlette(
        routes=[
            Route(PATH_CHALLENGE, endpoint(service.challenge), methods=["POST"]),
            Route(PATH_RELEASE, endpoint(service.release), methods=["POST"]),
            Route(PATH_CONFIRM, endpoint(service.confirm), methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
        ]
    )


async def _body(request: Request) -> bytes | Response:
    """Read a body as long as it is neither too large nor too slow; else give what to tell its sender."""
    try:
        async with asyncio.timeout(BODY_S):
            return await _bounded(request)
    except _TooLargeError:
        return Response("body too large\n", 413, media_type="text/plain")
    except TimeoutError:
        return Response("body too slow\n", 408, media_type="text/plain")
    except ClientDisconnect:
        return Response("body broken off\n", 400, media_type="text/plain")  # nobody is there to read it


async def _answer(
    path: str,
    asked: tuple[bytes, str, str],
    answer: Callable[[bytes, str, str], Reply],
    metrics: Metrics,
    threads: Executor,
) -> Response:
    """Answer what was ``asked``: a body, from whom, and by which keys the sender would believe."""
    source = asked[1]
    started = time.monotonic()
    try:
        reply = await asyncio.get_running_loop().run_in_executor(threads, answer, *asked)
    except OperatorError as error:
        metrics.unavailable("store")
        _log.error("unavailable", path=path, source=source, **error.as_dict())
        return _away(503, error.code, RETRY_S)
    metrics.took(path, time.monotonic() - started)
    _log.info(
        "replied",
        path=path,
        source=source,
        status=reply.status,
        ms=round((time.monotonic() - started) * 1000, 1),
    )
    return Response(reply.body, reply.status, {HEADER: reply.signature}, JSON)


async def _bounded(request: Request) -> bytes:
    """Read a body, up to the size that a message may have."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise _TooLargeError
    return bytes(body)


def _away(status: int, reason: str, retry_s: int) -> Response:
    """Answer without a signature, which to an agent means "away": it will ask again."""
    return Response(f"{reason}\n", status, {"Retry-After": str(retry_s)}, "text/plain")
