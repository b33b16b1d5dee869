"""No bytes make the report parser stumble."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kagimori_protocol.errors import Malformed
from kagimori_protocol.snp import FIELDS, REPORT_SIZE, VERSIONS, Report, TcbVersion


@given(st.binary(max_size=64) | st.binary(min_size=REPORT_SIZE, max_size=REPORT_SIZE))
def test_any_bytes_are_a_report_or_malformed(raw: bytes) -> None:
    """Only Malformed leaves the parser."""
    with suppress(Malformed):
        assert Report.parse(raw).raw == raw


@given(st.sampled_from(sorted(VERSIONS)), st.data())
def test_whatever_the_fields_hold_every_property_has_a_value(version: int, data: st.DataObject) -> None:
    """Fields may hold anything; reading them never fails, and they give back the bytes."""
    raw = bytearray(REPORT_SIZE)
    for name, (offset, size) in FIELDS.items():
        raw[offset : offset + size] = data.draw(st.binary(min_size=size, max_size=size), label=name)
    raw[0:4] = version.to_bytes(4, "little")
    raw[0x048:0x04C] = bytes([raw[0x048] & 0x1F, 0, 0, 0])
    if version < 3:
        raw[0x188:0x18B] = bytes(3)
    if version < 5:
        raw[0x1F8:0x208] = bytes(16)
    report = Report.parse(bytes(raw))
    assert report.product_line() in {None, "Milan", "Genoa", "Turin"}
    assert report.signing_key
    assert all(report.policy_flags + report.platform_flags)
    for name, (offset, size) in FIELDS.items():
        value = getattr(report, name)
        packed = value if isinstance(value, bytes) else value.to_bytes(size, "little")
        assert packed == raw[offset : offset + size]


@given(st.binary(max_size=10), st.booleans())
def test_a_tcb_version_packs_to_what_it_was_read_from(raw: bytes, turin: bool) -> None:
    """Parse and pack are inverse wherever parse succeeds."""
    try:
        tcb = TcbVersion.parse(raw, turin=turin)
    except Malformed:
        return
    assert tcb.pack() == raw
    assert (tcb.fmc is None) == (not turin)


@given(data=st.data())
def test_a_changed_real_report_is_a_report_or_malformed(vectors: Path, data: st.DataObject) -> None:
    """One changed byte of a real report: either a field says something else, or it is malformed."""
    original = data.draw(st.sampled_from(sorted(vectors.glob("snp/*/report.bin")))).read_bytes()
    raw = bytearray(original)
    raw[data.draw(st.integers(0, REPORT_SIZE - 1))] ^= data.draw(st.integers(1, 255))
    try:
        report = Report.parse(bytes(raw))
    except Malformed:
        return
    assert report != Report.parse(original)
