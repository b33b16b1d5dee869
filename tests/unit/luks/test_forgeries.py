"""A LUKS2 header with right checksums that says what an honest one does not: each forgery is refused by its name."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable

import pytest
from tests.conformance.making.header import Json, sealed, token
from tests.unit.luks.headers import (
    DEVICE_SIZE,
    HONEST,
    KEY,
    RAW,
    SALT,
    SEALED,
    SIZE,
    config,
    edited,
    flip,
    header,
    judged,
    segment,
)

from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_layout import LuksHeader, parse


def checked(document: Json) -> LuksHeader:
    """Read a header with this JSON, and ask whether it may be used."""
    return judged(header(json.dumps(document).encode())[:SIZE])


def test_the_honest_header_of_these_tests_is_accepted() -> None:
    """Otherwise every refusal below would mean nothing."""
    read = checked(HONEST)
    assert read.json == HONEST
    assert read.seqid == 3
    assert checked(SEALED).json == SEALED


def _keyslot(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["keyslots"]["0"].update(changes)


def _part(part: str, **changes: object) -> Callable[[Json], object]:
    return lambda one: one["keyslots"]["0"][part].update(changes)


def _areas(*places: tuple[int, int]) -> Callable[[Json], object]:
    """Give keyslots with their areas at these places."""

    def edit(one: Json) -> None:
        for number, (offset, size) in enumerate(places):
            keyslot = json.loads(json.dumps(one["keyslots"]["0"]))
            keyslot["area"] |= {"offset": str(offset), "size": str(size)}
            one["keyslots"][str(number)] = keyslot
        one["digests"]["0"]["keyslots"] = [str(number) for number in range(len(places))]

    return edit


def _tokens(*tokens: object) -> Callable[[Json], object]:
    return lambda one: one.update(tokens={str(number): token for number, token in enumerate(tokens)})


OURS = token(HONEST, "0", KEY)


def _digest(**changes: object) -> Callable[[Json], object]:
    return lambda one: one["digests"]["0"].update(changes)


WRONG_BYTES: dict[str, object] = {
    "nothing": "",
    "a number": 5,
    "null": None,
    "a list": [],
    **{f"{size} bytes": base64.b64encode(bytes(size)).decode() for size in (1, 19, 31, 33, 63, 65, 128)},
    "no base64": "!" * 44,
    "base64 with bits that are not used": SALT[:-2] + "9=",
    "base64 without its padding": SALT.rstrip("="),
}

FORGERIES: dict[str, tuple[str, Callable[[Json], object]]] = {
    "a null cipher for the data lays the volume open": (
        "luks.cipher",
        segment(encryption="cipher_null-ecb"),
    ),
    "a null cipher in capitals": ("luks.cipher", segment(encryption="CIPHER_NULL-ecb")),
    "a null cipher in the kernel's own spelling": (
        "luks.cipher",
        segment(encryption="capi:ecb(cipher_null)-plain"),
    ),
    "a null cipher of the keyslot opens with any key": (
        "luks.cipher",
        _part("area", encryption="cipher_null-ecb"),
    ),
    "a weaker mode for the data": ("luks.cipher", segment(encryption="aes-ecb")),
    "a cipher that is a list": ("luks.cipher", segment(encryption=["aes-xts-plain64"])),
    "a cipher that is missing": ("luks.members", lambda one: one["segments"]["0"].pop("encryption")),
    "a linear segment is plain data": ("luks.value", segment(type="linear")),
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
    "a segment that is a backup of re-encryption": ("luks.segment-flags", segment(flags=["backup-final"])),
    "integrity with a journal of the host's making": (
        "luks.segment-integrity",
        segment(integrity={"type": "none", "journal_encryption": "none", "journal_integrity": "none"}),
    ),
    "a segment that starts within the header": ("luks.value", segment(offset="16384")),
    "a segment that starts at a negative place": ("luks.value", segment(offset="-512")),
    "an offset that is a number": ("luks.value", segment(offset=16777216)),
    "an offset with a leading zero": ("luks.value", segment(offset="016777216")),
    "an offset of many digits": ("luks.value", segment(offset="9" * 30)),
    "a segment cut short": ("luks.value", segment(size="4096")),
    "other initial vectors": ("luks.value", segment(iv_tweak="8")),
    "an odd sector size": ("luks.value", segment(sector_size=1024)),
    "a sector size that is true": ("luks.value", segment(sector_size=True)),
    "a key of a hardware-encrypting disk": ("luks.value", segment(type="hw-opal-crypt")),
    "an unknown member of the segment": ("luks.members", segment(opal_key_size=32)),
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
        _keyslot(kdf={"type": "pbkdf2", "salt": SALT, "hash": "md5", "iterations": 1000}),
    ),
    "a KDF without its salt": ("luks.members", lambda one: one["keyslots"]["0"]["kdf"].pop("salt")),
    "a KDF that is null": ("luks.json", _keyslot(kdf=None)),
    "no keyslots": ("luks.keyslots", lambda one: one["keyslots"].clear()),
    "a keyslot that no digest checks": (
        "luks.digests",
        lambda one: (
            _areas((32768, 258048), (290816, 258048))(one),
            one["digests"]["0"].update(keyslots=["0"]),
        ),
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
    **{
        f"a digest of {what} that fits no key, or every one": ("luks.value", _digest(digest=value))
        for what, value in WRONG_BYTES.items()
    },
    **{
        f"a digest whose salt is {what}": ("luks.value", _digest(salt=value))
        for what, value in WRONG_BYTES.items()
    },
    **{
        f"a KDF whose salt is {what}": ("luks.value", _part("kdf", salt=value))
        for what, value in WRONG_BYTES.items()
    },
    **{
        f"a digest of {value!r} iterations": ("luks.value", _digest(iterations=value))
        for value in (0, 999, 1 << 32, "1000", True, None)
    },
    **{
        f"a KDF of {value!r} passes": ("luks.value", _part("kdf", time=value))
        for value in (0, 1 << 32, "4", True, None)
    },
    "a longer digest than its hash gives": (
        "luks.value",
        _digest(digest=base64.b64encode(bytes(64)).decode()),
    ),
    "no digest": ("luks.digests", lambda one: one["digests"].clear()),
    "a token that gives cryptsetup another key": (
        "luks.tokens",
        lambda one: one["tokens"].update(
            {"0": {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "planted"}}
        ),
    ),
    "tokens that are null": ("luks.json", lambda one: one.update(tokens=None)),
    "a token of a TPM that the host has": (
        "luks.tokens",
        _tokens(OURS, {"type": "systemd-tpm2", "keyslots": ["0"], "tpm2-blob": "AAAA"}),
    ),
    "a keyring's token beside ours": (
        "luks.tokens",
        _tokens(OURS, {"type": "luks2-keyring", "keyslots": ["0"], "key_description": "planted"}),
    ),
    "a token that is null": ("luks.tokens", _tokens(None)),
    "two tokens for one keyslot": ("luks.tokens", _tokens(OURS, OURS)),
    "a token for two keyslots": ("luks.tokens", _tokens(OURS | {"keyslots": ["0", "0"]})),
    "a token for a keyslot that is not there": ("luks.tokens", _tokens(OURS | {"keyslots": ["1"]})),
    "a token for a keyslot that is a number": ("luks.tokens", _tokens(OURS | {"keyslots": [0]})),
    "a token for keyslots in a text": ("luks.tokens", _tokens(OURS | {"keyslots": "0"})),
    "a token with an unknown member": ("luks.members", _tokens(OURS | {"keyfile": "/planted"})),
    "a token without a MAC": (
        "luks.members",
        _tokens({name: OURS[name] for name in OURS if name != "mac"}),
    ),
    "a token of half a MAC": ("luks.tokens", _tokens(OURS | {"mac": OURS["mac"][:32]})),
    "a token of epoch 0": ("luks.tokens", _tokens(OURS | {"epoch": "0"})),
    "a token of an epoch that is a number": ("luks.value", _tokens(OURS | {"epoch": 1})),
    "a segment beyond the end of the device": ("luks.area", segment(offset=str(DEVICE_SIZE))),
    "a segment of less than a sector": (
        "luks.area",
        segment(offset=str(DEVICE_SIZE - 512), sector_size=4096),
    ),
    "a segment between sectors": ("luks.area", segment(offset=str((16 << 20) + 1))),
    "a segment over the keyslots": ("luks.area", segment(offset=str(8 << 20))),
    "keyslots of more than memory is for": ("luks.area", config(keyslots_size=str(64 << 20))),
    "a keyslot's area over the header": ("luks.area", _areas((16384, 258048))),
    "a keyslot's area beyond the keyslots": ("luks.area", _areas(((16 << 20) - 4096, 258048))),
    "a keyslot's area over another's": ("luks.area", _areas((32768, 258048), (32768 + 4096, 258048))),
    "two keyslots in one area": ("luks.area", _areas((32768, 258048), (32768, 258048))),
    "a keyslot's area that holds no key": ("luks.area", _areas((32768, 4096))),
    "a keyslot's area of more than a key needs": ("luks.area", _areas((32768, 2 << 20))),
    "a keyslot of another number": (
        "luks.keyslots",
        lambda one: one["keyslots"].update({"32": one["keyslots"].pop("0")}),
    ),
    "a keyslot whose number is none": (
        "luks.keyslots",
        lambda one: one["keyslots"].update({"00": one["keyslots"].pop("0")}),
    ),
    "flags that let discards through": ("luks.flags", config(flags=["allow-discards"])),
    "a re-encryption under way": (
        "luks.requirements",
        config(requirements={"mandatory": ["online-reencrypt-v2"]}),
    ),
    "a requirement that nobody knows": ("luks.requirements", config(requirements=["x"])),
    "another size of the JSON area": ("luks.value", config(json_size="4096")),
    "a size of the keyslots' area that is a number": ("luks.value", config(keyslots_size=16744448)),
    "an unknown member at the top": ("luks.members", lambda one: one.update(extension={})),
    "no config": ("luks.members", lambda one: one.pop("config")),
}


@pytest.mark.parametrize(("code", "edit"), FORGERIES.values(), ids=FORGERIES.keys())
def test_a_header_with_right_checksums_is_refused_for(code: str, edit: Callable[[Json], object]) -> None:
    """Checksums are no signature: the host makes them right for whatever it writes."""
    with pytest.raises(DiskError) as caught:
        checked(edited(edit))
    error = caught.value
    assert error.code == code
    assert error.expected
    assert error.found
    assert error.todo


def test_a_token_whose_keyslot_was_removed_says_nothing_and_is_allowed() -> None:
    """Cryptsetup leaves it there; an owner who removes an old unlock key's keyslot must not lose the volume."""
    document = sealed(HONEST, "0", KEY)
    document["tokens"]["1"] = OURS | {"keyslots": []}
    assert checked(document).json == document


def test_what_a_header_says_reaches_a_message_short_and_without_control_characters() -> None:
    """A boot console is no place for escape sequences of the host's."""
    with pytest.raises(DiskError) as caught:
        checked(edited(segment(encryption="~" * 4000)))
    assert len(str(caught.value)) < 1000
    with pytest.raises(DiskError) as caught:
        parse(flip(RAW, 24, b"\x1b[2J")[:SIZE], 0)
    assert str(caught.value).replace("\n", "").isprintable()
