"""Only a reply that is signed for this request, as what it is, by a known key is an answer."""

from __future__ import annotations

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol import messages, signature
from kagimori_protocol.errors import NotAuthentic

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes_raw()
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
REQUEST = b"request"
REPLY = messages.encode(messages.Denial(version=1, session=b"", code="not-authentic"))


def refused(code: str, keys: list[bytes], header: str | None, request: bytes, reply: bytes) -> NotAuthentic:
    """Give the error with which a reply is refused, of the named check."""
    with pytest.raises(NotAuthentic) as caught:
        signature.verify(keys, header, request, reply)
    assert caught.value.code == code
    return caught.value


def test_a_signed_reply_verifies_under_the_key_that_signed_it() -> None:
    """Among several known keys the one that signed is returned, since the tie commits to it."""
    header = signature.sign(KEY, REQUEST, REPLY)
    other = OTHER.public_key().public_bytes_raw()
    assert signature.verify([other, PUBLIC], header, REQUEST, REPLY) == PUBLIC


def test_what_is_signed_is_what_the_protocol_says() -> None:
    """Label, zero byte, SHA-256 of the request, reply: made here from the text of PROTOCOL.md section 3."""
    covered = b"kagimori/1/reply/denial\x00" + hashlib.sha256(REQUEST).digest() + REPLY
    key_id = hashlib.sha256(PUBLIC).hexdigest()[:16]
    header = f"ed25519; key={key_id}; sig={base64.b64encode(KEY.sign(covered)).decode()}"
    assert signature.sign(KEY, REQUEST, REPLY) == header
    assert signature.verify([PUBLIC], header, REQUEST, REPLY) == PUBLIC


@pytest.mark.parametrize("reply_type", messages.REPLY_TYPES)
def test_each_type_of_reply_has_a_label_of_its_own(reply_type: str) -> None:
    """A signature over one type covers other bytes than over any other type."""
    others = {signature.signed_bytes(other, REQUEST, REPLY) for other in messages.REPLY_TYPES}
    assert len(others) == len(messages.REPLY_TYPES)
    assert signature.signed_bytes(reply_type, REQUEST, REPLY) in others


def test_a_reply_to_another_request_is_no_answer() -> None:
    """A recorded reply, however genuine, does not answer a new request."""
    refused("reply.signature", [PUBLIC], signature.sign(KEY, b"earlier", REPLY), REQUEST, REPLY)


def test_a_reply_that_was_changed_is_no_answer() -> None:
    """Every byte of the reply counts, and so does its end."""
    header = signature.sign(KEY, REQUEST, REPLY)
    for changed in (REPLY.replace(b"not-authentic", b"not-authentiC"), REPLY + b" ", REPLY[:-2] + b"}"):
        refused("reply.signature", [PUBLIC], header, REQUEST, changed)


def test_a_key_that_the_image_does_not_know_signs_nothing() -> None:
    """The set of keys comes from the measured configuration; no set, no answer."""
    header = signature.sign(OTHER, REQUEST, REPLY)
    assert (
        refused("reply.key", [PUBLIC], header, REQUEST, REPLY).expected
        == f"one of {signature.key_id(PUBLIC)}"
    )
    assert "no keys at all" in str(refused("reply.key", [], header, REQUEST, REPLY))


def test_a_foreign_signature_under_a_known_name_is_refused() -> None:
    """The key id is only a hint; the key itself decides."""
    foreign = signature.sign(OTHER, REQUEST, REPLY).replace(
        signature.key_id(OTHER.public_key().public_bytes_raw()), signature.key_id(PUBLIC)
    )
    refused("reply.signature", [PUBLIC], foreign, REQUEST, REPLY)


def _loosened(header: str) -> str:
    """Set a bit of the base64 that stands for no bit of the signature."""
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return header[:-3] + last[last.index(header[-3]) + 1] + "=="


GOOD = signature.sign(KEY, REQUEST, REPLY)


@pytest.mark.parametrize(
    ("header", "code"),
    [
        pytest.param(None, "reply.unsigned", id="no header"),
        pytest.param("", "reply.unsigned", id="an empty header"),
        pytest.param(GOOD + "\n", "reply.unsigned", id="a line break behind"),
        pytest.param(" " + GOOD, "reply.unsigned", id="a blank in front"),
        pytest.param(GOOD.replace("; ", ";"), "reply.unsigned", id="no blanks"),
        pytest.param(GOOD.replace("ed25519", "none"), "reply.unsigned", id="the algorithm none"),
        pytest.param(GOOD.replace("ed25519", "ED25519"), "reply.unsigned", id="another case"),
        pytest.param(GOOD[:-4] + "==", "reply.unsigned", id="a signature that is cut"),
        pytest.param(GOOD + ", " + GOOD, "reply.unsigned", id="two signatures"),
        pytest.param(GOOD.replace("key=", "key=00"), "reply.unsigned", id="a longer key id"),
        pytest.param(_loosened(GOOD), "reply.signature", id="loose base64"),
    ],
)
def test_a_header_has_one_form(header: str | None, code: str) -> None:
    """Whatever else is there instead is no signature."""
    refused(code, [PUBLIC], header, REQUEST, REPLY)


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>502</html>", id="a page of a proxy"),
        pytest.param(b"{}", id="no type"),
        pytest.param(b'{"type":"keys"}', id="a payload outside its seal"),
        pytest.param(b'{"type":"hello"}', id="a request"),
        pytest.param(b'{"type":["denial"]}', id="a type that is a list"),
        pytest.param(b'{"type":"\xff"}', id="no UTF-8"),
        pytest.param(b"[" * 100_000, id="100 000 lists"),
    ],
)
def test_what_no_verifier_signs_is_neither_signed_nor_verified(reply: bytes) -> None:
    """Only the types of REPLY_TYPES have a label, so a key cannot be used for anything else."""
    with pytest.raises(NotAuthentic):
        signature.sign(KEY, REQUEST, reply)
    refused("reply.signature", [PUBLIC], GOOD, REQUEST, reply)


def test_a_configured_key_of_the_wrong_size_verifies_nothing() -> None:
    """It is refused like a signature that does not hold, not with a stray ValueError."""
    short = PUBLIC[:31]
    header = GOOD.replace(signature.key_id(PUBLIC), signature.key_id(short))
    refused("reply.signature", [short], header, REQUEST, REPLY)


@given(header=st.text(), reply=st.binary())
def test_no_header_and_no_reply_make_it_stumble(header: str, reply: bytes) -> None:
    """Only NotAuthentic leaves."""
    with pytest.raises(NotAuthentic):
        signature.verify([PUBLIC], header, REQUEST, reply)
    with pytest.raises(NotAuthentic):
        signature.verify([PUBLIC], GOOD, REQUEST, reply)
