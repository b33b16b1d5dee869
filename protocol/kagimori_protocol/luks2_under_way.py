"""What a LUKS2 header may say while its volume gets another volume key: an allow-list beside that of ``luks2_allowed``.

An agent never opens such a volume. But whoever ends a reencryption lets cryptsetup rewrite the data as the header says, and
the host writes the header: a last segment of a null cipher would have all data written in clear. So what is ended is only what
``cryptsetup reencrypt`` with a new volume key, and nothing else, has begun: from one lawful cipher to another, forward, from
the segment's start to its end, with a digest over that plan.

::

    segments   0..2    new key, below way (in-reencryption), old key; one of them at least, without a gap, in this order
               next    backup-previous: what the whole segment was
               next    backup-final: what it becomes
    keyslots   luks2   of the old volume key or of the new one
               one     of type reencrypt: how blocks that are being changed are repaired after a crash
    digests    three   of the old volume key, of the new one, and of the reencrypt keyslot: over keys, plan and backups

What is allowed is not yet authentic: cryptsetup holds the plan against its digest, by both volume keys.

Source: LUKS2 On-Disk Format Specification 1.1.1, section 3; what cryptsetup 2.6.1 and 2.7.5 write.

Import budget: that of ``luks2_change``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_allowed import (
    HASHES,
    KEY_SIZE,
    MAX_AREA,
    MAX_KEYSLOTS,
    MAX_KEYSLOTS_SIZE,
    SECTOR,
    SECTOR_SIZES,
    STRIPES,
    allowed_cipher,
    area_of,
    check_digest,
    check_keyslot,
    check_places,
    check_sizes,
    check_tokens,
    decimal,
    equal,
    keyslots_end,
    members,
    one_of,
)
from kagimori_protocol.luks2_change import Image
from kagimori_protocol.luks2_layout import LuksHeader, copies, refusal, require_object, shown

if TYPE_CHECKING:
    from kagimori_protocol.luks2_change import Read

REQUIREMENTS: Final = frozenset({"online-reencrypt-v2", "online-reencrypt-v3"})
"""cryptsetup's marks of a reencryption whose plan has a digest; the first version had none."""
_MARK: Final = "online-reencrypt"
_AREAS: Final = {
    "checksum": frozenset({"type", "offset", "size", "hash", "sector_size"}),
    "journal": frozenset({"type", "offset", "size"}),
}
"""How blocks in the middle of their change are repaired, and what the area for that says of itself."""
_CHECKSUMS: Final = frozenset({"sha1", *HASHES})
_LEAST_AREA: Final = 4096
_PARTS: Final = 3
_BACKUPS: Final = 2
_ROWS: Final = frozenset({"o", "w", "n", "no", "wo", "nw", "nwo"})
"""What segments may follow each other: of the (n)ew key, below (w)ay, of the (o)ld key."""
_DIGESTS: Final = 3
_SEGMENT: Final = frozenset({"type", "offset", "size", "iv_tweak", "encryption", "sector_size"})
_BELOW_WAY: Final = "in-reencryption"
_PREVIOUS: Final = "backup-previous"
_FINAL: Final = "backup-final"


def load(read: Read, device_size: int) -> Image | None:
    """Read header and keyslots of a volume that is being reencrypted; None if the newest copy does not say that it is.

    Raises DiskError "luks.under-way" if what that copy says is not allowed: an older one is not asked, as cryptsetup would
    not ask it either.
    """
    if (header := _begun(read)) is None:
        return None
    end = keyslots_end(_checked(header, device_size))
    raw = read(0, end)
    # Once more, now on what was read and stays: the device may have changed between two looks.
    again = _begun(lambda offset, size: raw[offset : offset + size])
    if len(raw) != end or again is None or keyslots_end(_checked(again, device_size)) != end:
        raise refusal(
            "luks.size", f"{end} bytes of a header in reencryption", "a header that has changed meanwhile"
        )
    whole = frozenset(
        one.offset
        for one in copies(lambda offset, size: raw[offset : offset + size])
        if isinstance(one, LuksHeader) and replace(one, offset=again.offset) == again
    )
    return Image(again, raw, whole, device_size)


def is_under_way(header: LuksHeader) -> bool:
    """Tell whether a header says that its volume is being reencrypted, whatever else it says."""
    config = header.json.get("config")
    requirements = config.get("requirements") if isinstance(config, dict) else None
    mandatory = requirements.get("mandatory") if isinstance(requirements, dict) else None
    return isinstance(mandatory, list) and any(str(one).startswith(_MARK) for one in mandatory)


def is_written(header: LuksHeader) -> bool:
    """Tell whether all data is under the new key by what a judged header says: only the header is left to be ended."""
    segments, digests = header.json["segments"], header.json["digests"]
    final = str(len(segments) - 1)
    (new,) = (one for one in digests.values() if final in one["segments"])
    return len(segments) == 1 + _BACKUPS and "flags" not in segments["0"] and "0" in new["segments"]


def is_below_way(header: LuksHeader) -> bool:
    """Tell whether blocks were being changed as a judged header was written: after a crash they are to be repaired."""
    return any(segment.get("flags") == [_BELOW_WAY] for segment in header.json["segments"].values())


def check(header: LuksHeader, device_size: int) -> LuksHeader:
    """Return the header if all that it says is allowed. ``device_size`` is in bytes. Raises DiskError, naming what is not."""
    top = members(header.json, "the header", {"keyslots", "tokens", "segments", "digests", "config"})
    check_sizes(header, top["config"])
    _check_requirements(top["config"])
    keyslots = require_object(top["keyslots"], "keyslots")
    worker = _check_keyslots(keyslots)
    segments = require_object(top["segments"], "segments")
    start, names = _check_segments(header, segments, device_size)
    sizes = dict.fromkeys(keyslots, (KEY_SIZE * STRIPES, MAX_AREA)) | {
        worker: (_LEAST_AREA, MAX_KEYSLOTS_SIZE)
    }
    check_places(header, [(*area_of(one), *sizes[name]) for name, one in keyslots.items()], start)
    check_tokens({name: one for name, one in keyslots.items() if name != worker}, top["tokens"])
    _check_digests(require_object(top["digests"], "digests"), set(keyslots), worker, segments, names)
    return header


def _begun(read: Read) -> LuksHeader | None:
    """Give the newest copy, if it says that the volume is being reencrypted."""
    found = [copy for copy in copies(read) if isinstance(copy, LuksHeader)]
    newest = max(found, key=lambda one: one.seqid) if found else None
    return newest if newest is not None and is_under_way(newest) else None


def _checked(header: LuksHeader, device_size: int) -> LuksHeader:
    try:
        return check(header, device_size)
    except DiskError as error:
        raise DiskError(
            "The header says that a reencryption is under way, and not as one with a new volume key is. Nothing was changed.",
            code="luks.under-way",
            expected=error.expected,
            found=f"{error.found} ({error.code})",
            todo="Let no program resume it (`cryptsetup reencrypt`, `open` or `repair`): it would rewrite the data as this "
            "header says, in clear if that says so. If you began an encryption, a decryption, or a change of cipher "
            "yourself, end that before you enrol. If you did not, the host has changed the header: restore it by "
            "`cryptsetup luksHeaderRestore` from a backup that was made after the last reencryption had ended.",
        ) from error


def _check_requirements(config: dict[str, Any]) -> None:
    if config.get("flags"):  # may be there and empty
        raise refusal("luks.flags", "no flags", shown(config["flags"]))
    mandatory = members(config.get("requirements"), "config.requirements", {"mandatory"})["mandatory"]
    if (
        not isinstance(mandatory, list)
        or len(mandatory) != 1
        or not isinstance(mandatory[0], str)
        or mandatory[0] not in REQUIREMENTS
    ):
        raise refusal("luks.requirements", f"one of {', '.join(sorted(REQUIREMENTS))}", shown(mandatory))


def _check_keyslots(keyslots: dict[str, Any]) -> str:
    """Allow keyslots of volume keys, and one of type reencrypt; gives the name of that."""
    names = {str(number) for number in range(MAX_KEYSLOTS)}
    if not set(keyslots) <= names:
        raise refusal("luks.keyslots", f"keyslots 0 to {MAX_KEYSLOTS - 1}", shown(sorted(keyslots)))
    workers = [
        name for name, one in keyslots.items() if isinstance(one, dict) and one.get("type") == "reencrypt"
    ]
    if len(workers) != 1:
        raise refusal("luks.keyslots", "one keyslot of type reencrypt", shown(workers))
    for name, keyslot in keyslots.items():
        if name not in workers:
            check_keyslot(f"keyslot {name}", keyslot, KEY_SIZE)
    (worker,) = workers
    of = f"keyslot {worker}"
    said = members(keyslots[worker], of, {"type", "key_size", "mode", "direction", "area"}, {"priority"})
    equal(f"{of}: key_size", said["key_size"], 1)
    equal(f"{of}: mode", said["mode"], "reencrypt")
    equal(f"{of}: direction", said["direction"], "forward")
    equal(f"{of}: priority", said.get("priority", 0), 0)
    area = require_object(said["area"], f"{of}: area")
    kind = one_of(f"{of}: area.type", area.get("type"), frozenset(_AREAS))
    members(area, f"{of}: area", _AREAS[str(kind)])
    decimal(f"{of}: area.offset", area["offset"])
    decimal(f"{of}: area.size", area["size"])
    one_of(f"{of}: area.hash", area.get("hash", "sha256"), _CHECKSUMS)
    one_of(f"{of}: area.sector_size", area.get("sector_size", SECTOR), SECTOR_SIZES)
    return worker


def _check_segments(header: LuksHeader, segments: dict[str, Any], device_size: int) -> tuple[int, list[str]]:
    """Require segments without a gap, and the two backups after them; gives where they start, and their names in order.

    What each holds, by which of the keys, is asked in ``_check_digests``.
    """
    names = [str(number) for number in range(len(segments))]
    if set(segments) != set(names) or not 1 <= len(names) - _BACKUPS <= _PARTS:
        raise refusal(
            "luks.segments", f"1 to {_PARTS} segments and {_BACKUPS} backups", shown(sorted(segments))
        )
    for name in names:
        segment = require_object(segments[name], f"segment {name}")
        equal(f"segment {name}: type", segment.get("type"), "crypt")
        members(segment, f"segment {name}", _SEGMENT, {"flags"})
        allowed_cipher(f"segment {name}", segment["encryption"])
        one_of(f"segment {name}: sector_size", segment["sector_size"], SECTOR_SIZES)
    previous = names[-2]
    start = decimal(f"segment {previous}: offset", segments[previous]["offset"])
    if start < 2 * header.size or start % SECTOR or start + max(SECTOR_SIZES) > device_size:
        raise refusal("luks.area", f"segments within a device of {device_size} bytes", f"one at {start}")
    for name, flag in ((previous, _PREVIOUS), (names[-1], _FINAL)):
        equal(f"segment {name}: flags", segments[name].get("flags"), [flag])
        _check_place(name, segments[name], start, start)
        equal(f"segment {name}: size", segments[name]["size"], "dynamic")
    at = start
    for name in names[:-2]:
        if "flags" in segments[name]:
            equal(f"segment {name}: flags", segments[name]["flags"], [_BELOW_WAY])
        _check_place(name, segments[name], start, at)
        # Below a mapping in use the last part has the size of that.
        if name == names[-3] and "flags" not in segments[name] and segments[name]["size"] == "dynamic":
            continue
        size = decimal(f"segment {name}: size", segments[name]["size"])
        if not size or size % SECTOR or at + size > device_size:
            raise refusal("luks.area", f"segment {name} within {device_size} bytes", f"{size} bytes at {at}")
        at += size
    return start, names


def _check_place(name: str, segment: dict[str, Any], start: int, at: int) -> None:
    equal(f"segment {name}: offset", segment["offset"], str(at))
    equal(f"segment {name}: iv_tweak", segment["iv_tweak"], str((at - start) // SECTOR))


def _check_digests(
    digests: dict[str, Any], keyslots: set[str], worker: str, segments: dict[str, Any], names: list[str]
) -> None:
    """Require a digest of the old volume key, one of the new, one of the plan; and that new data comes before old."""
    *parts, previous, final = names
    if len(digests) != _DIGESTS or not all(name.isascii() and name.isdecimal() for name in digests):
        raise refusal("luks.digests", f"{_DIGESTS} digests", shown(list(digests)))
    said = [check_digest(f"digest {name}", one) for name, one in digests.items()]
    tied = sorted(name for one in said for name in one["keyslots"])
    if tied != sorted(keyslots):
        raise refusal(
            "luks.digests", f"digests of keyslots {shown(sorted(keyslots))}, each once", shown(tied)
        )
    by = {name: [number for number, one in enumerate(said) if name in one["segments"]] for name in names}
    old, new = by[previous], by[final]
    plan = [number for number, one in enumerate(said) if one["keyslots"] == [worker] and not one["segments"]]
    if sorted(old + new + plan) != list(range(_DIGESTS)) or not len(old) == len(new) == len(plan) == 1:
        raise refusal(
            "luks.digests", "one each of the old key, of the new, and of the reencryption", shown(by)
        )
    held = sorted(name for one in said for name in one["segments"])
    if held != sorted(name for name in names for _ in by[name]):
        raise refusal("luks.digests", "digests that name each segment once", shown(held))
    # What is below way is of both keys: the header does not say how far it is.
    kinds = {(*old, False): "o", (*new, False): "n", (*sorted(old + new), True): "w"}
    row = "".join(kinds.get((*by[name], "flags" in segments[name]), "?") for name in parts)
    if row not in _ROWS:
        raise refusal("luks.segments", "new data, then what is below way, then old data", shown(row))
    for name, kind in zip(parts, row, strict=True):
        whole = previous if kind == "o" else final
        for member in ("encryption", "sector_size"):
            equal(f"segment {name}: {member}", segments[name][member], segments[whole][member])
