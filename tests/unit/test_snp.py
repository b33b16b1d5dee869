"""The bytes of an attestation report mean what AMD's table says, and nothing else is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kagimori_protocol.errors import Malformed
from kagimori_protocol.snp import (
    FIELDS,
    PLATFORM_INFO_BITS,
    POLICY_BITS,
    REPORT_SIZE,
    SIGNED_SIZE,
    VERSIONS,
    Report,
    TcbVersion,
    flag_names,
)


def blank(version: int = 2) -> bytearray:
    """Give a report whose every byte is zero but the version."""
    raw = bytearray(REPORT_SIZE)
    raw[0] = version
    return raw


def put(name: str, value: bytes, version: int = 5) -> Report:
    """Parse a blank report with one field set."""
    raw = blank(version)
    offset, size = FIELDS[name]
    assert len(value) == size
    raw[offset : offset + size] = value
    return Report.parse(bytes(raw))


def covered(version: int) -> set[int]:
    """Give the offsets that a field of this version covers."""
    absent: set[str] = set()
    if version < 3:
        absent |= {"cpuid_fam_id", "cpuid_mod_id", "cpuid_step"}
    if version < 5:
        absent |= {"launch_mit_vector", "current_mit_vector"}
    return {
        at
        for name, (offset, size) in FIELDS.items()
        for at in range(offset, offset + size)
        if name not in absent
    }


def test_fields_lie_in_order_inside_the_report_and_do_not_overlap() -> None:
    """The table is a layout: ascending, disjoint, inside; the signature lies behind what it covers."""
    end = 0
    for name, (offset, size) in FIELDS.items():
        assert offset >= end, name
        end = offset + size
        assert (offset >= SIGNED_SIZE) == (name in {"signature_r", "signature_s"})
    assert end <= REPORT_SIZE


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_is_read_from_where_it_lies(name: str) -> None:
    """Setting the bytes of one field changes this field of the parsed report and no other."""
    size = FIELDS[name].size
    value = {"version": b"\x03\0\0\0", "key_info": b"\x1f\0\0\0"}.get(name, bytes(range(1, size + 1)))
    plain, changed = Report.parse(bytes(blank(5))), put(name, value)
    for other in FIELDS:
        same = getattr(plain, other) == getattr(changed, other)
        assert same == (other != name), other
    found = getattr(changed, name)
    assert found == (value if isinstance(found, bytes) else int.from_bytes(value, "little"))


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_every_byte_that_no_field_covers_must_be_zero(version: int) -> None:
    """One set bit in any reserved byte, also behind the signature, and it is no report; the offset is told."""
    raw = blank(version)
    known = covered(version)
    for offset in range(REPORT_SIZE):
        if offset in known:
            continue
        raw[offset] = 0x10
        with pytest.raises(Malformed) as caught:
            Report.parse(bytes(raw))
        assert caught.value.code == "report.reserved"
        assert caught.value.found == f"0x10 at offset 0x{offset:03x}"
        raw[offset] = 0


@pytest.mark.parametrize("bit", range(5, 32))
def test_every_reserved_bit_of_key_info_must_be_zero(bit: int) -> None:
    """KEY_INFO has five known bits; the error points at the byte with the bit in it."""
    with pytest.raises(Malformed) as caught:
        put("key_info", (1 << bit).to_bytes(4, "little"))
    assert caught.value.found == f"0x{1 << bit % 8:02x} at offset 0x{0x48 + bit // 8:03x}"


@pytest.mark.parametrize("version", [0, 1, 6, 2**32 - 1])
def test_an_unknown_version_is_refused(version: int) -> None:
    """A later version may move fields; nothing is guessed."""
    raw = blank()
    raw[0:4] = version.to_bytes(4, "little")
    with pytest.raises(Malformed) as caught:
        Report.parse(bytes(raw))
    assert (caught.value.code, caught.value.found) == ("report.version", str(version))


@pytest.mark.parametrize("size", [0, 1, 1183, 1185, 4000])
def test_another_size_is_refused(size: int) -> None:
    """Nothing is padded or cut."""
    with pytest.raises(Malformed) as caught:
        Report.parse(bytes(size))
    assert caught.value.code == "report.size"


def test_unknown_bits_of_policy_and_platform_are_kept_and_named() -> None:
    """Whether they are welcome is policy's business; real Turin reports have bits that older texts reserve."""
    everything = b"\xff" * 8
    assert put("policy", everything).policy_flags[-1] == "bit 63"
    assert len(put("policy", everything).policy_flags) == 64 - 16
    assert put("platform_info", everything).platform_flags[8] == "bit 8"
    assert put("platform_info", b"\x40" + bytes(7)).platform_flags == ("IOMMU_WRITE_SAFE",)


def test_the_bits_have_the_names_of_amds_tables() -> None:
    """Bit numbers as in 56860, tables "Guest Policy Structure" and "PLATFORM_INFO"."""
    report = put("policy", (0xB001F | 0x10300).to_bytes(8, "little"))
    assert report.policy_abi == (3, 0x1F)
    assert report.policy_flags == ("SMT", "RESERVED_MUST_BE_ONE", "DEBUG")
    assert sorted(POLICY_BITS) == list(range(16, 26))
    assert sorted(PLATFORM_INFO_BITS) == list(range(8))
    assert flag_names(0, POLICY_BITS) == ()


@pytest.mark.parametrize(
    ("key_info", "signing_key", "author", "masked"),
    [
        (0b00000, "vcek", False, False),
        (0b00001, "vcek", True, False),
        (0b00010, "vcek", False, True),
        (0b00100, "vlek", False, False),
        (0b01000, "reserved 2", False, False),
        (0b11000, "reserved 6", False, False),
        (0b11100, "none", False, False),
    ],
)
def test_key_info_tells_who_signed(key_info: int, signing_key: str, author: bool, masked: bool) -> None:
    """AUTHOR_KEY_EN, MASK_CHIP_KEY and SIGNING_KEY, each by its bits."""
    report = put("key_info", bytes([key_info, 0, 0, 0]))
    assert (report.signing_key, report.author_key_en, report.mask_chip_key) == (signing_key, author, masked)


@pytest.mark.parametrize(
    ("family", "model", "line"),
    [
        (0x19, 0x00, "Milan"),
        (0x19, 0x0F, "Milan"),
        (0x19, 0x10, "Genoa"),
        (0x19, 0x1F, "Genoa"),
        (0x19, 0x20, None),
        (0x19, 0xA0, "Genoa"),
        (0x19, 0xAF, "Genoa"),
        (0x19, 0xB0, None),
        (0x1A, 0x00, "Turin"),
        (0x1A, 0x11, "Turin"),
        (0x1A, 0x12, None),
        (0x1A, 0x50, None),
        (0x00, 0x00, None),
        (0x18, 0x01, None),
    ],
)
def test_family_and_model_tell_the_product_line(family: int, model: int, line: str | None) -> None:
    """At both ends of every range; what has no published root is unknown."""
    raw = blank(3)
    raw[0x188:0x18A] = bytes([family, model])
    assert Report.parse(bytes(raw)).product_line() == line


@pytest.mark.parametrize(
    ("chip_id", "line"),
    [
        (b"\x01" * 64, None),
        (bytes(64), None),
        (b"\x01" * 8 + bytes(56), "Turin"),
        (bytes(63) + b"\x01", None),
    ],
)
def test_version_2_tells_turin_by_its_short_chip_id_and_nothing_else(
    chip_id: bytes, line: str | None
) -> None:
    """Milan and Genoa cannot be told apart there; a masked CHIP_ID tells nothing."""
    assert put("chip_id", chip_id, version=2).product_line() == line


def test_the_parts_of_a_tcb_version_lie_where_amd_put_them() -> None:
    """Two orders: Milan's and Genoa's, and Turin's."""
    milan = TcbVersion.parse(bytes.fromhex("04010000000018db"), turin=False)
    assert milan == TcbVersion(fmc=None, boot_loader=4, tee=1, snp=0x18, microcode=0xDB)
    turin = TcbVersion.parse(bytes.fromhex("0001020300000047"), turin=True)
    assert turin == TcbVersion(fmc=0, boot_loader=1, tee=2, snp=3, microcode=0x47)
    assert "FMC 0" in str(turin)
    assert "FMC" not in str(milan)


@pytest.mark.parametrize("turin", [False, True])
def test_a_reserved_byte_of_a_tcb_version_must_be_zero(turin: bool) -> None:
    """In each order its own bytes are reserved; a version read in the wrong order is not taken for another."""
    reserved = range(4, 7) if turin else range(2, 6)
    for at in range(8):
        raw = bytes(at) + b"\x07" + bytes(7 - at)
        if at in reserved:
            with pytest.raises(Malformed) as caught:
                TcbVersion.parse(raw, turin=turin)
            assert caught.value.code == "report.tcb-layout"
        else:
            assert TcbVersion.parse(raw, turin=turin).pack() == raw


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_tcb_version_has_8_bytes(size: int) -> None:
    """Nothing is padded."""
    with pytest.raises(Malformed):
        TcbVersion.parse(bytes(size), turin=False)


def test_every_real_report_parses(vectors: Path) -> None:
    """Versions 2, 3 and 5 from real Milan, Genoa, Bergamo or Siena, and Turin; the known-bad one is well-formed too."""
    seen = set()
    paths = sorted(vectors.glob("snp*/**/report.bin"))
    paths += [*vectors.glob("azure/*/snp_report.bin"), *vectors.glob("snp-negative/*.bin")]
    assert paths
    for path in paths:
        report = Report.parse(path.read_bytes())
        assert report.signed_bytes == path.read_bytes()[:SIGNED_SIZE]
        line = report.product_line()
        assert line is None or line.lower() in {path.parent.name.split("-")[0], "genoa", "milan"}
        seen.add(report.version)
    assert seen >= {2, 3, 5}
