"""The host writes the LUKS2 header: each forgery is refused by name, and no bytes whatever cause another error."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagimori_agent.luks_allowed import check
from kagimori_agent.luks_header import BINARY_SIZE, SIZES, LuksHeader, parse, probe, read
from kagimori_protocol.errors import DiskError

UUID = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
SIZE = 0x4000
Json = dict[str, Any]

HONEST: Json = {
    "keyslots": {
        "0": {
            "type": "luks2",
            "key_size": 64,
            "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
            "area": {
                "type": "raw",
                "offset": "32768",
                "size": "258048",
                "encryption": "aes-xts-plain64",
                "key_size": 64,
            },
            "kdf": {"type": "argon2id", "time": 4, "memory": 1048576, "cpus": 4, "salt": "c2FsdA=="},
        }
    },
    "tokens": {},
    "segments": {
        "0": {
            "type": "crypt",
            "offset": "16777216",
            "size": "dynamic",
            "iv_tweak": "0",
            "encryption": "aes-xts-plain64",
            "sector_size": 512,
        }
    },
    "digests": {
        "0": {
            "type": "pbkdf2",
            "keyslots": ["0"],
            "segments": ["0"],
            "hash": "sha256",
            "iterations": 1000,
            "salt": "c2FsdA==",
            "digest": "ZGlnZXN0",
        }
    },
    "config": {"json_size": "12288", "keyslots_size": "16744448"},
}


def _sum(copy: bytearray) -> bytes:
    """Put the right checksum into one copy of a header."""
    copy[448:512] = bytes(64)
    copy[448:480] = hashlib.sha256(copy).digest()
    return bytes(copy)


def _copy(
    text: bytes, *, secondary: bool, size: int = SIZE, seqid: int = 3, uuid: bytes = UUID.encode()
) -> bytes:
    """Make one copy of a header from nothing, as figure 2 of the specification draws it."""
    copy = bytearray(size)
    copy[0:6] = b"SKUL\xba\xbe" if secondary else b"LUKS\xba\xbe"
    copy[6:8] = (2).to_bytes(2)
    copy[8:16] = size.to_bytes(8)
    copy[16:24] = seqid.to_bytes(8)
    copy[72:78] = b"sha256"
    copy[104:168] = bytes([secondary + 1]) * 64  # each copy has its own salt
    copy[168 : 168 + len(uuid)] = uuid
    copy[256:264] = (size if secondary else 0).to_bytes(8)
    copy[BINARY_SIZE : BINARY_SIZE + len(text)] = text
    return _sum(copy)


def _raw(text: bytes) -> bytes:
    return _copy(text, secondary=False) + _copy(text, secondary=True)


def _header(document: Json) -> LuksHeader:
    return check(parse(_raw(json.dumps(document).encode())))


def _edited(edit: Callable[[Json], object]) -> Json:
    document: Json = json.loads(json.dumps(HONEST))
    edit(document)
    return document


def test_what_cryptsetup_makes_by_default_is_accepted(tmp_path: Path) -> None:
    """A guard that refused honest volumes would be switched off. Defaults, but for a KDF that takes no second."""
    device = tmp_path / "disk"
    cheap = ["--pbkdf-force-iterations", "1000"]
    for options in (
        ["--pbkdf", "pbkdf2", *cheap],
        ["--pbkdf", "pbkdf2", *cheap, "--sector-size", "512", "--label", "root disk"],
        ["--pbkdf-force-iterations", "4", "--pbkdf-memory", "32"],  # argon2id
    ):
        device.write_bytes(b"")
        os.truncate(device, 32 << 20)
        subprocess.run(
            ["cryptsetup", "luksFormat", "-q", "--uuid", UUID, *options, "--key-file", "-", str(device)],
            input=bytes(32),
            check=True,
        )
        header = check(parse(read(device)))
        assert (header.uuid, header.size) == (UUID, SIZE)
        assert probe(device.read_bytes()[:BINARY_SIZE]) == UUID


def test_the_honest_header_of_these_tests_is_accepted() -> None:
    """Otherwise every refusal below would mean nothing."""
    header = _header(HONEST)
    assert header.json == HONEST
    assert header.seqid == 3


def test_every_legal_size_is_read_to_its_end(tmp_path: Path) -> None:
    """Both copies are read and nothing after them."""
    for size in SIZES:
        document = _edited(_config(json_size=str(size - BINARY_SIZE)))
        document["segments"]["0"]["offset"] = str(32 << 20)
        text = json.dumps(document).encode()
        copies = _copy(text, secondary=False, size=size) + _copy(text, secondary=True, size=size)
        device = tmp_path / "disk"
        device.write_bytes(copies + b"data")
        assert read(device) == copies
        assert check(parse(copies)).size == size


def _keyslot(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["keyslots"]["0"].update(changes)


def _part(part: str, **changes: object) -> Callable[[Json], object]:
    return lambda one: one["keyslots"]["0"][part].update(changes)


def _segment(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["segments"]["0"].update(changes)


def _digest(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["digests"]["0"].update(changes)


def _config(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["config"].update(changes)


FORGERIES: dict[str, tuple[str, Callable[[Json], object]]] = {
    "a null cipher for the data lays the volume open": (
        "luks.cipher",
        _segment(encryption="cipher_null-ecb"),
    ),
    "a null cipher in capitals": ("luks.cipher", _segment(encryption="CIPHER_NULL-ecb")),
    "a null cipher in the kernel's own spelling": (
        "luks.cipher",
        _segment(encryption="capi:ecb(cipher_null)-plain"),
    ),
    "a null cipher of the keyslot opens with any key": (
        "luks.cipher",
        _part("area", encryption="cipher_null-ecb"),
    ),
    "a weaker mode for the data": ("luks.cipher", _segment(encryption="aes-ecb")),
    "a cipher that is a list": ("luks.cipher", _segment(encryption=["aes-xts-plain64"])),
    "a cipher that is missing": ("luks.members", lambda one: one["segments"]["0"].pop("encryption")),
    "a linear segment is plain data": ("luks.value", _segment(type="linear")),
    "a linear segment beside the encrypted one": (
        "luks.segments",
        lambda one: one["segments"].update({"1": {"type": "linear", "offset": "0", "size": "dynamic"}}),
    ),
    "two encrypted segments": (
        "luks.segments",
        lambda one: one["segments"].update({"1": one["segments"]["0"]}),
    ),
    "no segment": ("luks.segments", lambda one: one["segments"].clear()),
    "a segment of another number": (
        "luks.segments",
        lambda one: one["segments"].update({"7": one["segments"].pop("0")}),
    ),
    "a segment that is a backup of re-encryption": ("luks.segment-flags", _segment(flags=["backup-final"])),
    "integrity with a journal of the host's making": (
        "luks.segment-integrity",
        _segment(integrity={"type": "none", "journal_encryption": "none", "journal_integrity": "none"}),
    ),
    "a segment that starts within the header": ("luks.value", _segment(offset="16384")),
    "a segment that starts at a negative place": ("luks.value", _segment(offset="-512")),
    "an offset that is a number": ("luks.value", _segment(offset=16777216)),
    "an offset with a leading zero": ("luks.value", _segment(offset="016777216")),
    "an offset of many digits": ("luks.value", _segment(offset="9" * 30)),
    "a segment cut short": ("luks.value", _segment(size="4096")),
    "other initial vectors": ("luks.value", _segment(iv_tweak="8")),
    "an odd sector size": ("luks.value", _segment(sector_size=1024)),
    "a sector size that is true": ("luks.value", _segment(sector_size=True)),
    "a key of a hardware-encrypting disk": ("luks.value", _segment(type="hw-opal-crypt")),
    "an unknown member of the segment": ("luks.members", _segment(opal_key_size=32)),
    "a keyslot of re-encryption": (
        "luks.value",
        _keyslot(type="reencrypt", mode="reencrypt", direction="forward"),
    ),
    "a volume key of half the size": ("luks.value", _keyslot(key_size=32)),
    "a volume key of no size": ("luks.value", _keyslot(key_size=0)),
    "a keyslot key of one byte": ("luks.value", _part("area", key_size=1)),
    "an unknown member of the keyslot": ("luks.members", _keyslot(flags=["x"])),
    "a priority that cryptsetup does not know": ("luks.value", _keyslot(priority=3)),
    "a priority that is true": ("luks.value", _keyslot(priority=True)),
    "an area at a place that is a number": ("luks.value", _part("area", offset=32768)),
    "an area of a size that is a number": ("luks.value", _part("area", size=258048)),
    "an area of another type": ("luks.value", _part("area", type="none")),
    "another diffusion": ("luks.value", _part("af", hash="crc32")),
    "a splitter that nobody knows": ("luks.value", _part("af", type="none")),
    "fewer stripes": ("luks.value", _part("af", stripes=1)),
    "an unknown KDF": ("luks.value", _part("kdf", type="none")),
    "a KDF of a broken hash": (
        "luks.value",
        _keyslot(kdf={"type": "pbkdf2", "salt": "c2FsdA==", "hash": "md5", "iterations": 1000}),
    ),
    "a KDF without its salt": ("luks.members", lambda one: one["keyslots"]["0"]["kdf"].pop("salt")),
    "a KDF that is null": ("luks.json", _keyslot(kdf=None)),
    "no keyslots": ("luks.keyslots", lambda one: one["keyslots"].clear()),
    "a keyslot that no digest checks": (
        "luks.digests",
        lambda one: one["keyslots"].update({"1": one["keyslots"]["0"]}),
    ),
    "a second digest for a key of the host's": (
        "luks.digests",
        lambda one: one["digests"].update({"1": one["digests"]["0"]}),
    ),
    "a digest of no segment": ("luks.value", _digest(segments=[])),
    "a digest of keyslots that are numbers": ("luks.digests", _digest(keyslots=[0])),
    "a digest of keyslots that are numbers and texts": ("luks.digests", _digest(keyslots=[0, "0"])),
    "a digest of keyslots in a text": ("luks.digests", _digest(keyslots="0")),
    "a digest of keyslots in an object": ("luks.digests", _digest(keyslots={"0": 1})),
    "a digest of another type": ("luks.value", _digest(type="none")),
    "a digest by a broken hash": ("luks.value", _digest(hash="md5")),
    "no digest": ("luks.digests", lambda one: one["digests"].clear()),
    "a token that gives cryptsetup another key": (
        "luks.tokens",
        lambda one: one["tokens"].update(
            {"0": {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "planted"}}
        ),
    ),
    "tokens that are null": ("luks.tokens", lambda one: one.update(tokens=None)),
    "flags that let discards through": ("luks.flags", _config(flags=["allow-discards"])),
    "a re-encryption under way": (
        "luks.requirements",
        _config(requirements={"mandatory": ["online-reencrypt-v2"]}),
    ),
    "a requirement that nobody knows": ("luks.requirements", _config(requirements=["x"])),
    "another size of the JSON area": ("luks.value", _config(json_size="4096")),
    "a size of the keyslots' area that is a number": ("luks.value", _config(keyslots_size=16744448)),
    "an unknown member at the top": ("luks.members", lambda one: one.update(extension={})),
    "no config": ("luks.members", lambda one: one.pop("config")),
}


@pytest.mark.parametrize(("code", "edit"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_header_with_right_checksums_is_refused_for(code: str, edit: Callable[[Json], object]) -> None:
    """Checksums are no signature: the host makes them right for whatever it writes."""
    with pytest.raises(DiskError) as caught:
        _header(_edited(edit))
    error = caught.value
    assert error.code == code
    assert error.expected
    assert error.found
    assert error.todo


def _flip(raw: bytes, at: int, value: bytes, *, resum: bool = True) -> bytes:
    """Overwrite bytes in the copy where they are; make its checksum right again unless told otherwise."""
    copies = [bytearray(raw[:SIZE]), bytearray(raw[SIZE:])]
    copy = copies[at // SIZE]
    copy[at % SIZE : at % SIZE + len(value)] = value
    return b"".join(_sum(one) if resum and one is copy else bytes(one) for one in copies)


TEXT = json.dumps(HONEST).encode()
RAW = _raw(TEXT)
OTHER = json.dumps(_edited(_segment(encryption="cipher_null-ecb"))).encode()

BROKEN: dict[str, tuple[str, bytes]] = {
    "nothing": ("luks.magic", b""),
    "one sector": ("luks.magic", RAW[:512]),
    "zeros": ("luks.magic", bytes(2 * SIZE)),
    "only one copy": ("luks.size", RAW[:SIZE]),
    "a byte too many": ("luks.size", RAW + b"\0"),
    "the secondary in the primary's place": ("luks.magic", RAW[SIZE:] + RAW[:SIZE]),
    "the primary twice": ("luks.copies", RAW[:SIZE] * 2),
    "LUKS1": ("luks.version", _flip(RAW, 6, b"\0\1")),
    "LUKS3": ("luks.version", _flip(RAW, 6, b"\0\3")),
    "a secondary of LUKS1": ("luks.copies", _flip(RAW, SIZE + 6, b"\0\1")),
    "a size that is none": ("luks.size", _flip(RAW, 8, (0x5000).to_bytes(8))),
    "a size of zero": ("luks.size", _flip(RAW, 8, bytes(8))),
    "a size of all there is": ("luks.size", _flip(RAW, 8, b"\xff" * 8)),
    "a secondary of another size": ("luks.copies", _flip(RAW, SIZE + 8, (0x8000).to_bytes(8))),
    "a secondary that lies elsewhere": ("luks.copies", _flip(RAW, SIZE + 256, bytes(8))),
    "a wrong checksum": ("luks.checksum", _flip(RAW, 24, b"label", resum=False)),
    "a wrong checksum of the secondary": ("luks.checksum", _flip(RAW, SIZE + 24, b"label", resum=False)),
    "a checksum by sha1": ("luks.checksum", _flip(RAW, 72, b"sha1\0\0")),
    "bytes in the padding": ("luks.padding", _flip(RAW, 300, b"x")),
    "bytes in the larger padding": ("luks.padding", _flip(RAW, 4095, b"x")),
    "a newer secondary, which cryptsetup would prefer": (
        "luks.copies",
        RAW[:SIZE] + _copy(TEXT, secondary=True, seqid=4),
    ),
    "a secondary that says something else": ("luks.copies", RAW[:SIZE] + _copy(OTHER, secondary=True)),
    "copies with different UUIDs": ("luks.copies", RAW[:SIZE] + _copy(TEXT, secondary=True, uuid=b"x")),
    "a label without end": ("luks.text", _flip(_flip(RAW, 24, b"x" * 48), SIZE + 24, b"x" * 48)),
    "a label with control characters": (
        "luks.text",
        _flip(_flip(RAW, 24, b"\x1b[2J"), SIZE + 24, b"\x1b[2J"),
    ),
    "a label beyond ASCII": ("luks.text", _flip(_flip(RAW, 24, b"\xe9"), SIZE + 24, b"\xe9")),
    "bytes after a label": ("luks.text", _flip(_flip(RAW, 24, b"a\0b"), SIZE + 24, b"a\0b")),
    "a UUID in capitals": (
        "luks.uuid",
        _flip(_flip(RAW, 168, UUID.upper().encode()), SIZE + 168, UUID.upper().encode()),
    ),
    "JSON without end": ("luks.json", _raw(b"[" * (SIZE - BINARY_SIZE))),
    "JSON that fills its area": ("luks.json", _raw(TEXT.ljust(SIZE - BINARY_SIZE))),
    "no JSON": ("luks.json", _raw(b"")),
    "bytes after the JSON": ("luks.json", _raw(TEXT + b"\0x")),
    "JSON after the JSON": ("luks.json", _raw(TEXT + b"{}")),
    "JSON that is a list": ("luks.json", _raw(b"[]")),
    "deeply nested JSON": ("luks.json", _raw(b"[" * 12000)),
    "names that are there twice": (
        "luks.json",
        _raw(TEXT.replace(b'"tokens": {}', b'"tokens": {}, "tokens": {}')),
    ),
    "a name that C reads as another": ("luks.json", _raw(TEXT.replace(b'"tokens"', b'"tokens\\u0000"'))),
    "a value that C cuts": ("luks.json", _raw(TEXT.replace(b'"dynamic"', b'"dynamic\\u0000"'))),
    "half a surrogate": ("luks.json", _raw(TEXT.replace(b'"dynamic"', b'"\\ud800"'))),
    "letters beyond ASCII": ("luks.json", _raw(TEXT.replace(b'"dynamic"', '"dynamíc"'.encode()))),
    "not a number": ("luks.json", _raw(TEXT.replace(b"4000", b"NaN"))),
    "a fraction": ("luks.json", _raw(TEXT.replace(b"4000", b"4000.0"))),
    "a negative number": ("luks.json", _raw(TEXT.replace(b"4000", b"-4000"))),
    "minus zero": ("luks.json", _raw(TEXT.replace(b"4000", b"-0"))),
    "a number that C clamps": ("luks.json", _raw(TEXT.replace(b"4000", b"9223372036854775808"))),
    "a number of five thousand digits": ("luks.json", _raw(TEXT.replace(b"4000", b"9" * 5000))),
    "letters beyond ASCII in escapes": (
        "luks.json",
        _raw(TEXT.replace(b'"dynamic"', b'"dynam\\u00edc"')),
    ),
    "a comment": ("luks.json", _raw(TEXT.replace(b'"tokens"', b'/**/"tokens"'))),
}


@pytest.mark.parametrize(("code", "raw"), BROKEN.values(), ids=BROKEN.keys())
def test_a_header_is_not_even_parsed_with(code: str, raw: bytes) -> None:
    """What has two readings has none here: cryptsetup's parser must not see what ours has not."""
    with pytest.raises(DiskError) as caught:
        check(parse(raw))
    assert caught.value.code == code


def test_a_device_that_ends_within_its_header_is_refused(tmp_path: Path) -> None:
    """Nothing is filled up: a short read is an error."""
    device = tmp_path / "disk"
    for length, code in (
        (0, "luks.size"),
        (4095, "luks.size"),
        (SIZE + 1, "luks.size"),
        (2 * SIZE - 1, "luks.size"),
    ):
        device.write_bytes(RAW[:length])
        with pytest.raises(DiskError) as caught:
            read(device)
        assert caught.value.code == code
    with pytest.raises(DiskError) as caught:
        read(tmp_path / "absent")
    assert caught.value.code == "luks.read"


@pytest.mark.parametrize("size", [0, 0x5000, SIZES[-1] * 2, 1 << 63])
def test_no_more_is_read_than_a_header_may_hold(tmp_path: Path, size: int) -> None:
    """The size is the host's word too: it must not fill the memory of an initramfs."""
    device = tmp_path / "disk"
    device.write_bytes(_flip(RAW, 8, size.to_bytes(8)))
    os.truncate(device, 64 << 20)  # sparse: there is always enough to read
    with pytest.raises(DiskError) as caught:
        read(device)
    assert caught.value.code == "luks.size"


def test_only_a_luks2_header_is_a_candidate() -> None:
    """LUKS1 keeps its UUID at the same place, and so may any bytes."""
    assert probe(RAW[:BINARY_SIZE]) == UUID
    assert probe(_flip(RAW, 6, b"\0\1")[:BINARY_SIZE]) is None
    assert probe(_flip(RAW, 0, b"\0")[:BINARY_SIZE]) is None
    assert probe(RAW[: BINARY_SIZE - 1]) is None
    assert probe(RAW[SIZE : SIZE + BINARY_SIZE]) is None


def test_what_a_header_says_reaches_a_message_short_and_without_control_characters() -> None:
    """A boot console is no place for escape sequences of the host's."""
    with pytest.raises(DiskError) as caught:
        _header(_edited(_segment(encryption="~" * 4000)))
    assert len(str(caught.value)) < 1000
    with pytest.raises(DiskError) as caught:
        parse(_flip(_flip(RAW, 24, b"\x1b[2J"), SIZE + 24, b"\x1b[2J"))
    assert str(caught.value).replace("\n", "").isprintable()


def _refused_or_read(raw: bytes) -> None:
    with contextlib.suppress(DiskError):
        check(parse(raw))


@given(st.binary(max_size=200), st.integers(0, 2 * SIZE - 1))
def test_bytes_changed_anywhere_with_right_checksums_cause_no_other_error(value: bytes, at: int) -> None:
    """Every field of both copies is the host's to write."""
    _refused_or_read(_flip(RAW, at, value[: SIZE - at % SIZE]))


@given(st.binary(max_size=300))
def test_any_json_area_causes_no_other_error(text: bytes) -> None:
    """Not Unicode's, not JSON's, not recursion's."""
    _refused_or_read(_raw(text))


@given(st.binary(max_size=2 * SIZE))
def test_any_bytes_cause_no_other_error(raw: bytes) -> None:
    """The first look at a disk is at whatever the host put there."""
    _refused_or_read(raw)
    probe(raw)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=5)
    | st.sampled_from(["0", "crypt", "luks2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "1", "type"]), inner),
    max_leaves=6,
)


def _places(value: object) -> list[tuple[Any, Any]]:
    """List every place in a document: what holds it, and under which name."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        for name, inner in value.items():
            found += [(value, name), *_places(inner)]
    return found


@given(st.data())
def test_any_value_in_any_place_of_the_json_is_refused_or_harmless(data: st.DataObject) -> None:
    """A value of another type must not become a TypeError in the guard that looks at it."""
    document: Json = json.loads(json.dumps(HONEST))
    holder, name = data.draw(st.sampled_from(_places(document)))
    holder[name] = data.draw(_VALUES)
    try:
        _header(document)
    except DiskError:
        return
    assert document["segments"] == HONEST["segments"] | {"0": document["segments"]["0"]}
    assert document["segments"]["0"]["encryption"] == "aes-xts-plain64"
    assert document["keyslots"]["0"]["area"]["encryption"] == "aes-xts-plain64"
