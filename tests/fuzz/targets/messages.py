"""Every message, in both directions, and the header that makes a reply an answer.

The first byte chooses the type; the rest is the body. One choice is a reply with its header: cut in two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import UNSET
from tests.fuzz import workshop
from tests.fuzz.bounds import BOUNDS
from tests.fuzz.mutators import documents, parts
from tests.fuzz.target import Target

from kagimori_protocol import messages, signature
from kagimori_protocol.errors import Malformed, NotAuthentic, UnsupportedVersion
from kagimori_protocol.messages import MAX_BODY, MAX_CERTIFICATES, MAX_EVENT_LOG

DECODERS: tuple[Callable[[bytes], msgspec.Struct], ...] = (
    functools.partial(messages.decode, messages.Hello),
    functools.partial(messages.decode, messages.Challenge),
    functools.partial(messages.decode, messages.Evidence),
    functools.partial(messages.decode, messages.Confirm),
    messages.decode_challenge_reply,
    messages.decode_answer,
    messages.decode_confirm_reply,
    messages.decode_payload,
)
HELLO, CHALLENGE, EVIDENCE, CONFIRM, CHALLENGE_REPLY, ANSWER, CONFIRM_REPLY, PAYLOAD = range(len(DECODERS))
SIGNED = len(DECODERS)
REQUEST = b"a request"
UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"


@functools.cache
def key() -> Ed25519PrivateKey:
    """Give a verifier's key."""
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def run(data: bytes) -> None:
    """Read a body as the message that its first byte says."""
    choice, body = workshop.head(data)
    choice %= len(DECODERS) + 1
    if choice == SIGNED:
        check_signed(body)
        return
    message = DECODERS[choice](body)
    assert messages.encode(message) == body
    assert not hidden(message) or hidden(message) not in repr(message).encode()
    content = msgspec.json.decode(body)
    assert content["type"] == type(message).__struct_config__.tag


def check_signed(data: bytes) -> None:
    """A reply by one of our keys to our request is an answer, and no other is."""
    header, reply = workshop.cut(data, 2)
    public = key().public_key().public_bytes_raw()
    text = header.decode("latin-1")
    if header == b"sign":
        text = signature.sign(key(), REQUEST, reply)
    assert signature.verify([public], text, REQUEST, reply) == public
    assert text == signature.sign(key(), REQUEST, reply)


def hidden(message: msgspec.Struct) -> bytes:
    """Give a key that a message holds, as its repr would show it; nothing where there is none."""
    found = message.volumes[0].unlock_key if isinstance(message, messages.Keys) else b""
    return repr(found).encode() if len(set(found)) > 4 else b""


def examples() -> Iterator[tuple[int, msgspec.Struct]]:
    """Give every message, with all of its fields and with as few as may be."""
    hello: dict[str, Any] = {
        "version": 1,
        "vm_id": "web1",
        "purpose": "unlock",
        "kind": "svsm-vtpm",
        "hpke_public_key": bytes(range(256)) * 4 + bytes(messages.HPKE_PUBLIC_SIZE - 1024),
        "agent": "kagimori-agent 0.1",
    }
    least = messages.Hello(**hello, volumes=[])
    yield HELLO, least
    full = messages.Hello(**hello, volumes=[UUID], ek_public=b"ek" * 157, ak_public=b"ak" * 44)
    yield HELLO, full
    challenge = messages.Challenge(
        version=1, session=b"s" * 168, nonce=bytes(range(32)), expires_in=60, pcr_selection=bytes(4)
    )
    yield CHALLENGE, challenge
    yield CHALLENGE_REPLY, challenge
    signed = messages.SignedChallenge(key=bytes(range(32)), challenge=messages.encode(challenge))
    yield EVIDENCE, messages.Evidence(version=1, hello=b"{}", challenges=[signed], report=b"")
    yield (
        EVIDENCE,
        messages.Evidence(
            version=1,
            hello=messages.encode(full),
            challenges=[signed, signed],
            report=bytes(1184),
            manifest=b"m" * 314,
            certificates=bytes(200),
            quote=messages.Quote(attest=b"a" * 129, signature=b"s" * 72),
            pcrs=[messages.PcrValue(index=index, digest=bytes(32)) for index in (0, 23)],
            event_log=b"log" * 50,
            enrol_proof=bytes(range(64)),
        ),
    )
    for outcome in ("received", "opened", "failed", "reencrypted"):
        yield CONFIRM, messages.Confirm(version=1, session=b"s", outcome=outcome, mac=bytes(32))
    yield CONFIRM_REPLY, messages.Receipt(version=1, session=b"s", outcome="opened")
    credential = messages.Credential(id_object=b"i" * 68, encrypted_secret=b"e" * 258)
    for layer in (credential, UNSET):
        yield ANSWER, messages.Sealed(version=1, session=b"s", credential=layer, sealed=b"x" * 300)
    yield ANSWER, messages.Pending(version=1, session=b"s", approval="a1", retry_after=10)
    denial = messages.Denial(version=1, session=b"", code="not-authentic")
    spoken = messages.VersionsSpoken(version=1, versions=[1, 2, 1 << 70])
    for choice in (CHALLENGE_REPLY, ANSWER, CONFIRM_REPLY):
        yield choice, denial
        yield choice, spoken
    volume = messages.VolumeKey(uuid=UUID, unlock_key=bytes(range(32)), header_epoch=0)
    rotated = msgspec.structs.replace(volume, next_unlock_key=bytes(range(32, 64)), header_epoch=1 << 63)
    yield PAYLOAD, messages.Keys(confirm_key=bytes(32), volumes=[volume, rotated])
    yield PAYLOAD, messages.Keys(confirm_key=bytes(32), volumes=[volume], recovery_key=bytes(range(32)))
    check = messages.Check(
        id="pcr.8", ok=False, expected='a "value"\n', found="another: \u00e9\u4e16\U0001f511"
    )
    yield PAYLOAD, messages.Verdict(confirm_key=bytes(32), allowed=False, checks=[check])


def seeds() -> Iterator[bytes]:
    """Give every message, and signed replies, with the header made or written."""
    for choice, message in examples():
        body = messages.encode(message)
        yield bytes([choice]) + body
        if choice in (CHALLENGE_REPLY, ANSWER, CONFIRM_REPLY):
            yield bytes([SIGNED]) + workshop.joined(b"sign", body)
            header = signature.sign(key(), REQUEST, body).encode()
            yield bytes([SIGNED]) + workshop.joined(header, body)


def worst() -> Iterator[tuple[str, bytes]]:
    """Give bodies as large as may be: full ones, and what makes JSON parsers work."""
    room = MAX_BODY - 60
    full = messages.Evidence(
        version=1,
        hello=bytes(8192),
        challenges=[messages.SignedChallenge(key=bytes(32), challenge=bytes(4096))] * 8,
        report=bytes(4096),
        certificates=bytes(MAX_CERTIFICATES),
        event_log=bytes(MAX_EVENT_LOG),
    )
    yield "the largest evidence", bytes([EVIDENCE]) + messages.encode(full)
    start = b'{"type":"unsupported-version","version":1,"versions":['
    numbers = {
        "as many numbers as fit": b"1,",
        "as many of 19 digits": b"9" * 19 + b",",
        "numbers of 4300 digits": b"9" * 4300 + b",",
    }
    for what, one in numbers.items():
        yield what, bytes([ANSWER]) + start + (one * (room // len(one)))[:-1] + b"]}"
    yield "one number of everything", bytes([ANSWER]) + start + b"9" * room + b"]}"
    for what, body in {
        "lists in lists": b"[" * MAX_BODY,
        "objects in objects": b'{"a":' * (MAX_BODY // 5),
        "lists in an unknown field": b'{"type":"hello","x":' + b"[" * (room // 2) + b"]" * (room // 2) + b"}",
        "as many fields as fit": b"{" + b",".join(b'"%06x":0' % i for i in range(room // 11)) + b"}",
        "one field, again and again": b"{" + b'"version":1,' * (room // 12) + b'"version":1}',
        "one string of escapes": b'{"type":"' + b"\\u00e9" * (room // 6) + b'"}',
        "blanks": b" " * MAX_BODY,
    }.items():
        for choice in (EVIDENCE, ANSWER):
            yield f"{what}, as {choice}", bytes([choice]) + body
    yield (
        "a signed reply of everything",
        bytes([SIGNED]) + workshop.joined(b"sign", start + b"1," * (room // 2 - 60) + b"1]}"),
    )
    yield "a header of everything", bytes([SIGNED]) + workshop.joined(b"ed25519; key=" + b"a" * 65000, b"{}")


TARGET = Target(
    name="messages",
    about="every message of the protocol, and the header that makes a reply an answer",
    bound=BOUNDS["messages"],
    refusals=(Malformed, UnsupportedVersion, NotAuthentic),
    run=run,
    seeds=seeds,
    worst=worst,
    mutate=parts.behind_choice(documents.mutate_message),
    covers=("kagimori_protocol.messages", "kagimori_protocol.signature"),
)
