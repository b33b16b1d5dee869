"""A LUKS2 header that has two readings, or none, is not even parsed; and no more of a disk is read than a header may hold."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tests.unit.luks.headers import (
    RAW,
    SIZE,
    TEXT,
    UUID,
    config,
    edited,
    flip,
    header,
    one_copy,
    segment,
    summed,
)

from kagimori_agent.luks_allowed import check
from kagimori_agent.luks_header import BINARY_SIZE, MAX_JSON, SIZES, parse, probe, read
from kagimori_protocol.errors import DiskError

OTHER = json.dumps(edited(segment(encryption="cipher_null-ecb"))).encode()

BROKEN: dict[str, tuple[str, bytes]] = {
    "nothing": ("luks.magic", b""),
    "one sector": ("luks.magic", RAW[:512]),
    "zeros": ("luks.magic", bytes(2 * SIZE)),
    "only one copy": ("luks.size", RAW[:SIZE]),
    "a byte too many": ("luks.size", RAW + b"\0"),
    "the secondary in the primary's place": ("luks.magic", RAW[SIZE:] + RAW[:SIZE]),
    "the primary twice": ("luks.copies", RAW[:SIZE] * 2),
    "LUKS1": ("luks.version", flip(RAW, 6, b"\0\1")),
    "LUKS3": ("luks.version", flip(RAW, 6, b"\0\3")),
    "a secondary of LUKS1": ("luks.copies", flip(RAW, SIZE + 6, b"\0\1")),
    "a size that is none": ("luks.size", flip(RAW, 8, (0x5000).to_bytes(8))),
    "a size of zero": ("luks.size", flip(RAW, 8, bytes(8))),
    "a size of all there is": ("luks.size", flip(RAW, 8, b"\xff" * 8)),
    "a secondary of another size": ("luks.copies", flip(RAW, SIZE + 8, (0x8000).to_bytes(8))),
    "a secondary that lies elsewhere": ("luks.copies", flip(RAW, SIZE + 256, bytes(8))),
    "a wrong checksum": ("luks.checksum", flip(RAW, 24, b"label", resum=False)),
    "a wrong checksum of the secondary": ("luks.checksum", flip(RAW, SIZE + 24, b"label", resum=False)),
    "a checksum by sha1": ("luks.checksum", flip(RAW, 72, b"sha1\0\0")),
    "bytes in the padding": ("luks.padding", flip(RAW, 300, b"x")),
    "bytes in the larger padding": ("luks.padding", flip(RAW, 4095, b"x")),
    "a newer secondary, which cryptsetup would prefer": (
        "luks.copies",
        RAW[:SIZE] + summed(one_copy(TEXT, secondary=True, seqid=4)),
    ),
    "a secondary that says something else": (
        "luks.copies",
        RAW[:SIZE] + summed(one_copy(OTHER, secondary=True)),
    ),
    "copies with different UUIDs": (
        "luks.copies",
        RAW[:SIZE] + summed(one_copy(TEXT, secondary=True, uuid=b"x")),
    ),
    "a label without end": ("luks.text", flip(flip(RAW, 24, b"x" * 48), SIZE + 24, b"x" * 48)),
    "a label with control characters": (
        "luks.text",
        flip(flip(RAW, 24, b"\x1b[2J"), SIZE + 24, b"\x1b[2J"),
    ),
    "a label beyond ASCII": ("luks.text", flip(flip(RAW, 24, b"\xe9"), SIZE + 24, b"\xe9")),
    "bytes after a label": ("luks.text", flip(flip(RAW, 24, b"a\0b"), SIZE + 24, b"a\0b")),
    "a UUID in capitals": (
        "luks.uuid",
        flip(flip(RAW, 168, UUID.upper().encode()), SIZE + 168, UUID.upper().encode()),
    ),
    "JSON without end": ("luks.json", header(b"[" * (SIZE - BINARY_SIZE))),
    "JSON that fills its area": ("luks.json", header(TEXT.ljust(SIZE - BINARY_SIZE))),
    "no JSON": ("luks.json", header(b"")),
    "bytes after the JSON": ("luks.json", header(TEXT + b"\0x")),
    "JSON after the JSON": ("luks.json", header(TEXT + b"{}")),
    "JSON that is a list": ("luks.json", header(b"[]")),
    "deeply nested JSON": ("luks.json", header(b"[" * 12000)),
    "names that are there twice": (
        "luks.json",
        header(TEXT.replace(b'"tokens": {}', b'"tokens": {}, "tokens": {}')),
    ),
    "a name that C reads as another": ("luks.json", header(TEXT.replace(b'"tokens"', b'"tokens\\u0000"'))),
    "a value that C cuts": ("luks.json", header(TEXT.replace(b'"dynamic"', b'"dynamic\\u0000"'))),
    "half a surrogate": ("luks.json", header(TEXT.replace(b'"dynamic"', b'"\\ud800"'))),
    "letters beyond ASCII": ("luks.json", header(TEXT.replace(b'"dynamic"', '"dynamíc"'.encode()))),
    "not a number": ("luks.json", header(TEXT.replace(b"4000", b"NaN"))),
    "a fraction": ("luks.json", header(TEXT.replace(b"4000", b"4000.0"))),
    "a negative number": ("luks.json", header(TEXT.replace(b"4000", b"-4000"))),
    "minus zero": ("luks.json", header(TEXT.replace(b"4000", b"-0"))),
    "a number that C clamps": ("luks.json", header(TEXT.replace(b"4000", b"9223372036854775808"))),
    "a number of five thousand digits": ("luks.json", header(TEXT.replace(b"4000", b"9" * 5000))),
    "letters beyond ASCII in escapes": (
        "luks.json",
        header(TEXT.replace(b'"dynamic"', b'"dynam\\u00edc"')),
    ),
    "a comment": ("luks.json", header(TEXT.replace(b'"tokens"', b'/**/"tokens"'))),
}


@pytest.mark.parametrize(("code", "raw"), BROKEN.values(), ids=BROKEN.keys())
def test_a_header_is_not_even_parsed_with(code: str, raw: bytes) -> None:
    """What has two readings has none here: cryptsetup's parser must not see what ours has not."""
    with pytest.raises(DiskError) as caught:
        check(parse(raw))
    assert caught.value.code == code


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
        found = check(parse(read(device)))
        assert (found.uuid, found.size) == (UUID, SIZE)
        assert probe(device.read_bytes()[:BINARY_SIZE]) == UUID


def test_every_legal_size_is_read_to_its_end(tmp_path: Path) -> None:
    """Both copies are read and nothing after them."""
    for size in SIZES:
        document = edited(config(json_size=str(size - BINARY_SIZE)))
        document["segments"]["0"]["offset"] = str(32 << 20)
        text = json.dumps(document).encode()
        copies = header(text, size)
        device = tmp_path / "disk"
        device.write_bytes(copies + b"data")
        assert read(device) == copies
        assert check(parse(copies)).size == size


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
    device.write_bytes(flip(RAW, 8, size.to_bytes(8)))
    os.truncate(device, 64 << 20)  # sparse: there is always enough to read
    with pytest.raises(DiskError) as caught:
        read(device)
    assert caught.value.code == "luks.size"


def test_only_a_luks2_header_is_a_candidate() -> None:
    """LUKS1 keeps its UUID at the same place, and so may any bytes."""
    assert probe(RAW[:BINARY_SIZE]) == UUID
    assert probe(flip(RAW, 6, b"\0\1")[:BINARY_SIZE]) is None
    assert probe(flip(RAW, 0, b"\0")[:BINARY_SIZE]) is None
    assert probe(RAW[: BINARY_SIZE - 1]) is None
    assert probe(RAW[SIZE : SIZE + BINARY_SIZE]) is None


def test_no_more_json_is_read_than_an_honest_header_can_need() -> None:
    """A full area of 4 MiB would cost a second and 130 MiB, in an initramfs that has neither to give."""
    fits = TEXT[:-1] + b" " * (MAX_JSON - len(TEXT)) + b"}"
    assert parse(header(fits, SIZES[3])).json
    with pytest.raises(DiskError) as caught:
        parse(header(fits + b" ", SIZES[3]))
    assert caught.value.code == "luks.json"
    slots = json.loads(TEXT)["keyslots"]["0"]
    assert 32 * (len(json.dumps(slots)) + 100) < MAX_JSON  # as many keyslots as there can be
