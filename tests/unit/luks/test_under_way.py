"""A header that says that its volume is being reencrypted: only what `cryptsetup reencrypt` with a new volume key writes."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conformance.making.header import Json
from tests.unit.luks.headers import DEVICE_SIZE, HONEST, SALT, SIZE, header, one_copy, reader, summed

from kagimori_protocol import luks2_settle, luks2_under_way
from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_layout import LuksHeader, copies, parse

START = 16 << 20
HOT = 4 << 20


def _segment(at: int, size: int | None, *flags: str) -> Json:
    whole: Json = HONEST["segments"]["0"] | {"offset": str(START + at), "iv_tweak": str(at // 512)}
    return (
        whole | {"size": "dynamic" if size is None else str(size)} | ({"flags": list(flags)} if flags else {})
    )


def _document(parts: list[Json], old: list[str], new: list[str]) -> Json:
    """Give what cryptsetup writes for segments before the two backups, and those that are of the old key and the new."""
    document: Json = json.loads(json.dumps(HONEST))
    backups = [_segment(0, None, "backup-previous"), _segment(0, None, "backup-final")]
    document["segments"] = {str(number): one for number, one in enumerate([*parts, *backups])}
    previous, final = str(len(parts)), str(len(parts) + 1)
    second = json.loads(json.dumps(document["keyslots"]["0"]))
    second["area"]["offset"] = "290816"
    document["keyslots"] |= {
        "1": second,
        "2": {
            "type": "reencrypt",
            "key_size": 1,
            "mode": "reencrypt",
            "direction": "forward",
            "priority": 0,
            "area": {
                "type": "checksum",
                "offset": "548864",
                "size": "16228352",
                "hash": "sha256",
                "sector_size": 4096,
            },
        },
    }
    one = document["digests"]["0"]
    document["digests"] = {
        "0": one | {"keyslots": ["0"], "segments": [*old, previous]},
        "1": one | {"keyslots": ["1"], "segments": [*new, final]},
        "2": one | {"keyslots": ["2"], "segments": []},
    }
    document["config"]["requirements"] = {"mandatory": ["online-reencrypt-v2"]}
    return document


ROWS = {
    "begun": _document([_segment(0, None)], ["0"], []),
    "the first blocks": _document(
        [_segment(0, HOT, "in-reencryption"), _segment(HOT, None)], ["0", "1"], ["0"]
    ),
    "the first blocks below a mapping": _document(
        [_segment(0, HOT, "in-reencryption"), _segment(HOT, DEVICE_SIZE - START - HOT)], ["0", "1"], ["0"]
    ),
    "between": _document([_segment(0, HOT), _segment(HOT, None)], ["1"], ["0"]),
    "in the middle": _document(
        [_segment(0, HOT), _segment(HOT, HOT, "in-reencryption"), _segment(2 * HOT, None)],
        ["1", "2"],
        ["0", "1"],
    ),
    "the last blocks": _document(
        [_segment(0, HOT), _segment(HOT, HOT, "in-reencryption")], ["1"], ["0", "1"]
    ),
    "all blocks": _document([_segment(0, DEVICE_SIZE - START, "in-reencryption")], ["0"], ["0"]),
    "done": _document([_segment(0, None)], [], ["0"]),
}
MIDDLE = ROWS["in the middle"]


def _read(document: Json) -> LuksHeader:
    return parse(header(json.dumps(document).encode())[:SIZE], 0)


def _edited(edit: Callable[[Json], object]) -> Json:
    document: Json = json.loads(json.dumps(MIDDLE))
    edit(document)
    return document


@pytest.mark.parametrize("name", ROWS)
def test_each_state_that_cryptsetup_writes_is_allowed(name: str) -> None:
    """As read from a disk while cryptsetup 2.6.1 or 2.7.5 was at work; otherwise every refusal below would mean nothing."""
    read = _read(ROWS[name])
    assert luks2_under_way.is_under_way(read)
    assert luks2_under_way.check(read, DEVICE_SIZE) is read


def test_a_journal_is_allowed_too() -> None:
    """Who began by hand may have chosen it; it only costs more writes."""
    area = {"type": "journal", "offset": "548864", "size": "16228352"}
    luks2_under_way.check(_read(_edited(lambda one: one["keyslots"]["2"].update(area=area))), DEVICE_SIZE)


def _at(*path: str, **changes: object) -> Callable[[Json], object]:
    """Change members of an object."""

    def edit(one: Any) -> None:  # noqa: ANN401 - JSON
        for name in path:
            one = one[name]
        one.update(changes)

    return edit


def _without(*path: str) -> Callable[[Json], object]:
    def edit(one: Any) -> None:  # noqa: ANN401 - JSON
        for name in path[:-1]:
            one = one[name]
        del one[path[-1]]

    return edit


def _all_segments(**changes: object) -> Callable[[Json], object]:
    return lambda one: [segment.update(changes) for segment in one["segments"].values()]


def _of(size: int) -> str:
    return base64.b64encode(bytes(size)).decode()


LINEAR = {"type": "linear", "offset": str(START), "size": "dynamic", "flags": ["backup-final"]}
FORGERIES: dict[str, tuple[str, Callable[[Json], object]]] = {
    "it ends in clear": ("luks.cipher", _at("segments", "4", encryption="cipher_null-ecb")),
    "it ends in a cipher of blocks": ("luks.cipher", _at("segments", "4", encryption="aes-ecb")),
    "it began in clear": ("luks.cipher", _at("segments", "3", encryption="cipher_null-ecb")),
    "all of it is in clear": ("luks.cipher", _all_segments(encryption="cipher_null-ecb")),
    "what is below way becomes clear": ("luks.cipher", _at("segments", "1", encryption="cipher_null-ecb")),
    "what is not yet read is clear": ("luks.cipher", _at("segments", "2", encryption="cipher_null-ecb")),
    "it decrypts": ("luks.value", lambda one: one["segments"].update({"4": LINEAR})),
    "it decrypts, it says": ("luks.value", _at("keyslots", "2", mode="decrypt")),
    "it encrypts, it says": ("luks.value", _at("keyslots", "2", mode="encrypt")),
    "it goes backward": ("luks.value", _at("keyslots", "2", direction="backward")),
    "data is moved": ("luks.value", _at("keyslots", "2", "area", type="datashift")),
    "data is moved, with checksums": ("luks.value", _at("keyslots", "2", "area", type="datashift-checksum")),
    "nothing is repaired": ("luks.value", _at("keyslots", "2", "area", type="none")),
    "an area with a shift": ("luks.members", _at("keyslots", "2", "area", shift_size="1048576")),
    "an area without a hash": ("luks.members", _without("keyslots", "2", "area", "hash")),
    "an area of a hash that is none": ("luks.value", _at("keyslots", "2", "area", hash="crc32")),
    "an area over a keyslot": ("luks.area", _at("keyslots", "2", "area", offset="290816")),
    "an area over the data": ("luks.area", _at("keyslots", "2", "area", size=str(32 << 20))),
    "an area without bytes": ("luks.area", _at("keyslots", "2", "area", size="0")),
    "a worker of a key": ("luks.value", _at("keyslots", "2", key_size=64)),
    "a worker with a KDF": ("luks.members", _at("keyslots", "2", kdf={})),
    "no worker": ("luks.keyslots", _without("keyslots", "2")),
    "two workers": ("luks.keyslots", lambda one: one["keyslots"].update({"3": one["keyslots"]["2"]})),
    "a keyslot of a null cipher": (
        "luks.cipher",
        _at("keyslots", "1", "area", encryption="cipher_null-ecb"),
    ),
    "a keyslot without a digest": ("luks.digests", _at("digests", "1", keyslots=[])),
    "a keyslot of both keys": ("luks.digests", _at("digests", "1", keyslots=["0", "1"])),
    "a worker of the new key": ("luks.digests", _at("digests", "1", keyslots=["1", "2"])),
    "a keyslot that is none": ("luks.digests", _at("digests", "1", keyslots=["1", "7"])),
    "no digest of the plan": ("luks.digests", _without("digests", "2")),
    "a digest too many": ("luks.digests", lambda one: one["digests"].update({"3": one["digests"]["2"]})),
    "a digest of no number": (
        "luks.digests",
        lambda one: one["digests"].update({"x": one["digests"].pop("2")}),
    ),
    "the plan's digest has no bytes": ("luks.value", _at("digests", "2", digest="")),
    "the plan's digest is short": ("luks.value", _at("digests", "2", digest=_of(31))),
    "the plan's digest is long": ("luks.value", _at("digests", "2", digest=_of(33))),
    "the plan's digest is no text": ("luks.value", _at("digests", "2", digest=None)),
    "the plan's salt has no bytes": ("luks.value", _at("digests", "2", salt="")),
    "the old key's digest is short": ("luks.value", _at("digests", "0", digest=_of(1))),
    "the new key's digest is short": ("luks.value", _at("digests", "1", digest=_of(19))),
    "the new key's salt is short": ("luks.value", _at("digests", "1", salt=_of(31))),
    "a digest of no iterations": ("luks.value", _at("digests", "2", iterations=0)),
    "the plan's digest holds data": ("luks.digests", _at("digests", "2", segments=["0"])),
    "data of no key": ("luks.segments", _at("digests", "1", segments=["1", "4"])),
    "data of both keys": ("luks.segments", _at("digests", "0", segments=["0", "1", "2", "3"])),
    "new data after old": ("luks.segments", _at("digests", "1", segments=["0", "1", "2", "4"])),
    "data that is none": ("luks.digests", _at("digests", "1", segments=["0", "1", "4", "9"])),
    "data twice": ("luks.digests", _at("digests", "1", segments=["0", "1", "4", "4"])),
    "old and new swapped": (
        "luks.segments",
        lambda one: (
            _at("digests", "0", segments=["0", "1", "3"])(one),
            _at("digests", "1", segments=["1", "2", "4"])(one),
        ),
    ),
    "backups of one key": (
        "luks.digests",
        lambda one: (
            _at("digests", "0", segments=["1", "2", "3", "4"])(one),
            _at("digests", "1", segments=["0", "1"])(one),
        ),
    ),
    "a gap": ("luks.value", _at("segments", "2", offset=str(START + 3 * HOT))),
    "an IV of elsewhere": ("luks.value", _at("segments", "1", iv_tweak="0")),
    "a size beyond the device": ("luks.area", _at("segments", "1", size=str(DEVICE_SIZE))),
    "a size of no sectors": ("luks.area", _at("segments", "1", size="1")),
    "a first part to the end": ("luks.value", _at("segments", "0", size="dynamic")),
    "an old part beyond the device": ("luks.area", _at("segments", "2", size=str(DEVICE_SIZE))),
    "an old part of no bytes": ("luks.area", _at("segments", "2", size="0")),
    "a sector size of its own": ("luks.value", _at("segments", "2", sector_size=4096)),
    "a sector size that is none": ("luks.value", _all_segments(sector_size=1024)),
    "data before the keyslots' end": (
        "luks.value",
        lambda one: one["segments"]["3"].update(offset=str(START - 4096)),
    ),
    "integrity": ("luks.members", _at("segments", "1", integrity={})),
    "a flag of another kind": ("luks.value", _at("segments", "2", flags=["backup-moved-segment"])),
    "no backups": (
        "luks.value",
        lambda one: [segment.pop("flags", 0) for segment in one["segments"].values()],
    ),
    "no data": ("luks.segments", lambda one: [one["segments"].pop(name) for name in "012"]),
    "a segment of no number": (
        "luks.segments",
        lambda one: one["segments"].update({"x": one["segments"].pop("4")}),
    ),
    "a flag that stays": ("luks.flags", _at("config", flags=["no-journal"])),
    "another requirement": (
        "luks.requirements",
        _at("config", requirements={"mandatory": ["offline-reencrypt"]}),
    ),
    "a requirement more": (
        "luks.requirements",
        _at("config", requirements={"mandatory": ["online-reencrypt-v2", "opal"]}),
    ),
    "a plan without a digest": (
        "luks.requirements",
        _at("config", requirements={"mandatory": ["online-reencrypt"]}),
    ),
    "another kind of requirement": (
        "luks.members",
        _at("config", requirements={"mandatory": ["online-reencrypt-v2"], "optional": []}),
    ),
    "a token of another's": (
        "luks.tokens",
        _at("tokens", **{"0": {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "x"}}),
    ),
    "a token of the worker": (
        "luks.tokens",
        _at("tokens", **{"0": {"type": "kagimori-header", "keyslots": ["2"], "epoch": "1", "mac": "0" * 64}}),
    ),
    "an unknown member": ("luks.members", lambda one: one.update(more={})),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_what_cryptsetup_never_writes_is_refused_by_its_name(name: str) -> None:
    """The host writes the header, so that cryptsetup would rewrite the data as the host likes."""
    code, edit = FORGERIES[name]
    with pytest.raises(DiskError) as caught:
        luks2_under_way.check(_read(_edited(edit)), DEVICE_SIZE)
    assert caught.value.code == code


def _pair(primary: Json, secondary: Json, seqids: tuple[int, int] = (3, 3)) -> bytes:
    raw = bytearray(START)
    for at, document, seqid in ((0, primary, seqids[0]), (SIZE, secondary, seqids[1])):
        raw[at : at + SIZE] = summed(one_copy(json.dumps(document).encode(), secondary=bool(at), seqid=seqid))
    return bytes(raw)


def _load(raw: bytes) -> Any:  # noqa: ANN401 - an Image or None
    return luks2_under_way.load(reader(raw), DEVICE_SIZE)


def test_both_copies_are_made_from_the_one_that_was_judged() -> None:
    """One of before, or of the host's, cannot be taken for it by another reader."""
    for raw in (
        _pair(MIDDLE, HONEST, (4, 3)),
        _pair(HONEST, MIDDLE, (3, 4)),
        _pair(MIDDLE, MIDDLE)[:SIZE].ljust(START, b"\0"),
    ):
        image = luks2_settle.rebuilt(_load(raw), (b"1", b"2"))
        read = [one for one in copies(image.read) if isinstance(one, LuksHeader)]
        assert [one.json for one in read] == [MIDDLE, MIDDLE]
        assert len(image.whole) == 1
        assert image.raw[2 * SIZE :] == raw[2 * SIZE :]
    assert _load(_pair(MIDDLE, MIDDLE)).whole == {0, SIZE}


def test_the_newest_copy_is_the_one_that_is_judged() -> None:
    """A forged one is not passed over for an older one that is lawful: cryptsetup would take it."""
    forged = _edited(FORGERIES["it ends in clear"][1])
    for raw in (_pair(MIDDLE, forged, (3, 4)), _pair(forged, MIDDLE, (4, 3)), _pair(forged, HONEST, (4, 3))):
        with pytest.raises(DiskError) as caught:
            _load(raw)
        assert caught.value.code == "luks.under-way"
        assert "cipher_null-ecb" in str(caught.value)
        assert "Let no program resume it" in str(caught.value)


def test_a_header_at_rest_is_none() -> None:
    """Nor is one that was there before a reencryption, and one that cannot be read."""
    assert _load(_pair(HONEST, HONEST)) is None
    assert _load(_pair(HONEST, MIDDLE, (4, 3))) is None
    assert _load(bytes(START)) is None


def test_a_host_that_changes_the_header_between_two_looks_is_refused() -> None:
    """What is judged is what stays in memory."""
    looks = iter([_pair(MIDDLE, MIDDLE)] * 4)

    def read(offset: int, size: int) -> bytes:
        return next(looks, bytes(START))[offset : offset + size]

    with pytest.raises(DiskError):
        luks2_under_way.load(read, DEVICE_SIZE)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(0, 1 << 62)
    | st.sampled_from(["", "0", "dynamic", "crypt", SALT]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["0", "type"]), inner, max_size=2)
    ),
    max_leaves=5,
)


def _paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:  # noqa: ANN401 - JSON
    if not isinstance(value, dict):
        return [path]
    return [path, *(one for name in value for one in _paths(value[name], (*path, name)))][bool(not path) :]


@given(path=st.sampled_from(_paths(MIDDLE)), value=VALUES)
def test_whatever_stands_in_a_members_place_ends_in_a_refusal_or_is_allowed(
    path: tuple[str, ...], value: object
) -> None:
    """A stray exception out of the judgement would be a bug."""
    document = _edited(_at(*path[:-1], **{path[-1]: value}))
    with contextlib.suppress(DiskError):
        luks2_under_way.check(_read(document), DEVICE_SIZE)
