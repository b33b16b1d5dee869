"""Which header of a volume is authentic: its token's MAC, its epoch, and what of it cryptsetup gets to see (THREATS T1, T18).

Each keyslot of an unlock key has a token in the header, of type ``kagimori-header``. Its MAC is made by a key that comes
from that unlock key, over everything that opening by this keyslot uses: the UUID, the token's epoch, the segment, the
digest, the sizes, and the keyslot. Exactly what was authenticated is then written into a header of its own, in memory, and
nothing else of the device's header ever reaches cryptsetup: no other keyslot, no token, no label.

So whoever has the unlock key can tell, before the key is used, whether the owner made this header. Other keyslots may come
and go; the change of one unlock key does not ask for another.

::

    header JSON   {"config": {json_size, keyslots_size}, "digests": {"0": {..., "keyslots": [N]}},
                   "keyslots": {N: ... without priority}, "segments": {"0": ...}, "tokens": {}}
    key           HKDF-SHA256(unlock key, no salt, info "kagimori/1/header-mac", 32 bytes)
    mac           HMAC-SHA256(key, "kagimori/1/header" || 0x00 || canonical JSON of {"epoch", "header", "uuid"})

Import budget: that of ``luks2_layout``, and ``hmac``.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import DiskError, UsageError
from kagimori_protocol.luks2_allowed import TOKEN_TYPE, area_of, check, keyslots_end
from kagimori_protocol.luks2_layout import LuksHeader, build, canonical, copies, refusal, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LABEL_HEADER_KEY: Final = b"kagimori/1/header-mac"
LABEL_HEADER: Final = b"kagimori/1/header"
KEY_SIZE: Final = 32
"""Bytes of an unlock key."""
FIRST_EPOCH: Final = 1
_TODO_RESEAL: Final = (
    "If the owner changed the header or never sealed it, `kagimori-verifier volume reseal` (--changed); "
    "if nobody did, the host has changed it: restore the header from a backup."
)


@dataclass(frozen=True, slots=True)
class Guarded:
    """A header that is the owner's, as far as its keyslot ``slot`` goes; ``notes`` tell what was wrong with another copy.

    ``area`` is offset and size in bytes of the keyslot's area, which is not authenticated: what is wrong in it does not
    open. ``memory`` is the header that cryptsetup gets, both copies of it, ``memory_size`` bytes with the areas.
    """

    header: LuksHeader
    slot: str
    epoch: int
    area: tuple[int, int]
    memory: bytes = field(repr=False)
    memory_size: int
    notes: tuple[str, ...] = ()


def choose(
    read: Callable[[int, int], bytes], device_size: int, uuid: str, key: bytes | memoryview, epoch: int
) -> Guarded:
    """Give the newest header of a device that is valid and authentic; each copy is judged by itself.

    ``read(offset, size)`` gives bytes of the device, fewer where it ends; every byte is asked for once, but for the start
    of a copy. ``epoch`` is the least that is accepted. Raises DiskError of the copy that came nearest to being accepted.
    """
    accepted: list[Guarded] = []
    refused: list[tuple[str, DiskError]] = []
    for number, copy in enumerate(copies(read)):
        which = "secondary" if number else "primary"
        try:
            accepted.append(authenticate(_allowed(copy, device_size, uuid), key, epoch))
        except DiskError as error:
            refused.append((which, error))
    if not accepted:
        raise _both(refused)
    newest = max(accepted, key=lambda one: one.header.seqid)
    notes = [f"the {which} copy of the header is not used ({error.reason})" for which, error in refused]
    notes += [
        f"the {one.header.which} copy of the header is not used: it is older"
        for one in accepted
        if one.header.seqid < newest.header.seqid
    ]
    return replace(newest, notes=tuple(notes))


def authenticate(header: LuksHeader, key: bytes | memoryview, epoch: int) -> Guarded:
    """Return what this key's token vouches for in a header that ``check`` has seen.

    Raises DiskError: ``luks.unguarded`` without any token, ``luks.mac`` where none is this key's, ``luks.epoch`` where it
    is older than ``epoch``.
    """
    tokens = tied(header)
    if not tokens:
        raise unguarded()
    derived = header_key(key)
    ours = [
        (int(token["epoch"]), slot)
        for slot, token in tokens.items()
        if hmac.compare_digest(_mac(derived, header, slot, token["epoch"]).hex(), token["mac"])
    ]
    if not ours:
        raise refusal(
            "luks.mac",
            "a header authenticated by this volume's unlock key",
            f"another MAC in {'the token' if len(tokens) == 1 else f'each of {len(tokens)} tokens'}",
            _TODO_RESEAL,
        )
    found, slot = max(ours)
    if found < epoch:
        raise refusal(
            "luks.epoch",
            f"a header of epoch {epoch} or later",
            f"epoch {found}",
            "The host shows an old header: it must give back the present one. If the owner restored it from a backup, "
            "`kagimori-verifier volume reseal`.",
        )
    return Guarded(
        header,
        slot,
        found,
        area_of(header.json["keyslots"][slot]),
        alone(header, slot),
        keyslots_end(header),
    )


def unguarded() -> DiskError:
    """Give the error for a header without any token."""
    return refusal("luks.unguarded", f"a token of type {TOKEN_TYPE}", "none", _TODO_RESEAL)


def seal(header: LuksHeader, slot: str, key: bytes | memoryview, epoch: int) -> dict[str, Any]:
    """Make the token by which ``key`` vouches for its keyslot ``slot`` of a header that ``check`` has seen."""
    mac = _mac(header_key(key), header, slot, str(epoch)).hex()
    return {"type": TOKEN_TYPE, "keyslots": [slot], "epoch": str(epoch), "mac": mac}


def tied(header: LuksHeader) -> dict[str, dict[str, Any]]:
    """Give the tokens of a header that ``check`` has seen, by the keyslot that they are for."""
    return {slot: token for token in header.json["tokens"].values() for slot in token["keyslots"]}


def reduced(header: LuksHeader, slot: str) -> dict[str, Any]:
    """Give of a header's JSON what opening by one keyslot uses, and nothing else."""
    keyslot = {name: value for name, value in header.json["keyslots"][slot].items() if name != "priority"}
    config = header.json["config"]
    return {
        "config": {name: config[name] for name in ("json_size", "keyslots_size")},
        "digests": {"0": header.json["digests"]["0"] | {"keyslots": [slot]}},
        "keyslots": {slot: keyslot},
        "segments": header.json["segments"],
        "tokens": {},
    }


def alone(header: LuksHeader, slot: str) -> bytes:
    """Write a header of both copies that has one keyslot and what it uses; where it comes from does not show in it."""
    bare = replace(header, label="", subsystem="", seqid=1, json=reduced(header, slot))
    return build(bare, (b"", b""))


def header_key(key: bytes | memoryview) -> bytes:
    """Derive the MAC's key from an unlock key (RFC 5869; one block of output). Raises UsageError for another size."""
    if len(key) != KEY_SIZE:
        raise UsageError(
            "An unlock key has the wrong size.",
            code="luks.key-size",
            expected=f"{KEY_SIZE} bytes",
            found=f"{len(key)} bytes",
        )
    extracted = hmac.digest(bytes(hashlib.sha256().digest_size), key, "sha256")
    return hmac.digest(extracted, LABEL_HEADER_KEY + b"\x01", "sha256")


def _mac(derived: bytes, header: LuksHeader, slot: str, epoch: str) -> bytes:
    content = canonical({"epoch": epoch, "header": reduced(header, slot), "uuid": header.uuid})
    return hmac.digest(derived, LABEL_HEADER + b"\x00" + content, "sha256")


def _allowed(copy: LuksHeader | DiskError, device_size: int, uuid: str) -> LuksHeader:
    if isinstance(copy, DiskError):
        raise copy
    if copy.uuid != uuid:
        raise refusal("luks.other-volume", f"a header of volume {uuid}", shown(copy.uuid))
    return check(copy, device_size)


_DISTANCE: Final = ("luks.epoch", "luks.mac", "luks.unguarded")
"""What a copy is refused for last; the earlier here, the nearer it was to being accepted."""


def _both(refused: Sequence[tuple[str, DiskError]]) -> DiskError:
    """Say why no copy is used: the reason of the nearest, and the other copy's if that is another."""
    ranked = sorted(
        refused, key=lambda one: _DISTANCE.index(one[1].code) if one[1].code in _DISTANCE else len(_DISTANCE)
    )
    which, first = ranked[0]
    others = [f"; {name}: {error.reason}" for name, error in ranked[1:] if error.reason != first.reason]
    if not others:
        return first
    return refusal(first.code, first.expected or "", f"{first.found} ({which}{''.join(others)})", first.todo)
