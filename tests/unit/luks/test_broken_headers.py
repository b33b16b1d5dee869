"""A LUKS2 header that has two readings, or none, is not even parsed; and no more of a disk is read than a header may hold."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tests.unit.luks.headers import (
    DEVICE_SIZE,
    RAW,
    SEALED,
    SIZE,
    TEXT,
    UUID,
    config,
    edited,
    flip,
    header,
    judged,
    reader,
)

from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_allowed import check
from kagimori_protocol.luks2_layout import (
    BINARY_SIZE,
    MAX_JSON,
    SIZES,
    LuksHeader,
    build,
    copies,
    parse,
    probe,
)

COPY = RAW[:SIZE]

BROKEN: dict[str, tuple[str, bytes]] = {
    "nothing": ("luks.magic", b""),
    "one sector": ("luks.magic", RAW[:512]),
    "zeros": ("luks.magic", bytes(SIZE)),
    "less than a copy": ("luks.size", RAW[: SIZE - 1]),
    "a byte too many": ("luks.size", RAW[: SIZE + 1]),
    "the secondary in the primary's place": ("luks.magic", RAW[SIZE:]),
    "LUKS1": ("luks.version", flip(RAW, 6, b"\0\1")),
    "LUKS3": ("luks.version", flip(RAW, 6, b"\0\3")),
    "a size that is none": ("luks.size", flip(RAW, 8, (0x5000).to_bytes(8))),
    "a size of zero": ("luks.size", flip(RAW, 8, bytes(8))),
    "a size of all there is": ("luks.size", flip(RAW, 8, b"\xff" * 8)),
    "a primary that says it is elsewhere": ("luks.copies", flip(RAW, 256, SIZE.to_bytes(8))),
    "a wrong checksum": ("luks.checksum", flip(RAW, 24, b"label", resum=False)),
    "a checksum by sha1": ("luks.checksum", flip(RAW, 72, b"sha1\0\0")),
    "bytes in the padding": ("luks.padding", flip(RAW, 300, b"x")),
    "bytes in the larger padding": ("luks.padding", flip(RAW, 4095, b"x")),
    "a label without end": ("luks.text", flip(RAW, 24, b"x" * 48)),
    "a label with control characters": (
        "luks.text",
        flip(RAW, 24, b"\x1b[2J"),
    ),
    "a label beyond ASCII": ("luks.text", flip(RAW, 24, b"\xe9")),
    "bytes after a label": ("luks.text", flip(RAW, 24, b"a\0b")),
    "a UUID in capitals": (
        "luks.uuid",
        flip(RAW, 168, UUID.upper().encode()),
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
        judged(raw[:SIZE] if len(raw) == 2 * SIZE else raw)
    assert caught.value.code == code


SECONDARY: dict[str, tuple[str, bytes]] = {
    "the primary's": ("luks.copies", COPY),
    "LUKS1": ("luks.version", flip(RAW, SIZE + 6, b"\0\1")),
    "another size": ("luks.size", flip(RAW, SIZE + 8, (0x8000).to_bytes(8))),
    "another place": ("luks.copies", flip(RAW, SIZE + 256, bytes(8))),
    "a wrong checksum": ("luks.checksum", flip(RAW, SIZE + 24, b"label", resum=False)),
}


@pytest.mark.parametrize(("code", "raw"), SECONDARY.values(), ids=SECONDARY.keys())
def test_a_secondary_is_not_taken_for_one_with(code: str, raw: bytes) -> None:
    """It is judged as strictly as the primary, and by itself."""
    with pytest.raises(DiskError) as caught:
        judged(raw[-SIZE:], SIZE)
    assert caught.value.code == code
    assert judged(RAW[SIZE:], SIZE).which == "secondary"


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
        raw = device.read_bytes()
        both = [check(found, len(raw)) for found in copies(reader(raw)) if isinstance(found, LuksHeader)]
        assert [(one.uuid, one.size, one.which) for one in both] == [
            (UUID, SIZE, "primary"),
            (UUID, SIZE, "secondary"),
        ]
        assert probe(reader(raw)) == UUID


def test_every_legal_size_is_read_to_its_end() -> None:
    """Both copies are read and nothing after them; without the primary, the secondary is found at each place."""
    for size in SIZES:
        document = edited(config(json_size=str(size - BINARY_SIZE)))
        document["segments"]["0"]["offset"] = str(32 << 20)
        document["keyslots"]["0"]["area"]["offset"] = str(2 * size)
        raw = header(json.dumps(document).encode(), size)
        asked: list[int] = []

        def read(offset: int, most: int, raw: bytes = raw, asked: list[int] = asked) -> bytes:
            asked.append(offset + most)
            return (raw + b"data")[offset : offset + most]

        found = [one for one in copies(read) if isinstance(one, LuksHeader)]
        assert [check(one, DEVICE_SIZE).size for one in found] == [size, size]
        assert max(asked) == 2 * size
        torn = bytes(BINARY_SIZE) + raw[BINARY_SIZE:]
        assert [one.which for one in copies(reader(torn)) if isinstance(one, LuksHeader)] == ["secondary"]
        assert probe(reader(torn)) == UUID


def test_a_device_that_ends_within_its_header_has_no_whole_copy() -> None:
    """Nothing is filled up: a short read is an error."""
    for length, codes in (
        (0, ["luks.magic"]),
        (4095, ["luks.magic"]),
        (SIZE - 1, ["luks.size"]),
        (SIZE + 1, [None, "luks.copies"]),
        (2 * SIZE - 1, [None, "luks.size"]),
    ):
        found = copies(reader(RAW[:length]))
        assert [one.code if isinstance(one, DiskError) else None for one in found] == codes


@pytest.mark.parametrize("size", [0, 0x5000, SIZES[-1] * 2, 1 << 63])
def test_no_more_is_read_than_a_header_may_hold(size: int) -> None:
    """The size is the host's word too: it must not fill the memory of an initramfs."""
    raw = flip(RAW, 8, size.to_bytes(8))
    asked: list[int] = []

    def read(offset: int, most: int) -> bytes:
        asked.append(most)
        return raw[offset : offset + most].ljust(most, b"x")

    primary, *_ = copies(read)
    assert isinstance(primary, DiskError)
    assert primary.code == "luks.size"
    assert max(asked) <= SIZES[0]


def test_only_a_luks2_header_is_a_candidate() -> None:
    """LUKS1 keeps its UUID at the same place, and so may any bytes."""
    assert probe(reader(RAW)) == UUID
    assert probe(reader(RAW[:BINARY_SIZE])) == UUID
    assert probe(reader(flip(RAW, 6, b"\0\1")[:SIZE])) is None
    assert probe(reader(flip(RAW, 0, b"\0")[:SIZE])) is None
    assert probe(reader(RAW[: BINARY_SIZE - 1])) is None
    assert probe(reader(RAW[SIZE : SIZE + BINARY_SIZE])) is None


def test_no_more_json_is_read_than_an_honest_header_can_need() -> None:
    """A full area of 4 MiB would cost a second and 130 MiB, in an initramfs that has neither to give."""
    fits = TEXT[:-1] + b" " * (MAX_JSON - len(TEXT)) + b"}"
    assert parse(header(fits, SIZES[3])[: SIZES[3]], 0).json
    with pytest.raises(DiskError) as caught:
        parse(header(fits + b" ", SIZES[3])[: SIZES[3]], 0)
    assert caught.value.code == "luks.json"
    slots, tokens = json.loads(TEXT)["keyslots"]["0"], SEALED["tokens"]["0"]
    # As many keyslots as there can be, each with its token.
    assert 32 * (len(json.dumps(slots)) + len(json.dumps(tokens)) + 100) < MAX_JSON


def test_a_header_that_is_put_together_is_taken_apart_as_it_was() -> None:
    """Both copies, with right checksums; JSON that does not fit is refused and not cut."""
    read = parse(RAW[:SIZE], 0)
    built = build(replace(read, label="a label", subsystem="x"), (b"a" * 64, b"b" * 64))
    first, second = copies(reader(built))
    assert first == replace(read, label="a label", subsystem="x")
    assert second == replace(read, label="a label", subsystem="x", offset=SIZE)
    with pytest.raises(DiskError) as caught:
        build(replace(read, json={"x": "x" * SIZE}), (b"", b""))
    assert caught.value.code == "luks.json"
