"""The tie: what goes into it counts, and nothing else can stand in for it. tests/conformance/vectors pins its values."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol import transcript
from kagimori_protocol.errors import Malformed


def sha512(data: bytes) -> bytes:
    """Hash with SHA-512."""
    return hashlib.sha512(data).digest()


def test_the_labels_are_those_of_the_protocol() -> None:
    """Each use has a label of its own, with the version in it."""
    labels = [value for name, value in vars(transcript).items() if name.startswith("LABEL_")]
    assert sorted(labels) == [
        b"kagimori/1/answer",
        b"kagimori/1/quote",
        b"kagimori/1/report-data",
        b"kagimori/1/svsm-nonce",
        b"kagimori/1/t0",
    ]


@pytest.mark.parametrize("count", [0, 9, 255, 256])
def test_no_challenge_or_too_many_are_refused(count: int) -> None:
    """Without a challenge nothing would be fresh, and the count must fit its byte."""
    with pytest.raises(Malformed) as caught:
        transcript.t0(b"hello", [(b"k" * 32, b"c")] * count)
    assert (caught.value.code, caught.value.found) == ("evidence.challenges", str(count))


@pytest.mark.parametrize("count", [1, 8])
def test_one_to_eight_challenges_are_covered(count: int) -> None:
    """Every challenge counts, and their number too."""
    challenges = [(bytes([number]) * 32, bytes([number])) for number in range(count)]
    assert len(transcript.t0(b"hello", challenges)) == 64


@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_an_svsm_nonce_has_64_bytes(size: int) -> None:
    """With another size, nonce and manifest could be cut differently; nothing is padded."""
    with pytest.raises(Malformed) as caught:
        transcript.svsm_report_data(bytes(size), b"manifest")
    assert caught.value.code == "svsm.nonce"


def test_the_order_of_challenges_counts() -> None:
    """The list is covered as it is sent."""
    first, second = (b"a" * 32, b"1"), (b"b" * 32, b"2")
    assert transcript.t0(b"h", [first, second]) != transcript.t0(b"h", [second, first])


def test_a_challenge_under_another_key_is_another_challenge() -> None:
    """Evidence made for one verifier's key says nothing to a verifier with another."""
    assert transcript.t0(b"h", [(b"a" * 32, b"1")]) != transcript.t0(b"h", [(b"b" * 32, b"1")])


pairs = st.tuples(st.binary(max_size=33), st.binary(max_size=40))
tuples = st.tuples(st.binary(max_size=40), st.lists(pairs, min_size=1, max_size=8))


@given(tuples, tuples)
def test_t0_is_equal_for_equal_inputs_only(
    one: tuple[bytes, list[tuple[bytes, bytes]]], other: tuple[bytes, list[tuple[bytes, bytes]]]
) -> None:
    """No two inputs meet, however bytes are moved between Hello, keys and challenges."""
    assert (transcript.t0(*one) == transcript.t0(*other)) == (one == other)


@given(
    st.lists(st.binary(max_size=8), min_size=3, max_size=3),
    st.lists(st.binary(max_size=8), min_size=3, max_size=3),
)
def test_t1_and_th_change_with_each_input(one: list[bytes], other: list[bytes]) -> None:
    """Report, manifest, challenge and evidence count one by one, and T0 too."""
    for function in (transcript.quote_qualifying_data, transcript.answer_binding):
        t0_one, t0_other = sha512(one[0]), sha512(other[0])
        same = function(t0_one, one[1], one[2]) == function(t0_other, other[1], other[2])
        assert same == (one == other)


@given(st.binary(min_size=64, max_size=64))
def test_the_uses_of_one_t0_never_meet(t0: bytes) -> None:
    """What goes to the SVSM, into a report, into a quote and around an answer differs."""
    values = {
        transcript.svsm_nonce(t0)[:32],
        transcript.direct_report_data(t0)[:32],
        transcript.quote_qualifying_data(t0, b"", b""),
        transcript.answer_binding(t0, b"", b""),
    }
    assert len(values) == 4
