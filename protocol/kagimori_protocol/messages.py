"""The messages of PROTOCOL.md section 3 and the codec that both ends use.

A message is JSON in exactly one form: the bytes that ``encode`` writes (fields in the order of their
definition, no blanks, bytes as standard padded base64, absent optional fields left out). ``decode`` refuses
everything else, and so refuses unknown and repeated fields, trailing bytes, loose base64 and numbers in
disguise at one stroke (ADR 0001). Hashes and signatures cover the exact bytes sent.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from kagimori_protocol.errors import Malformed, UnsupportedVersion

VERSION: Final = 1
VERSIONS: Final = (VERSION,)
"""Every version that this release speaks."""

MAX_BODY: Final = 1 << 20
"""Largest body in bytes, of any message."""
MAX_CERTIFICATES: Final = 1 << 16
MAX_EVENT_LOG: Final = 640 << 10
"""Largest event log in bytes: what fits a body once it is base64, beside the rest of an Evidence."""

PATH_CHALLENGE: Final = "/v1/challenge"
PATH_RELEASE: Final = "/v1/release"
PATH_CONFIRM: Final = "/v1/confirm"

Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
EnrolProof = Annotated[bytes, Meta(min_length=64, max_length=64)]
Session = Annotated[bytes, Meta(min_length=1, max_length=512)]
PublicArea = Annotated[bytes, Meta(min_length=1, max_length=1024)]
Uuid = Annotated[str, Meta(pattern=r"\A[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")]
VmId = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,62}\Z")]
Code = Annotated[str, Meta(pattern=r"\A[a-z0-9][a-z0-9.-]{0,62}\Z")]
Text = Annotated[str, Meta(max_length=4096)]
Purpose = Literal["unlock", "dry-run", "preflight", "enrol"]
Kind = Literal["svsm-vtpm", "snp-direct"]
Outcome = Literal["received", "opened", "failed", "reencrypted"]

PURPOSES: Final[tuple[Purpose, ...]] = ("unlock", "dry-run", "preflight", "enrol")
KINDS: Final[tuple[Kind, ...]] = ("svsm-vtpm", "snp-direct")

HPKE_PUBLIC_SIZE: Final = 1184 + 32
"""ML-KEM-768 encapsulation key, then X25519 public key (HPKE-PQ, MLKEM768-X25519)."""


class Message(Struct, frozen=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages: immutable, strict, and named on the wire, so that none can pass for another."""


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """A VM asks for a challenge. Everything in it becomes part of the tie; ``kind`` is only a hint."""

    version: int
    vm_id: VmId
    purpose: Purpose
    kind: Kind
    hpke_public_key: Annotated[bytes, Meta(min_length=HPKE_PUBLIC_SIZE, max_length=HPKE_PUBLIC_SIZE)]
    ek_public: PublicArea | UnsetType = UNSET
    ak_public: PublicArea | UnsetType = UNSET
    volumes: Annotated[list[Uuid], Meta(max_length=16)]
    agent: Annotated[str, Meta(pattern=r"\A[\x20-\x7e]{1,64}\Z")]


class Challenge(Message, frozen=True, kw_only=True, tag="challenge"):
    """The verifier's nonce, and the PCRs that it wants quoted (a marshalled TPML_PCR_SELECTION)."""

    version: int
    session: Annotated[bytes, Meta(max_length=512)]
    nonce: Digest
    expires_in: Annotated[int, Meta(ge=1, le=3600)]
    pcr_selection: Annotated[bytes, Meta(min_length=4, max_length=64)]


class SignedChallenge(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One Challenge body, verbatim, with the Ed25519 public key that its signature was verified with."""

    key: Digest
    challenge: Annotated[bytes, Meta(max_length=4096)]


class Quote(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A TPMS_ATTEST and its TPMT_SIGNATURE, as the TPM gave them."""

    attest: Annotated[bytes, Meta(max_length=2048)]
    signature: Annotated[bytes, Meta(max_length=1024)]


class PcrValue(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One PCR of the SHA-256 bank."""

    index: Annotated[int, Meta(ge=0, le=23)]
    digest: Digest


class Evidence(Message, frozen=True, kw_only=True, tag="evidence"):
    """All that a VM can show. ``hello`` is the Hello body, verbatim; ``report`` is checked for its size later.

    ``enrol_proof`` is there for the purpose ``enrol`` alone: it proves the operator's code (``enrol_code``).
    """

    version: int
    hello: Annotated[bytes, Meta(max_length=8192)]
    challenges: Annotated[list[SignedChallenge], Meta(min_length=1, max_length=8)]
    report: Annotated[bytes, Meta(max_length=4096)]
    manifest: PublicArea | UnsetType = UNSET
    certificates: Annotated[bytes, Meta(max_length=MAX_CERTIFICATES)] | UnsetType = UNSET
    quote: Quote | UnsetType = UNSET
    pcrs: Annotated[list[PcrValue], Meta(max_length=24)] | UnsetType = UNSET
    event_log: Annotated[bytes, Meta(max_length=MAX_EVENT_LOG)] | UnsetType = UNSET
    enrol_proof: EnrolProof | UnsetType = UNSET


class Credential(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What TPM2_MakeCredential gave: marshalled TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""

    id_object: Annotated[bytes, Meta(max_length=512)]
    encrypted_secret: Annotated[bytes, Meta(max_length=512)]


class Sealed(Message, frozen=True, kw_only=True, tag="sealed"):
    """An answer that only this VM's agent can open; ``credential`` is absent for kinds without a TPM."""

    version: int
    session: Session
    credential: Credential | UnsetType = UNSET
    sealed: Annotated[bytes, Meta(min_length=1, max_length=1 << 18)]


class Pending(Message, frozen=True, kw_only=True, tag="pending"):
    """A person has to approve first; the same Evidence, sent again, asks how far that is."""

    version: int
    session: Session
    approval: Code
    retry_after: Annotated[int, Meta(ge=1, le=3600)]


class Denial(Message, frozen=True, kw_only=True, tag="denial"):
    """The evidence is not authentic, or not from this VM. ``code`` is coarse on purpose: whoever reads it is unproven."""

    version: int
    session: Annotated[bytes, Meta(max_length=512)]
    code: Code


class VersionsSpoken(Message, frozen=True, kw_only=True, tag="unsupported-version"):
    """The request's version is not spoken here; these are."""

    version: int
    versions: list[int]


class Confirm(Message, frozen=True, kw_only=True, tag="confirm"):
    """The agent tells what became of an answer; only who opened both of its layers can make the MAC."""

    version: int
    session: Session
    outcome: Outcome
    mac: Digest


class Receipt(Message, frozen=True, kw_only=True, tag="receipt"):
    """A Confirm was verified and written down."""

    version: int
    session: Session
    outcome: Outcome


class VolumeKey(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The unlock key of one volume; ``next_unlock_key`` too, while it is being rotated."""

    uuid: Uuid
    unlock_key: Digest
    header_epoch: Annotated[int, Meta(ge=0)]
    next_unlock_key: Digest | UnsetType = UNSET

    def __repr__(self) -> str:
        """Show no key."""
        return f"VolumeKey(uuid={self.uuid!r}, ...)"


class Check(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One named check, what it expected and what it found; texts are for people, ``id`` is stable."""

    id: Code
    ok: bool
    expected: Text
    found: Text


class Keys(Message, frozen=True, kw_only=True, tag="keys"):
    """Payload of a Sealed: the keys, one for each volume that was asked for.

    ``recovery_key`` is there for the purpose ``enrol`` alone, if the owner wants it: every volume gets a keyslot for it, too.
    """

    confirm_key: Digest
    volumes: Annotated[list[VolumeKey], Meta(min_length=1, max_length=16)]
    recovery_key: Digest | UnsetType = UNSET

    def __repr__(self) -> str:
        """Show no key."""
        return f"Keys(volumes={self.volumes!r})"


class Verdict(Message, frozen=True, kw_only=True, tag="verdict"):
    """Payload of a Sealed: what the verifier thinks of authentic evidence, without any key."""

    confirm_key: Digest
    allowed: bool
    checks: Annotated[list[Check], Meta(max_length=256)]

    def __repr__(self) -> str:
        """Show no key."""
        return f"Verdict(allowed={self.allowed!r}, checks={self.checks!r})"


Answer = Sealed | Pending | Denial | VersionsSpoken
ChallengeReply = Challenge | Denial | VersionsSpoken
ConfirmReply = Receipt | Denial | VersionsSpoken
Payload = Keys | Verdict

REPLY_TYPES: Final = ("challenge", "sealed", "pending", "denial", "unsupported-version", "receipt")
"""Every message that a verifier signs."""

T = TypeVar("T")


_VERSION_SHOWN: Final = 10**40
"""Versions from here on are not shown to a person: JSON has room for numbers of thousands of digits."""
_TOLD: Final = 400
"""Characters of what is wrong with a message that are told."""


class _Versioned(Struct):
    """The one field that is read before a message's own version is known."""

    version: int


def encode(message: Struct) -> bytes:
    """Write a message in its only form."""
    return msgspec.json.encode(message)


# Made here, and not when the first message comes: msgspec fills in what it knows of a class while another thread may use
# it already, and then the process dies of SIGSEGV. A module is imported by one thread only.
_DECODERS: Final[dict[object, msgspec.json.Decoder[Any]]] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (*Message.__subclasses__(), ChallengeReply, Answer, ConfirmReply, Payload)
}
_VERSION_DECODER: Final = msgspec.json.Decoder(_Versioned)


def decode(kind: type[T], body: bytes) -> T:
    """Read a message strictly.

    Raises UnsupportedVersion if the version is not spoken here, and Malformed for everything else: too large,
    not JSON, an unknown, repeated, missing or wrong field, or any form but the one that ``encode`` writes.
    """
    message: T = _decode(kind, body, versioned=True)
    return message


def decode_challenge_reply(body: bytes) -> ChallengeReply:
    """Read what a verifier may reply to a Hello, as strictly as ``decode``."""
    reply: ChallengeReply = _decode(ChallengeReply, body, versioned=True)
    return reply


def decode_answer(body: bytes) -> Answer:
    """Read what a verifier may reply to Evidence, as strictly as ``decode``."""
    answer: Answer = _decode(Answer, body, versioned=True)
    return answer


def decode_confirm_reply(body: bytes) -> ConfirmReply:
    """Read what a verifier may reply to a Confirm, as strictly as ``decode``."""
    reply: ConfirmReply = _decode(ConfirmReply, body, versioned=True)
    return reply


def decode_payload(body: bytes) -> Payload:
    """Read the payload of a Sealed as strictly as ``decode``. Its version is the message's that carried it."""
    payload: Payload = _decode(Payload, body, versioned=False)
    return payload


def _decode(kind: object, body: bytes, *, versioned: bool) -> Any:  # noqa: ANN401 - of ``kind``, a type or a union
    if len(body) > MAX_BODY:
        raise _malformed("message.size", f"at most {MAX_BODY} bytes", f"{len(body)} bytes")
    decoder = _DECODERS[kind]
    try:
        if versioned and (version := _VERSION_DECODER.decode(body).version) not in VERSIONS:
            raise UnsupportedVersion(
                "A message is of a version that this release does not speak.",
                expected=" or ".join(str(known) for known in VERSIONS),
                found=str(version) if abs(version) < _VERSION_SHOWN else "a number of many digits",
                todo="Update the older of the two sides.",
            )
        message = decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        # msgspec's texts name the field and the rule; of values they quote none but a wrong type or an unknown name, and
        # these whole, however long their sender made them.
        text = str(error)
        found = text if len(text) <= _TOLD else f"{text[:_TOLD]}... ({len(text)} characters)"
        raise _malformed("message.decode", "a message of PROTOCOL.md section 3", found) from None
    if msgspec.json.encode(message) != body:
        raise _malformed(
            "message.form",
            "the one form of docs/protocol.md: fields in order, no blanks, canonical base64, nothing twice",
            "another form of the same content",
        )
    return message


def _malformed(code: str, expected: str, found: str) -> Malformed:
    return Malformed("A message cannot be read.", code=code, expected=expected, found=found)
