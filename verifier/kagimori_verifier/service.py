"""One verifier, without a transport: request bytes in, signed reply out.

Every reply is signed; what is not is no answer (PROTOCOL.md section 3). Database errors pass through as
StoreUnavailable, and the server turns them into 503: the guest asks again, and nothing was released that the ledger
does not show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kagimori_protocol import messages, signature, transcript
from kagimori_protocol.errors import Malformed, NotAuthentic, PeerError, UnsupportedVersion
from kagimori_verifier.trail import Trail

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from kagimori_verifier.metrics import Metrics
    from kagimori_verifier.pipeline import Pipeline
    from kagimori_verifier.refusals import Refusals
    from kagimori_verifier.release import Release

OK: Final = 200
ACCEPTED: Final = 202
BAD_REQUEST: Final = 400
FORBIDDEN: Final = 403

_COARSE: Final = {
    "session.token": "stale-session",
    "session.fresh": "stale-session",
    "session.unused": "used-session",
    "vm.enabled": "unknown-vm",
}
"""What a denial tells: enough for an honest agent to know whether asking again helps. The owner sees the rest."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A signed reply: HTTP status, body, and the value of the Kagimori-Signature header."""

    status: int
    body: bytes
    signature: str


class Service:
    """Answers the three requests of the protocol."""

    def __init__(  # noqa: PLR0913 - its collaborators, by name only
        self,
        *,
        pipeline: Pipeline,
        release: Release,
        signing_key: Ed25519PrivateKey,
        refusals: Refusals,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep the collaborators. ``clock`` gives seconds since 1970."""
        self._pipeline = pipeline
        self._release = release
        self._signing_key = signing_key
        self._refusals = refusals
        self._metrics = metrics
        self._clock = clock

    def challenge(self, request: bytes, source: str) -> Reply:
        """Answer a Hello with a Challenge. ``source`` names the sender for the owner, e.g. its address."""
        try:
            reply = self._pipeline.challenge(request, self._now_s())
        except PeerError as error:
            return self._denied("challenge", request, error, source, session=b"")
        return self._signed("challenge", request, reply, OK)

    def release(self, request: bytes, source: str) -> Reply:
        """Answer Evidence with an answer that only its sender can open, or with a denial."""
        trail, now_s = Trail(), self._now_s()
        try:
            judgement = self._pipeline.judge(request, now_s, trail)
            body = self._release.answer(judgement, now_s)
        except PeerError as error:
            return self._denied("release", request, error, source, session=_session_of(request))
        return self._sign("release", request, body, OK)

    def confirm(self, request: bytes, source: str) -> Reply:
        """Write down what became of an answer, if whoever confirms has opened it."""
        session = b""
        try:
            confirm = messages.decode(messages.Confirm, request)
            session = confirm.session
            self._release.confirm(confirm, self._now_s())
        except PeerError as error:
            return self._denied("confirm", request, error, source, session=session)
        receipt = messages.Receipt(version=messages.VERSION, session=session, outcome=confirm.outcome)
        return self._signed("confirm", request, receipt, OK)

    def _now_s(self) -> int:
        return int(self._clock())

    def _denied(self, path: str, request: bytes, error: PeerError, source: str, *, session: bytes) -> Reply:
        """Tell the sender little and the owner all."""
        if isinstance(error, UnsupportedVersion):
            spoken = messages.VersionsSpoken(version=messages.VERSION, versions=list(messages.VERSIONS))
            return self._signed(path, request, spoken, BAD_REQUEST)
        self._refusals.note(
            at_s=self._now_s(),
            path=path,
            session=transcript.session_id(session) if session else None,
            vm_id=_vm_of(request),
            error=error,
            source=source,
        )
        code = "malformed" if isinstance(error, Malformed) else _COARSE.get(error.code, "not-authentic")
        denial = messages.Denial(version=messages.VERSION, session=session, code=code)
        return self._signed(path, request, denial, BAD_REQUEST if isinstance(error, Malformed) else FORBIDDEN)

    def _signed(self, path: str, request: bytes, message: msgspec.Struct, status: int) -> Reply:
        return self._sign(path, request, messages.encode(message), status)

    def _sign(self, path: str, request: bytes, body: bytes, status: int) -> Reply:
        self._metrics.replied(path, status)
        return Reply(status, body, signature.sign(self._signing_key, request, body))


def _vm_of(request: bytes) -> str | None:
    """Read the VM id that a refused request names, for the owner's eyes; it proves nothing."""
    try:
        return messages.decode(messages.Hello, request).vm_id
    except PeerError:
        pass
    try:
        evidence = messages.decode(messages.Evidence, request)
        return messages.decode(messages.Hello, evidence.hello).vm_id
    except PeerError:
        return None


def _session_of(request: bytes) -> bytes:
    """Read the session that refused evidence names first; it may be another verifier's, or none."""
    try:
        evidence = messages.decode(messages.Evidence, request)
        return messages.decode(messages.Challenge, evidence.challenges[0].challenge).session
    except (PeerError, NotAuthentic):
        return b""
