"""The host writes the LUKS2 header: no bytes whatever cause another error than a refusal, and what passes is honest."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.conformance.making.header import Json
from tests.unit.luks import with_integrity
from tests.unit.luks.headers import (
    DEVICE_SIZE,
    HONEST,
    KEY,
    RAW,
    SEALED_RAW,
    SIZE,
    TEXT,
    UUID,
    flip,
    header,
    judged,
    one_copy,
    reader,
    summed,
)

from kagimori_protocol import luks2_guard
from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_layout import probe


def _refused_or_read(raw: bytes) -> None:
    for copy, offset in ((raw[:SIZE], 0), (raw[SIZE:], SIZE)):
        with contextlib.suppress(DiskError):
            judged(copy, offset)
    with contextlib.suppress(DiskError):
        luks2_guard.choose(reader(raw), DEVICE_SIZE, UUID, KEY, 1)


WHAT_OPENS = luks2_guard.choose(reader(SEALED_RAW), DEVICE_SIZE, UUID, KEY, 1).memory


@given(st.integers(0, 2 * SIZE - 1), st.integers(1, 255), st.booleans())
def test_a_byte_changed_in_either_copy_never_changes_what_cryptsetup_gets(
    at: int, difference: int, resum: bool
) -> None:
    """One copy is whole, so it opens; and what it opens by is what the owner sealed, to the byte."""
    changed = flip(SEALED_RAW, at, bytes([SEALED_RAW[at] ^ difference]), resum=resum)
    guarded = luks2_guard.choose(reader(changed), DEVICE_SIZE, UUID, KEY, 1)
    assert guarded.memory == WHAT_OPENS
    assert guarded.area == (32768, 258048)


@given(st.integers(0, SIZE - 1), st.integers(1, 255))
def test_a_byte_changed_in_both_copies_is_refused_or_changes_nothing(at: int, difference: int) -> None:
    """With right checksums, as a host makes them: label, count and salt are free, all that opens is not."""
    other = bytes([SEALED_RAW[at] ^ difference])
    changed = flip(flip(SEALED_RAW, at, other), SIZE + at, bytes([SEALED_RAW[SIZE + at] ^ difference]))
    try:
        guarded = luks2_guard.choose(reader(changed), DEVICE_SIZE, UUID, KEY, 1)
    except DiskError:
        return
    assert guarded.memory == WHAT_OPENS


@given(st.binary(max_size=200), st.integers(0, 2 * SIZE - 1))
def test_bytes_changed_anywhere_with_right_checksums_cause_no_other_error(value: bytes, at: int) -> None:
    """Every field of both copies is the host's to write."""
    _refused_or_read(flip(RAW, at, value[: SIZE - at % SIZE]))


@given(st.binary(max_size=300))
def test_any_json_area_causes_no_other_error(text: bytes) -> None:
    """Not Unicode's, not JSON's, not recursion's."""
    _refused_or_read(header(text))


@given(st.binary(max_size=2 * SIZE))
def test_any_bytes_cause_no_other_error(raw: bytes) -> None:
    """The first look at a disk is at whatever the host put there."""
    _refused_or_read(raw)
    probe(reader(raw))


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
    honest = data.draw(st.sampled_from([HONEST, with_integrity.document()]))
    document: Json = json.loads(json.dumps(honest))
    holder, name = data.draw(st.sampled_from(_places(document)))
    holder[name] = data.draw(_VALUES)
    try:
        judged(header(json.dumps(document).encode())[:SIZE])
    except DiskError:
        return
    assert document["segments"] == honest["segments"] | {"0": document["segments"]["0"]}
    assert document["segments"]["0"]["encryption"] == "aes-xts-plain64"
    assert document["segments"]["0"].get("integrity") == honest["segments"]["0"].get("integrity")
    assert document["keyslots"]["0"]["area"]["encryption"] == "aes-xts-plain64"


@given(st.data())
def test_an_honest_header_reads_back_as_it_was_written(data: st.DataObject) -> None:
    """Label, subsystem, count and JSON: what two copies say alike is what is read."""
    printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=47)
    label, subsystem = data.draw(printable), data.draw(printable)
    seqid = data.draw(st.integers(0, (1 << 64) - 1))
    for secondary in (False, True):
        copy = one_copy(TEXT, secondary=secondary, seqid=seqid)
        copy[24 : 24 + len(label)] = label.encode()
        copy[208 : 208 + len(subsystem)] = subsystem.encode()
        read = judged(summed(copy), SIZE if secondary else 0)
        assert (read.label, read.subsystem, read.seqid, read.json) == (label, subsystem, seqid, HONEST)
        assert read.which == ("secondary" if secondary else "primary")


@given(st.text(max_size=60) | st.text("\x00\x1b\u202e\ud800", max_size=20))
def test_a_text_of_the_hosts_is_told_short_and_plain(text: str) -> None:
    """In whatever member it stands, a console shows no control character of it."""
    document = json.loads(TEXT)
    document["segments"]["0"]["encryption"] = text
    document["keyslots"][text] = document["keyslots"]["0"]
    try:
        judged(header(json.dumps(document).encode())[:SIZE])
    except DiskError as error:
        told = str(error)
    else:
        raise AssertionError("a header with two keyslots of which one is in no digest is used")
    assert told.replace("\n", "").isprintable()
    assert len(told) < 1200
