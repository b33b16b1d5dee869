"""One verifier, without a transport: request bytes in, signed reply out.

Every reply is signed; what is not is no answer (PROTOCOL.md section 3). Database errors pass through as
StoreUnavailable, and the server turns them into 503: the guest asks again, and nothing was released that the ledger
does not show.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from kagimori_protocol import messages, signature, transcript
from kagimori_protocol.errors import Malformed, NotAuthentic, PeerError, UnsupportedVersion
from kagimori_verifier.trail import Trail

if TYPE_CHECKING:
    from collections.abc import Callable

    import msgspec
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from kagimori_verifier.identity import Keys
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
        keys: Callable[[], Keys],
        refusals: Refusals,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keep the collaborators. ``keys`` gives the verifier's keys of now, ``clock`` seconds since 1970."""
        self._pipeline = pipeline
        self._release = release
        self._keys = keys
        self._refusals = refusals
        self._metrics = metrics
        self._clock = clock

    def challenge(self, request: bytes, source: str, pinned: str = "") -> Reply:
        """Answer a Hello with a Challenge.

        Here and below, ``source`` names the sender for the owner, e.g. its address, and ``pinned`` is the value of its
        Kagimori-Keys header: by which keys it would believe an answer.
        """
        keys = self._keys()
        asked = _Asked("challenge", request, source, _signer(keys, pinned))
        try:
            reply = self._pipeline.challenge(request, self._now_s(), keys)
        except PeerError as error:
            return self._denied(asked, error, session=b"")
        return self._signed(asked, reply, OK)

    def release(self, request: bytes, source: str, pinned: str = "") -> Reply:
        """Answer Evidence with an answer that only its sender can open, or with a denial."""
        keys = self._keys()
        asked = _Asked("release", request, source, _signer(keys, pinned))
        trail, now_s = Trail(), self._now_s()
        try:
            judgement = self._pipeline.judge(request, now_s, trail, keys)
            body = self._release.answer(judgement, now_s)
        except PeerError as error:
            return self._denied(asked, error, session=_session_of(request))
        return self._sign(asked, body, OK)

    def confirm(self, request: bytes, source: str, pinned: str = "") -> Reply:
        """Write down what became of an answer, if whoever confirms has opened it."""
        asked = _Asked("confirm", request, source, _signer(self._keys(), pinned))
        session = b""
        try:
            confirm = messages.decode(messages.Confirm, request)
            session = confirm.session
            self._release.confirm(confirm, self._now_s())
        except PeerError as error:
            return self._denied(asked, error, session=session)
        receipt = messages.Receipt(version=messages.VERSION, session=session, outcome=confirm.outcome)
        return self._signed(asked, receipt, OK)

    def _now_s(self) -> int:
        return int(self._clock())

    def _denied(self, asked: _Asked, error: PeerError, *, session: bytes) -> Reply:
        """Tell the sender little and the owner all."""
        if isinstance(error, UnsupportedVersion):
            spoken = messages.VersionsSpoken(version=messages.VERSION, versions=list(messages.VERSIONS))
            return self._signed(asked, spoken, BAD_REQUEST)
        self._refusals.note(
            at_s=self._now_s(),
            path=asked.path,
            session=transcript.session_id(session) if session else None,
            vm_id=_vm_of(asked.request),
            error=error,
            source=asked.source,
        )
        code = "malformed" if isinstance(error, Malformed) else _COARSE.get(error.code, "not-authentic")
        denial = messages.Denial(version=messages.VERSION, session=session, code=code)
        return self._signed(asked, denial, BAD_REQUEST if isinstance(error, Malformed) else FORBIDDEN)

    def _signed(self, asked: _Asked, message: msgspec.Struct, status: int) -> Reply:
        return self._sign(asked, messages.encode(message), status)

    def _sign(self, asked: _Asked, body: bytes, status: int) -> Reply:
        self._metrics.replied(asked.path, status)
        return Reply(status, body, signature.sign(asked.signer, asked.request, body))


class _Asked(NamedTuple):
    """A request, and the key that its sender will believe a reply by."""

    path: str
    request: bytes
    source: str
    signer: Ed25519PrivateKey


def _signer(keys: Keys, pinned: str) -> Ed25519PrivateKey:
    return keys.signer(signature.read_key_ids(pinned))


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
