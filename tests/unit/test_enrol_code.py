"""An operator's code: what a person may type, what is found out, and what its proof is good for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.enrol_code import EnrolCode, fingerprint, verify_proof
from kagimori_protocol.errors import NotAuthentic, UsageError
from kagimori_protocol.signature import key_id

VERIFIER = b"\x07" * 32
T0 = bytes(range(64))
secrets = st.binary(min_size=16, max_size=16)
CODE = EnrolCode(bytes(range(16)), fingerprint(VERIFIER))


@given(secrets, st.binary(min_size=10, max_size=10))
def test_a_code_is_read_as_it_was_written(secret: bytes, of: bytes) -> None:
    """In any case, with any dashes, and with letters for the digits that they look like."""
    code = EnrolCode(secret, of)
    text = code.text()
    assert [len(group) for group in text.split("-")] == [6] * 8
    for typed in (
        text,
        text.upper(),
        text.replace("-", ""),
        f" {text.replace('1', 'I').replace('0', 'o')}\n",
    ):
        read = EnrolCode.parse(typed)
        assert (read.text(), read.public_key, read.fingerprint) == (text, code.public_key, of)


@given(secrets, st.integers(0, 47), st.integers(1, 31))
def test_one_wrong_character_is_found_before_anything_is_sent(secret: bytes, at: int, off: int) -> None:
    """A code that was mistyped is not spent."""
    alphabet = "0123456789abcdefghjkmnpqrstvwxyz"
    text = EnrolCode(secret, fingerprint(VERIFIER)).text().replace("-", "")
    wrong = text[:at] + alphabet[alphabet.index(text[at]) ^ off] + text[at + 1 :]
    with pytest.raises(UsageError) as caught:
        EnrolCode.parse(wrong)
    assert caught.value.code == "enrol.code"


@given(st.text(max_size=80))
def test_whatever_is_typed_is_a_code_or_refused(text: str) -> None:
    """No traceback for a person, and what was typed is not told again: it may be most of a code."""
    with pytest.raises(UsageError) as caught:
        EnrolCode.parse(text)
    assert len(text) < 6 or text not in str(caught.value)


def test_a_code_names_one_verifier_by_the_digits_of_its_key_id() -> None:
    """What `identity show` prints begins as the fingerprint does, so a person can compare."""
    assert CODE.is_for(VERIFIER)
    assert not CODE.is_for(b"\x08" * 32)
    assert CODE.fingerprint.hex().startswith(key_id(VERIFIER))


def test_a_proof_is_good_for_one_code_and_one_exchange() -> None:
    """Neither another T0 nor another code's key takes it."""
    proof = CODE.prove(T0)
    assert verify_proof(CODE.public_key, T0, proof) == proof
    other = EnrolCode(bytes(16), CODE.fingerprint)
    for key, t0, made in (
        (CODE.public_key, bytes(64), proof),
        (other.public_key, T0, proof),
        (CODE.public_key, T0, other.prove(T0)),
        (CODE.public_key, T0, bytes(64)),
        (CODE.public_key, T0, b""),
        (b"", T0, proof),
    ):
        with pytest.raises(NotAuthentic) as caught:
            verify_proof(key, t0, made)
        assert caught.value.code == "enrol.proof"


def test_a_code_shows_no_secret() -> None:
    """A repr may end in a log."""
    assert CODE.text()[:20] not in repr(CODE)
    assert bytes(range(16)).hex() not in repr(CODE)


@pytest.mark.parametrize(("secret", "of"), [(b"", b"f" * 10), (bytes(15), b"f" * 10), (bytes(16), b"f" * 8)])
def test_a_code_of_other_sizes_is_none(secret: bytes, of: bytes) -> None:
    """Nothing is padded or cut."""
    with pytest.raises(UsageError):
        EnrolCode(secret, of)
