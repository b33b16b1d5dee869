"""A host's certificate table is read by its entries, whatever the host pads or claims."""

from __future__ import annotations

import base64
import struct
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol import certificate_table
from kagimori_protocol.certificate_table import ARK, ASK, ENTRY_SIZE, MAX_ENTRIES, MAX_TABLE_SIZE, VCEK, VLEK
from kagimori_protocol.errors import Malformed

DER = b"\x30\x03\x02\x01\x05"
LONG_DER = b"\x30\x82\x01\x2c" + bytes(300)
END = bytes(ENTRY_SIZE)


def pem(der: bytes, label: str = "CERTIFICATE") -> bytes:
    """Write a PEM block."""
    return f"-----BEGIN {label}-----\n{base64.encodebytes(der).decode()}-----END {label}-----\n".encode()


def row(guid: uuid.UUID, offset: int, length: int) -> bytes:
    """Write one entry: the GUID in RFC 4122 order, then offset and length."""
    return guid.bytes + struct.pack("<II", offset, length)


def table(*payloads: tuple[uuid.UUID, bytes]) -> bytes:
    """Write a table with its payloads one after another."""
    at = (len(payloads) + 1) * ENTRY_SIZE
    rows = b""
    for guid, payload in payloads:
        rows += row(guid, at, len(payload))
        at += len(payload)
    return rows + END + b"".join(payload for _, payload in payloads)


def refused(raw: bytes) -> Malformed:
    """Give the error with which a table is refused."""
    with pytest.raises(Malformed) as caught:
        certificate_table.parse(raw)
    assert caught.value.code == "certificates.layout"
    return caught.value


def test_a_table_gives_its_entries_in_order() -> None:
    """DER and PEM alike, under AMD's names."""
    entries = certificate_table.parse(table((ARK, DER), (VCEK, pem(LONG_DER))))
    assert [entry.name for entry in entries] == ["ARK", "VCEK"]
    assert [entry.der() for entry in entries] == [DER, LONG_DER]


def test_guids_are_stored_in_rfc_4122_order() -> None:
    """Unlike elsewhere in SNP: the first bytes of a VCEK's entry are those that its GUID starts with in writing."""
    assert table((VCEK, DER)).startswith(bytes.fromhex("63da758de6644564adc5f4b93be8accd"))


def test_unknown_guids_are_kept() -> None:
    """Hosts add what they like, and it is only a candidate."""
    unknown = uuid.UUID("ecae0c0f-9502-43b1-afa2-0ae2e0d565b6")
    (entry,) = certificate_table.parse(table((unknown, DER)))
    assert entry.name == str(unknown)


@pytest.mark.parametrize("padding", [0, 1, 23, 24, 4096])
def test_zeros_behind_a_table_change_nothing(padding: int) -> None:
    """Current SVSMs return 16 KiB whatever the certificates take."""
    plain = table((ASK, DER))
    assert certificate_table.parse(plain + bytes(padding)) == certificate_table.parse(plain)


@pytest.mark.parametrize("raw", [b"", bytes(1), bytes(24), bytes(0x4000)])
def test_no_table_has_no_entries(raw: bytes) -> None:
    """A host without certificates hands out nothing, or zeros."""
    assert certificate_table.parse(raw) == ()


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(row(ARK, 24, 5) + DER, id="no entry of zeros at the end"),
        pytest.param(row(ARK, 48, 5)[:-1], id="a cut entry"),
        pytest.param(row(ARK, 48, 6) + END + DER, id="a payload that ends outside"),
        pytest.param(row(ARK, 2**32 - 1, 2**32 - 1) + END + DER, id="offset and length as large as can be"),
        pytest.param(row(ARK, 47, 5) + END + DER, id="a payload that starts in the entry of zeros"),
        pytest.param(row(ARK, 0, 5) + END + DER, id="a payload that is the table itself"),
        pytest.param(row(ARK, 48, 0) + END + DER, id="an empty payload"),
        pytest.param(row(ARK, 72, 5) + row(ARK, 72, 5) + END + DER, id="one GUID twice"),
        pytest.param(bytes(MAX_TABLE_SIZE) + b"\x01", id="too large"),
        pytest.param(b"\x01" * ENTRY_SIZE * (MAX_ENTRIES + 2), id="entries without an end"),
        pytest.param(b"\x01", id="one byte"),
    ],
)
def test_a_broken_table_is_refused(raw: bytes) -> None:
    """An offset or a length that points elsewhere is an error, never a cut."""
    refused(raw)


def test_entries_may_share_a_payload() -> None:
    """Nothing forbids it, and nothing depends on it."""
    raw = row(VCEK, 72, 5) + row(VLEK, 72, 5) + END + DER
    assert [entry.der() for entry in certificate_table.parse(raw)] == [DER, DER]


def test_as_many_entries_as_allowed_are_read() -> None:
    """And one more is refused."""
    guids = [uuid.UUID(int=number) for number in range(1, MAX_ENTRIES + 2)]
    assert len(certificate_table.parse(table(*((guid, DER) for guid in guids[:-1])))) == MAX_ENTRIES
    assert "at most 64" in str(refused(table(*((guid, DER) for guid in guids))))


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(DER, id="DER"),
        pytest.param(DER + bytes(3), id="DER and zeros"),
        pytest.param(pem(DER), id="PEM"),
        pytest.param(pem(DER) + bytes(3), id="PEM and zeros"),
        pytest.param(pem(DER).replace(b"\n", b"\r\n"), id="PEM with CR LF"),
        pytest.param(b"subject=Somebody\n" + pem(DER), id="PEM with text in front"),
        pytest.param(pem(DER) + pem(LONG_DER), id="two PEM blocks, of which the first counts"),
    ],
)
def test_a_payload_becomes_der(payload: bytes) -> None:
    """However the host wrote it."""
    assert certificate_table.to_der(payload) == DER


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(bytes(64), id="zeros"),
        pytest.param(b"\x31" + DER[1:], id="a SET"),
        pytest.param(DER[:-1], id="a cut SEQUENCE"),
        pytest.param(DER + b"\x01", id="something behind"),
        pytest.param(b"\x30\xff" + bytes(8), id="a length of 127 bytes"),
        pytest.param(b"\x30\x84\xff\xff\xff\xff", id="a length of 4 GiB"),
        pytest.param(b"-----BEGIN CERTIFICATE-----\nMAMCAQU=\n", id="PEM without an end"),
        pytest.param(b"-----BEGIN CERTIFICATE", id="PEM that ends in its first line"),
        pytest.param(pem(DER).replace(b"MAMC", b"MA!C"), id="PEM with a stray character"),
        pytest.param(pem(DER).replace(b"MAMCAQU=", b"MAMCAQU"), id="PEM without padding"),
        pytest.param(
            b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", id="PEM with nothing in it"
        ),
        pytest.param(pem(b"text"), id="PEM around something else"),
        pytest.param(pem(DER + b"\x01"), id="PEM around more than one"),
    ],
)
def test_a_payload_that_is_no_certificate_is_refused(payload: bytes) -> None:
    """By its layout; what is in the SEQUENCE is looked at later."""
    with pytest.raises(Malformed) as caught:
        certificate_table.to_der(payload)
    assert caught.value.code == "certificates.layout"


@given(st.binary(max_size=200))
def test_no_bytes_make_it_stumble(raw: bytes) -> None:
    """Only Malformed leaves the parser, with entries or without."""
    for attempt in (raw, raw + bytes(ENTRY_SIZE), row(VCEK, 48, len(raw)) + END + raw):
        try:
            for entry in certificate_table.parse(attempt):
                entry.der()
        except Malformed:
            pass


@given(
    st.dictionaries(st.uuids().filter(lambda guid: guid.int), st.binary(min_size=1, max_size=40), max_size=8)
)
def test_what_a_host_writes_is_what_is_read(payloads: dict[uuid.UUID, bytes]) -> None:
    """Every payload comes back as stored."""
    entries = certificate_table.parse(table(*payloads.items()))
    assert {entry.guid: entry.payload for entry in entries} == payloads


@given(data=st.data())
def test_a_changed_real_table_is_read_or_refused(vectors: Path, data: st.DataObject) -> None:
    """Some bytes of a real table are changed, or it is cut: Malformed at most."""
    raw = bytearray((vectors / "certtable" / "veraison-genoa-auxblob.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 120) | st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        for entry in certificate_table.parse(bytes(raw[: data.draw(st.integers(0, len(raw)))])):
            entry.der()
    except Malformed:
        pass


def test_the_real_table_has_its_three_certificates(vectors: Path) -> None:
    """PEM in all entries, as the host of a real Genoa machine wrote them."""
    entries = certificate_table.parse((vectors / "certtable" / "veraison-genoa-auxblob.bin").read_bytes())
    assert [entry.name for entry in entries] == ["ARK", "ASK", "VCEK"]
    ders = [entry.der() for entry in entries]
    assert ders[0] == (vectors / "amd-ca" / "genoa" / "ark.der").read_bytes()
    assert ders[1] == (vectors / "amd-ca" / "genoa" / "ask.der").read_bytes()
    assert all(len(der) == 4 + int.from_bytes(der[2:4], "big") for der in ders)
