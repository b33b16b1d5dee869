"""The host writes the LUKS2 header: no bytes whatever cause another error than a refusal, and what passes is honest."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.luks.headers import HONEST, RAW, SIZE, TEXT, Json, flip, header, one_copy, summed

from kagimori_agent.luks_allowed import check
from kagimori_agent.luks_header import BINARY_SIZE, parse, probe
from kagimori_protocol.errors import DiskError


def _refused_or_read(raw: bytes) -> None:
    with contextlib.suppress(DiskError):
        check(parse(raw))


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
        check(parse(header(json.dumps(document).encode())))
    except DiskError:
        return
    assert document["segments"] == HONEST["segments"] | {"0": document["segments"]["0"]}
    assert document["segments"]["0"]["encryption"] == "aes-xts-plain64"
    assert document["keyslots"]["0"]["area"]["encryption"] == "aes-xts-plain64"


@given(st.data())
def test_an_honest_header_reads_back_as_it_was_written(data: st.DataObject) -> None:
    """Label, subsystem, count and JSON: what two copies say alike is what is read."""
    printable = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=47)
    label, subsystem = data.draw(printable), data.draw(printable)
    seqid = data.draw(st.integers(0, (1 << 64) - 1))
    copies = []
    for secondary in (False, True):
        copy = one_copy(TEXT, secondary=secondary, seqid=seqid)
        copy[24 : 24 + len(label)] = label.encode()
        copy[208 : 208 + len(subsystem)] = subsystem.encode()
        copies.append(summed(copy))
    read = check(parse(b"".join(copies)))
    assert (read.label, read.subsystem, read.seqid, read.json) == (label, subsystem, seqid, HONEST)
    assert probe(copies[0][:BINARY_SIZE]) == read.uuid


@given(st.text(max_size=60) | st.text("\x00\x1b\u202e\ud800", max_size=20))
def test_a_text_of_the_hosts_is_told_short_and_plain(text: str) -> None:
    """In whatever member it stands, a console shows no control character of it."""
    document = json.loads(TEXT)
    document["segments"]["0"]["encryption"] = text
    document["keyslots"][text] = document["keyslots"]["0"]
    try:
        check(parse(header(json.dumps(document).encode())))
    except DiskError as error:
        told = str(error)
    else:
        raise AssertionError("a header with two keyslots of which one is in no digest is used")
    assert told.replace("\n", "").isprintable()
    assert len(told) < 1200
