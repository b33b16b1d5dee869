"""Messages have one form, are strict about it, never change, and show no key."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from typing import get_args

import msgspec
import pytest
from msgspec import Struct

from kagimori_protocol import messages, snp
from kagimori_protocol.errors import Malformed, UnsupportedVersion

UUID = "0b3a6a7c-5c1b-4f5e-9d0e-0f4f8f6f2a11"
SECRET = bytes(range(0x40, 0x60))
DIGEST = b"\x11" * 32

SAMPLES: dict[str, Struct] = {
    "a Hello without a TPM": messages.Hello(
        version=1,
        vm_id="web1",
        purpose="unlock",
        kind="snp-direct",
        hpke_public_key=bytes(messages.HPKE_PUBLIC_SIZE),
        volumes=[UUID],
        agent="kagimori 0.1",
    ),
    "a Hello with a TPM": messages.Hello(
        version=1,
        vm_id="web1",
        purpose="dry-run",
        kind="svsm-vtpm",
        hpke_public_key=bytes(messages.HPKE_PUBLIC_SIZE),
        ek_public=b"ek",
        ak_public=b"ak",
        volumes=[],
        agent="kagimori 0.1",
    ),
    "a Challenge": messages.Challenge(
        version=1, session=b"token", nonce=DIGEST, expires_in=120, pcr_selection=bytes(4)
    ),
    "an Evidence with a report alone": messages.Evidence(
        version=1,
        hello=b"{}",
        challenges=[messages.SignedChallenge(key=DIGEST, challenge=b"{}")],
        report=b"report",
    ),
    "an Evidence with everything": messages.Evidence(
        version=1,
        hello=b"{}",
        challenges=[messages.SignedChallenge(key=DIGEST, challenge=b"{}")] * 8,
        report=b"report",
        manifest=b"manifest",
        certificates=b"",
        quote=messages.Quote(attest=b"attest", signature=b"signature"),
        pcrs=[messages.PcrValue(index=23, digest=DIGEST)],
        event_log=b"log",
        enrol_proof=bytes(64),
    ),
    "a Sealed": messages.Sealed(
        version=1,
        session=b"s",
        credential=messages.Credential(id_object=b"i", encrypted_secret=b"e"),
        sealed=b"sealed",
    ),
    "a Pending": messages.Pending(version=1, session=b"s", approval="a-1", retry_after=5),
    "a Denial": messages.Denial(version=1, session=b"", code="not-authentic"),
    "a VersionsSpoken": messages.VersionsSpoken(version=1, versions=[1, 2]),
    "a Confirm": messages.Confirm(version=1, session=b"s", outcome="opened", mac=DIGEST),
    "a Receipt": messages.Receipt(version=1, session=b"s", outcome="received"),
}
KEYS = messages.Keys(
    confirm_key=SECRET,
    volumes=[
        messages.VolumeKey(uuid=UUID, unlock_key=SECRET, header_epoch=0, next_unlock_key=SECRET),
    ],
    recovery_key=SECRET,
)
VERDICT = messages.Verdict(
    confirm_key=SECRET,
    allowed=False,
    checks=[messages.Check(id="cap.off", ok=False, expected="PCR 15 zero", found="capped")],
)

DENIAL = b'{"type":"denial","version":1,"session":"AAEC","code":"not-authentic"}'


def refused(kind: type[Struct], body: bytes) -> Malformed:
    """Give the named error with which a body is refused."""
    with pytest.raises(Malformed) as caught:
        messages.decode(kind, body)
    assert caught.value.code.startswith("message.")
    assert caught.value.expected
    return caught.value


@pytest.mark.parametrize("message", SAMPLES.values(), ids=SAMPLES.keys())
def test_a_message_reads_back_as_what_was_written(message: Struct) -> None:
    """Encoding and decoding are inverse, byte for byte."""
    body = messages.encode(message)
    read = messages.decode(type(message), body)
    assert read == message
    assert messages.encode(read) == body


@pytest.mark.parametrize("payload", [KEYS, VERDICT], ids=["keys", "verdict"])
def test_a_payload_reads_back_as_what_was_written(payload: messages.Payload) -> None:
    """Both payloads are told apart by their type and read without a version of their own."""
    assert messages.decode_payload(messages.encode(payload)) == payload


def test_the_plain_form_is_the_documented_one() -> None:
    """The bytes are pinned: type first, fields in order, no blanks, padded base64."""
    denial = messages.Denial(version=1, session=b"\x00\x01\x02", code="not-authentic")
    assert messages.encode(denial) == DENIAL
    assert messages.decode(messages.Denial, DENIAL) == denial


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(DENIAL.replace(b":1", b": 1"), id="a blank between key and value"),
        pytest.param(DENIAL + b"\n", id="a newline at the end"),
        pytest.param(b" " + DENIAL, id="a blank in front"),
        pytest.param(b"\xef\xbb\xbf" + DENIAL, id="a byte order mark"),
        pytest.param(DENIAL + DENIAL, id="a second message behind"),
        pytest.param(DENIAL + b"\x00", id="a zero byte behind"),
        pytest.param(
            b'{"version":1,"type":"denial","session":"AAEC","code":"not-authentic"}',
            id="keys in another order",
        ),
        pytest.param(DENIAL.replace(b'"version":1', b'"version":1,"version":1'), id="a field twice"),
        pytest.param(
            DENIAL.replace(b'"version":1', b'"version":2,"version":1'), id="a field twice, 1 counting"
        ),
        pytest.param(
            DENIAL.replace(b'"type":"denial"', b'"type":"denial","type":"denial"'), id="a type twice"
        ),
        pytest.param(DENIAL.replace(b"AAEC", b"AAEC="), id="base64 with padding too much"),
        pytest.param(DENIAL.replace(b"AAEC", b"AAE"), id="base64 without its padding"),
        pytest.param(DENIAL.replace(b"AAEC", b"AAF="), id="base64 whose last bits are not zero"),
        pytest.param(DENIAL.replace(b"AAEC", b"AA\\nEC"), id="base64 with a line break"),
        pytest.param(DENIAL.replace(b"AAEC", b"_-__"), id="base64 of the alphabet for URLs"),
        pytest.param(DENIAL.replace(b"denial", b"d\\u0065nial"), id="a letter written as an escape"),
        pytest.param(DENIAL.replace(b'"code"', b'"c\\u006fde"'), id="a key written as an escape"),
        pytest.param(DENIAL.replace(b":1", b":1.0"), id="a float for an int"),
        pytest.param(DENIAL.replace(b":1", b":1e0"), id="an exponent for an int"),
        pytest.param(DENIAL.replace(b":1", b":01"), id="a leading zero"),
        pytest.param(DENIAL.replace(b":1", b":true"), id="a bool for an int"),
        pytest.param(DENIAL.replace(b":1", b':"1"'), id="a string for an int"),
        pytest.param(DENIAL.replace(b":1", b":null"), id="null for an int"),
        pytest.param(DENIAL.replace(b'"AAEC"', b"[0,1,2]"), id="a list for bytes"),
        pytest.param(DENIAL.replace(b'"}', b'","more":0}'), id="an unknown field"),
        pytest.param(DENIAL.replace(b',"code":"not-authentic"', b""), id="a missing field"),
        pytest.param(DENIAL.replace(b'"type":"denial",', b""), id="no type"),
        pytest.param(DENIAL.replace(b"denial", b"sealed"), id="another type"),
        pytest.param(DENIAL.replace(b"not-authentic", b"Not authentic"), id="a code of another form"),
        pytest.param(DENIAL.replace(b"not-authentic", b"not-authentic\\n"), id="a code with a line break"),
        pytest.param(DENIAL.replace(b"not-authentic", b"caf\xe9"), id="no UTF-8"),
        pytest.param(DENIAL.replace(b"not-authentic", b"\xed\xa0\x80"), id="half a surrogate pair"),
        pytest.param(DENIAL.replace(b":1", b":" + b"9" * 5000), id="a number of 5000 digits"),
        pytest.param(DENIAL[:-1], id="the end missing"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"[]", id="a list"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[" * 100_000, id="100 000 lists"),
        pytest.param(b'{"a":' * 100_000, id="100 000 objects"),
        pytest.param(DENIAL.replace(b":1", b":" + b"[" * 50_000 + b"]" * 50_000), id="a field 50 000 deep"),
    ],
)
def test_any_form_but_one_is_refused(body: bytes) -> None:
    """What two parsers might read differently, or what hashes differently for the same content, is no message."""
    refused(messages.Denial, body)


def test_an_optional_field_is_absent_and_never_null() -> None:
    """There is one way to say that there is no TPM."""
    body = messages.encode(SAMPLES["a Hello without a TPM"])
    refused(messages.Hello, body.replace(b'"volumes"', b'"ek_public":null,"volumes"'))


def test_a_body_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    """The size counts, whatever the bytes are."""
    assert refused(messages.Denial, b"\xff" * (messages.MAX_BODY + 1)).code == "message.size"
    assert refused(messages.Denial, b"\xff" * messages.MAX_BODY).code == "message.decode"


@pytest.mark.parametrize("place", ['{"type":"%s"}', '{"type":"hello","version":1,"%s":1}', '{"%s":1}'])
def test_a_long_name_of_the_senders_choice_is_not_repeated_whole(place: str) -> None:
    """Refusals are kept and sent: whoever chose a name does not choose how much room they take."""
    body = (place % ("x" * (messages.MAX_BODY // 2))).encode()
    for kind in (messages.Hello, messages.Evidence):
        assert len(str(refused(kind, body))) < 1000


def test_the_largest_evidence_fits_a_body() -> None:
    """All fields at their largest stay below the limit of a body."""
    largest = messages.Evidence(
        version=1,
        hello=bytes(8192),
        challenges=[messages.SignedChallenge(key=DIGEST, challenge=bytes(4096))] * 8,
        report=bytes(4096),
        manifest=bytes(1024),
        certificates=bytes(messages.MAX_CERTIFICATES),
        quote=messages.Quote(attest=bytes(2048), signature=bytes(1024)),
        pcrs=[messages.PcrValue(index=0, digest=DIGEST)] * 24,
        event_log=bytes(messages.MAX_EVENT_LOG),
        enrol_proof=bytes(64),
    )
    assert messages.decode(messages.Evidence, messages.encode(largest)) == largest


@pytest.mark.parametrize("version", [0, 2, -1, 2**63, 10**30])
def test_another_version_is_named_as_such(version: int) -> None:
    """A version that is not spoken is told apart from bytes that cannot be read."""
    with pytest.raises(UnsupportedVersion) as caught:
        messages.decode(messages.Denial, DENIAL.replace(b":1", b":%d" % version))
    assert (caught.value.expected, caught.value.found) == ("1", str(version))


def test_another_version_may_have_fields_that_are_unknown_here() -> None:
    """The version is read first, so a later version's new field is not taken for a malformed message."""
    with pytest.raises(UnsupportedVersion):
        messages.decode(messages.Denial, b'{"type":"denial","version":2,"new":[{}]}')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vm_id", "Web1"),
        ("vm_id", ""),
        ("vm_id", "../web1"),
        ("vm_id", "web1\n"),
        ("vm_id", "w" * 64),
        ("purpose", "lock"),
        ("kind", "tdx"),
        ("hpke_public_key", base64.b64encode(bytes(messages.HPKE_PUBLIC_SIZE - 1)).decode()),
        ("hpke_public_key", base64.b64encode(bytes(messages.HPKE_PUBLIC_SIZE + 1)).decode()),
        ("ek_public", ""),
        ("ak_public", base64.b64encode(bytes(1025)).decode()),
        ("volumes", [UUID.upper()]),
        ("volumes", [UUID + "\n"]),
        ("volumes", [UUID] * 17),
        ("agent", ""),
        ("agent", "kagimori\x1b[2J"),
        ("agent", "k" * 65),
    ],
)
def test_a_field_outside_its_bounds_is_refused(field: str, value: object) -> None:
    """Names, sizes and counts are bounded where they are defined."""
    content = msgspec.json.decode(messages.encode(SAMPLES["a Hello with a TPM"]))
    assert field in content
    content[field] = value
    refused(messages.Hello, msgspec.json.encode(content))


def test_a_message_cannot_pass_for_another() -> None:
    """Each message names its type, and a Confirm is no Receipt although their fields are alike."""
    for name, message in SAMPLES.items():
        for other in SAMPLES.values():
            if type(other) is not type(message):
                assert refused(type(other), messages.encode(message)).code == "message.decode", name


@pytest.mark.parametrize("union", [messages.Answer, messages.ChallengeReply, messages.ConfirmReply])
def test_a_reply_is_one_of_those_that_answer_the_request(union: type[Struct]) -> None:
    """A reply that answers another request is refused by its type; a payload is never a reply."""
    members = get_args(union)
    for message in (*SAMPLES.values(), KEYS, VERDICT):
        body = messages.encode(message)
        if isinstance(message, members):
            assert messages.decode(union, body) == message
        else:
            refused(union, body)


def test_every_reply_type_is_one_that_a_verifier_signs() -> None:
    """The list of signed replies and the unions of replies name the same types."""
    replies = {
        *get_args(messages.Answer),
        *get_args(messages.ChallengeReply),
        *get_args(messages.ConfirmReply),
    }
    assert {kind.__struct_config__.tag for kind in replies} == set(messages.REPLY_TYPES)


def _structs() -> list[type[Struct]]:
    """Find every struct that crosses the wire."""
    found = [
        value for value in vars(messages).values() if isinstance(value, type) and issubclass(value, Struct)
    ]
    return [
        kind for kind in found if kind.__module__ == messages.__name__ and not kind.__name__.startswith("_")
    ]


@pytest.mark.parametrize("kind", _structs(), ids=lambda kind: kind.__name__)
def test_every_message_is_frozen_and_strict(kind: type[Struct]) -> None:
    """What was verified cannot change afterwards, and no struct accepts unknown fields."""
    assert kind.__struct_config__.frozen
    assert kind.__struct_config__.forbid_unknown_fields


def test_a_message_cannot_be_changed() -> None:
    """Assigning to a field fails, on a message and inside of one."""
    with pytest.raises(AttributeError):
        VERDICT.allowed = True  # type: ignore[misc]  # the point of the test
    with pytest.raises(AttributeError):
        VERDICT.checks[0].ok = True  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize("shown", [repr, str, "{!r}".format, "{}".format])
@pytest.mark.parametrize("secretive", [KEYS, KEYS.volumes[0], VERDICT, [KEYS], {"payload": VERDICT}])
def test_no_key_shows_in_a_repr(shown: Callable[[object], str], secretive: object) -> None:
    """A log line or a traceback with a payload in it gives away nothing."""
    text = shown(secretive)
    for form in (
        repr(SECRET)[2:-1],
        SECRET.hex(),
        base64.b64encode(SECRET).decode(),
        str(list(SECRET))[1:-1],
    ):
        assert form not in text
    assert "confirm_key" not in text


def test_an_error_shows_no_key() -> None:
    """A payload that cannot be read is described without its bytes."""
    body = messages.encode(KEYS)
    encoded = base64.b64encode(SECRET)
    for broken in (body[:-1], body.replace(encoded, encoded[:-4]), body.replace(b"header", b"Header")):
        with pytest.raises(Malformed) as caught:
            messages.decode_payload(broken)
        assert encoded.decode()[:-4] not in str(caught.value)


def test_the_table_of_report_fields_names_what_a_report_has() -> None:
    """snp.FIELDS and the fields of Report are the same names in the same order."""
    names = [field.name for field in dataclasses.fields(snp.Report)]
    assert names == ["raw", *snp.FIELDS]
