"""In which way is a verifier away? Every failure of the network gets a stable code and a line on what to do.

Import budget: the standard library and the error tree; requests and urllib3 only where their errors are sorted.
"""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
from typing import TYPE_CHECKING, Final

from kagimori_agent.lean import load_requests
from kagimori_protocol.errors import NetworkError

if TYPE_CHECKING:
    from collections.abc import Iterator

_IN_SHORT: Final = {
    "network.url": "the URL makes no sense",
    "network.dns": "the name does not resolve",
    "network.no-route": "no route",
    "network.refused": "connection refused",
    "network.tls": "TLS failed",
    "network.timeout": "no answer in time",
    "network.closed": "the answer broke off",
    "network.http": "what came is not HTTP",
    "network.encoding": "the answer is encoded",
    "network.too-large": "the answer is too large",
    "network.unsigned": "the answer is not signed",
    "network.unknown-key": "the answer is signed by a key that agent.toml does not name",
    "network.bad-signature": "the answer is not signed by this verifier for this request",
    "network.ended": "no answer yet when others had answered",
}

_TODO: Final = {
    "network.url": "Correct the verifier's urls in agent.toml.",
    "network.dns": "Give the verifier's address in agent.toml, or a working resolver to the early boot.",
    "network.no-route": "Is the interface up, with an address and a route? `ip route` shows it.",
    "network.refused": "Is the verifier running, and is this its port?",
    "network.tls": "Is ca_file in agent.toml the issuer of the server's certificate, and does the URL speak TLS?",
    "network.unsigned": "Something else answers at this URL: a proxy, a captive portal, or a broken verifier.",
    "network.unknown-key": "Compare `kagimori-verifier identity show` with the verifier's keys in agent.toml. Has the verifier"
    " retired the key that this image knows? Then rebuild the initramfs with the agent.toml of `kagimori-verifier vm config`.",
    "network.bad-signature": "Compare `kagimori-verifier identity show` with the verifier's keys in agent.toml.",
}

_ERRNO_CODES: Final = {
    errno.ECONNREFUSED: "network.refused",
    errno.ENETUNREACH: "network.no-route",
    errno.EHOSTUNREACH: "network.no-route",
    errno.ENETDOWN: "network.no-route",
    errno.EADDRNOTAVAIL: "network.no-route",
    # A packet filter of this VM says no.
    errno.EACCES: "network.no-route",
    errno.EPERM: "network.no-route",
    errno.ETIMEDOUT: "network.timeout",
    errno.ECONNRESET: "network.closed",
    errno.EPIPE: "network.closed",
}


def away(
    name: str,
    code: str,
    *,
    url: str | None = None,
    expected: str = "a signed answer",
    found: str | None = None,
) -> NetworkError:
    """Make the error for one of the codes above; ``name`` is the verifier's in agent.toml."""
    return NetworkError(
        f"{name}: {_IN_SHORT[code]}.",
        code=code,
        expected=expected,
        found=found if url is None else f"{found} ({url})",
        todo=_TODO.get(code),
    )


def in_short(error: NetworkError) -> str:
    """Say in a few words in which way a verifier is away."""
    return _IN_SHORT.get(error.code) or error.found or error.what


def code_of(error: Exception) -> str | None:
    """Sort what requests, urllib3, http.client or a socket raised; None for what is none of theirs."""
    load_requests()
    import requests  # noqa: PLC0415 - the import budget above
    import urllib3  # noqa: PLC0415 - the import budget above

    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return "network.dns"
        if isinstance(cause, ssl.SSLError):
            return "network.tls"
        if isinstance(cause, OSError) and cause.errno in _ERRNO_CODES:
            return _ERRNO_CODES[cause.errno]
    # The narrow ones first: most of these inherit from the last ones.
    kinds: tuple[tuple[str, tuple[type[BaseException], ...]], ...] = (
        ("network.timeout", (TimeoutError, urllib3.exceptions.TimeoutError)),
        ("network.tls", (urllib3.exceptions.SSLError, requests.exceptions.SSLError)),
        ("network.closed", (http.client.IncompleteRead, http.client.RemoteDisconnected)),
        ("network.http", (http.client.HTTPException, urllib3.exceptions.ProtocolError)),
        # A ValueError too, but of a header of the answer's.
        ("network.http", (urllib3.exceptions.InvalidHeader, requests.exceptions.InvalidHeader)),
        ("network.url", (requests.exceptions.InvalidURL, urllib3.exceptions.LocationValueError, ValueError)),
        ("network.http", (requests.RequestException, urllib3.exceptions.HTTPError, OSError)),
    )
    for code, types in kinds:
        if any(isinstance(cause, types) for cause in causes):
            return code
    return None


def reason_of(error: Exception) -> str:
    """Give the innermost reason in the words of who raised it, cut to a line."""
    innermost = list(_causes(error))[-1]
    words = getattr(innermost, "strerror", None) or str(innermost) or type(innermost).__name__
    return " ".join(str(words).split())[:200]


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Give an error and all that is behind it: requests and urllib3 wrap each other's errors in several ways."""
    waiting: list[object] = [error]
    seen: list[object] = []
    while waiting:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and not any(one is other for other in seen):
            seen.append(one)
            yield one
            waiting += [getattr(one, "reason", None), *one.args, one.__cause__, one.__context__]
