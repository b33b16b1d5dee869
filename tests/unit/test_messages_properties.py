"""Whatever is written can be read, and nothing but what is written can be read."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from kagimori_protocol import messages
from kagimori_protocol.errors import KagimoriError, UnsupportedVersion

digests = st.binary(min_size=32, max_size=32)
uuids = st.uuids().map(str)
small = st.binary(min_size=1, max_size=64)
codes = st.from_regex(r"\A[a-z0-9][a-z0-9.-]{0,62}\Z")
texts = st.text(max_size=50)
sessions = st.binary(min_size=1, max_size=512)
version = st.just(1)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Give a value or leave the field out."""
    return st.one_of(st.just(UNSET), strategy)


hellos = st.builds(
    messages.Hello,
    version=version,
    vm_id=st.from_regex(r"\A[a-z0-9][a-z0-9._-]{0,62}\Z"),
    purpose=st.sampled_from(messages.PURPOSES),
    kind=st.sampled_from(messages.KINDS),
    hpke_public_key=st.binary(min_size=messages.HPKE_PUBLIC_SIZE, max_size=messages.HPKE_PUBLIC_SIZE),
    ek_public=maybe(small),
    ak_public=maybe(small),
    volumes=st.lists(uuids, max_size=16),
    agent=st.from_regex(r"\A[\x20-\x7e]{1,64}\Z"),
)
challenges = st.builds(
    messages.Challenge,
    version=version,
    session=st.binary(max_size=512),
    nonce=digests,
    expires_in=st.integers(1, 3600),
    pcr_selection=st.binary(min_size=4, max_size=64),
)
evidences = st.builds(
    messages.Evidence,
    version=version,
    hello=small,
    challenges=st.lists(
        st.builds(messages.SignedChallenge, key=digests, challenge=small), min_size=1, max_size=8
    ),
    report=small,
    manifest=maybe(small),
    certificates=maybe(st.binary(max_size=64)),
    quote=maybe(st.builds(messages.Quote, attest=small, signature=small)),
    pcrs=maybe(st.lists(st.builds(messages.PcrValue, index=st.integers(0, 23), digest=digests), max_size=24)),
    event_log=maybe(small),
    enrol_proof=maybe(st.binary(min_size=64, max_size=64)),
)
sealed = st.builds(
    messages.Sealed,
    version=version,
    session=sessions,
    credential=maybe(st.builds(messages.Credential, id_object=small, encrypted_secret=small)),
    sealed=small,
)
pendings = st.builds(
    messages.Pending, version=version, session=sessions, approval=codes, retry_after=st.integers(1, 3600)
)
denials = st.builds(messages.Denial, version=version, session=st.binary(max_size=512), code=codes)
versions_spoken = st.builds(messages.VersionsSpoken, version=version, versions=st.lists(st.integers()))
outcomes = st.sampled_from(["received", "opened", "failed", "reencrypted"])
confirms = st.builds(messages.Confirm, version=version, session=sessions, outcome=outcomes, mac=digests)
receipts = st.builds(messages.Receipt, version=version, session=sessions, outcome=outcomes)
keys = st.builds(
    messages.Keys,
    confirm_key=digests,
    volumes=st.lists(
        st.builds(
            messages.VolumeKey,
            uuid=uuids,
            unlock_key=digests,
            header_epoch=st.integers(0, 2**63),
            next_unlock_key=maybe(digests),
        ),
        min_size=1,
        max_size=16,
    ),
    recovery_key=maybe(digests),
)
verdicts = st.builds(
    messages.Verdict,
    confirm_key=digests,
    allowed=st.booleans(),
    checks=st.lists(st.builds(messages.Check, id=codes, ok=st.booleans(), expected=texts, found=texts)),
)
versioned = st.one_of(
    hellos, challenges, evidences, sealed, pendings, denials, versions_spoken, confirms, receipts
)
ROOTS = [
    messages.Hello,
    messages.Challenge,
    messages.Evidence,
    messages.Confirm,
    messages.Answer,
    messages.ChallengeReply,
    messages.ConfirmReply,
]


@given(versioned)
def test_every_message_survives_the_wire(message: msgspec.Struct) -> None:
    """Any message that can be made reads back equal."""
    assert messages.decode(type(message), messages.encode(message)) == message


@given(st.one_of(keys, verdicts))
def test_every_payload_survives_the_wire(payload: messages.Payload) -> None:
    """Any payload that can be made reads back equal."""
    assert messages.decode_payload(messages.encode(payload)) == payload


@given(versioned, st.data())
def test_a_changed_message_is_refused_or_says_what_it_is(
    message: msgspec.Struct, data: st.DataObject
) -> None:
    """Whatever a changed body decodes to, it encodes back to exactly that body: no two bodies have one meaning."""
    body = bytearray(messages.encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(body) - 1))
        body[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.one_of(
                st.binary(max_size=2),
                st.sampled_from([b'"', b"\\", b"{", b" ", b"1", b"=", b",", b"\\u0041"]),
            )
        )
    try:
        read = messages.decode(type(message), bytes(body))
    except KagimoriError:
        return
    assert messages.encode(read) == body


@pytest.mark.parametrize("kind", ROOTS, ids=str)
@given(body=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_no_bytes_make_a_decoder_stumble(kind: type[msgspec.Struct], body: bytes) -> None:
    """Only errors of ours leave a decoder."""
    with pytest.raises(KagimoriError):
        messages.decode(kind, body)
    with pytest.raises(KagimoriError):
        messages.decode_payload(body)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(versioned, st.data())
def test_a_field_of_any_other_type_is_refused_or_is_what_it_says(
    message: msgspec.Struct, data: st.DataObject
) -> None:
    """Any JSON value in the place of any field is refused, or is a value that the field may have."""
    content = msgspec.json.decode(messages.encode(message))
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(json_values)
    body = msgspec.json.encode(content)
    try:
        read = messages.decode(type(message), body)
    except KagimoriError:
        return
    assert messages.encode(read) == body


@given(st.integers(1, 4000), st.booleans())
def test_a_version_of_thousands_of_digits_is_named_in_a_line(digits: int, negative: bool) -> None:
    """What is told of it reaches a console; JSON has room for any number."""
    body = b'{"type":"denial","version":' + b"-" * negative + b"9" * digits + b',"session":"","code":"x"}'
    with pytest.raises(UnsupportedVersion) as caught:
        messages.decode(messages.Denial, body)
    assert len(str(caught.value)) < 300
