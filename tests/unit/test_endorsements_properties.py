"""Files of endorsements with anything in them: imported whole, or refused as what an operator can mend."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol import certificate_table
from kagimori_protocol.errors import Malformed, OperatorError, PeerError
from kagimori_simulator.amd import AmdRoot
from kagimori_verifier.endorsements import directory
from kagimori_verifier.endorsements.directory import EndorsementDirectory
from kagimori_verifier.verify import der


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> EndorsementDirectory:
    """Give a directory that fills up as examples are accepted."""
    return EndorsementDirectory(tmp_path_factory.mktemp("kept"))


@pytest.mark.parametrize("kind", ["list", "certificate"])
def test_an_endorsement_with_any_byte_changed_is_one_or_is_refused(root: AmdRoot, kind: str) -> None:
    """The library reads names and dates only when asked: what it cannot read then is refused like the rest."""
    whole = root.crl([1]) if kind == "list" else root.vcek(bytes(range(64)), bytes(8)).certificate_der
    read = 0
    for at in range(len(whole)):
        for changed in {whole[at] ^ 1, 0, 0xFF} - {whole[at]}:
            try:
                name, line = directory._place(whole[:at] + bytes([changed]) + whole[at + 1 :])
            except PeerError:
                continue
            assert name.endswith(".der")
            assert line
            read += 1
    assert read  # a changed signature, say, is not looked at here


@given(
    blocks=st.lists(
        st.builds(
            lambda kind, body, end: b"-----BEGIN " + kind + b"-----\n" + body + end,
            st.sampled_from([b"CERTIFICATE", b"X509 CRL", b""]),
            st.binary(max_size=40) | st.sampled_from([b"MAMCAQA=\n", b"MA==\n", b"MIIB"]),
            st.sampled_from([b"-----END CERTIFICATE-----\n", b"-----END ", b""]),
        ),
        max_size=3,
    ),
    before=st.binary(max_size=20),
)
def test_any_blocks_of_pem_are_endorsements_or_refused(
    kept: EndorsementDirectory, blocks: list[bytes], before: bytes
) -> None:
    """Files from the web have text in front, and ends that do not come."""
    with pytest.raises(OperatorError) as caught:
        kept.add(before + b"".join(blocks))
    assert caught.value.code == "endorsements.none"


@given(st.binary(max_size=60) | st.binary(max_size=20).map(lambda raw: b"\x30" + bytes([len(raw)]) + raw))
def test_a_payload_that_is_read_is_one_der_sequence_and_reads_the_same_again(payload: bytes) -> None:
    """Zeros after it are padding, and nothing else may follow."""
    try:
        read = certificate_table.to_der(payload)
    except Malformed:
        return
    assert read[0] == 0x30
    assert payload == read + bytes(len(payload) - len(read))
    assert certificate_table.to_der(read) == read


def test_a_long_value_is_not_told_whole() -> None:
    """Refusals reach logs, consoles and the database: their length is ours to choose."""
    for read, tag in ((der.small_integer, b"\x02"), (der.ia5_string, b"\x16")):
        with pytest.raises(Malformed) as caught:
            read(tag + b"\x82\x1f\x3c" + b"\x01" * 7996)
        assert len(str(caught.value)) < 300
        assert "8000 bytes" in str(caught.value)
