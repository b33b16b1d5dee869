"""What a LUKS2 header may say: an allow-list of what an honest volume has (THREATS T1).

The host writes the header. A null cipher in the data segment lays the volume open to it, one in a keyslot opens with
any key, and a second segment puts plain data of its own making beside the encrypted. What is allowed here is not yet
authentic: that is asked in ``luks2_guard``.

Source: LUKS2 On-Disk Format Specification 1.1.1, section 3.

Import budget: that of ``luks2_layout``.
"""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.luks2_layout import BINARY_SIZE, LuksHeader, refusal, require_object, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

_BASE64: Final = re.compile(r"(?:[A-Za-z0-9+/]{4}){0,32}(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?", re.ASCII)
_DECIMAL: Final = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)

ENCRYPTIONS: Final = frozenset({"aes-xts-plain64"})
"""What cryptsetup of Debian, Ubuntu and Fedora makes by default; the only cipher for data and for keyslots."""
KEY_SIZE: Final = 64
"""Bytes of an AES-256-XTS key, the default of the same."""
INTEGRITY: Final = {"type": "hmac(sha256)", "journal_encryption": "none", "journal_integrity": "none"}
"""What `--integrity hmac-sha256` writes, the only integrity beside none. AEAD ciphers are refused: ADR 10."""
INTEGRITY_KEY_SIZE: Final = 32
"""Bytes of the MAC's key, which stands behind the cipher's in the volume key."""
SECTOR_SIZES: Final = frozenset({512, 4096})
HASHES: Final = frozenset({"sha256", "sha512"})
KDFS: Final = {
    "argon2id": frozenset({"type", "salt", "time", "memory", "cpus"}),
    "argon2i": frozenset({"type", "salt", "time", "memory", "cpus"}),
    "pbkdf2": frozenset({"type", "salt", "hash", "iterations"}),
}
SALT_SIZE: Final = 32
DIGEST_SIZES: Final = {"sha256": frozenset({20, 32}), "sha512": frozenset({20, 64})}
"""Bytes that a digest by each hash has; 20 are what a volume has kept that was LUKS1 once."""
MIN_ITERATIONS: Final = 1000
"""What cryptsetup gives a digest at least."""
MAX_COST: Final = (1 << 32) - 1
MAX_KEYSLOTS: Final = 32
STRIPES: Final = 4000
MAX_AREA: Final = 1 << 20
"""Bytes of a keyslot's area. At least it is the split volume key, and cryptsetup rounds that up to 4096."""
MAX_KEYSLOTS_SIZE: Final = 32 << 20
"""Bytes of all keyslots' areas together: twice what cryptsetup takes by default."""
SECTOR: Final = 512

TOKEN_TYPE: Final = "kagimori-header"  # noqa: S105 - a type of tokens
_MAC_FORM: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)


def check(header: LuksHeader, device_size: int) -> LuksHeader:
    """Return the header if all that it says is allowed: one encrypted segment and nothing out of the ordinary.

    ``device_size`` is in bytes. Raises DiskError, naming what is not.
    """
    top = members(header.json, "the header", {"keyslots", "tokens", "segments", "digests", "config"})
    _check_config(header, top["config"])
    segment_at = _check_segment(header, require_object(top["segments"], "segments"), device_size)
    keyslots = require_object(top["keyslots"], "keyslots")
    if not 1 <= len(keyslots) <= MAX_KEYSLOTS:
        raise refusal("luks.keyslots", f"1 to {MAX_KEYSLOTS} keyslots", str(len(keyslots)))
    for name, keyslot in keyslots.items():
        if not _DECIMAL.fullmatch(name) or int(name) >= MAX_KEYSLOTS:
            raise refusal("luks.keyslots", f"keyslots 0 to {MAX_KEYSLOTS - 1}", shown(name))
        check_keyslot(f"keyslot {name}", keyslot, volume_key_size(header))
    least = volume_key_size(header) * STRIPES
    check_places(header, [(*area_of(one), least, MAX_AREA) for one in keyslots.values()], segment_at)
    check_tokens(keyslots, top["tokens"])
    _check_digest(keyslots, require_object(top["digests"], "digests"))
    return header


def has_integrity(header: LuksHeader) -> bool:
    """Tell whether the data of a volume whose segment ``check`` has seen is authenticated sector by sector."""
    return "integrity" in header.json["segments"]["0"]


def volume_key_size(header: LuksHeader) -> int:
    """Give the bytes of the volume key that a segment which ``check`` has seen takes: no more, no fewer."""
    return KEY_SIZE + (INTEGRITY_KEY_SIZE if has_integrity(header) else 0)


def area_of(keyslot: dict[str, Any]) -> tuple[int, int]:
    """Give offset and size in bytes of the area of a keyslot that ``check`` has seen."""
    return int(keyslot["area"]["offset"]), int(keyslot["area"]["size"])


def keyslots_end(header: LuksHeader) -> int:
    """Give where the keyslots of a header that ``check`` has seen end: header and keyslots are the bytes before."""
    return 2 * header.size + int(header.json["config"]["keyslots_size"])


def _check_config(header: LuksHeader, value: object) -> None:
    config = require_object(value, "config")
    for name in ("flags", "requirements"):
        if config.get(name):  # both may be there and empty
            raise refusal(
                f"luks.{name}",
                f"no {name}",
                shown(config[name]),
                "Finish a re-encryption, or drop persistent flags with `cryptsetup refresh --persistent`.",
            )
    check_sizes(header, config)


def check_sizes(header: LuksHeader, value: object) -> None:
    """Require of ``config`` what it says of sizes, and no unknown members; flags and requirements are not looked at."""
    config = members(value, "config", {"json_size", "keyslots_size"}, {"flags", "requirements"})
    equal("config.json_size", config["json_size"], str(header.size - BINARY_SIZE))
    if decimal("config.keyslots_size", config["keyslots_size"]) > MAX_KEYSLOTS_SIZE:
        raise refusal("luks.area", f"keyslots of at most {MAX_KEYSLOTS_SIZE} bytes", config["keyslots_size"])


def _check_segment(header: LuksHeader, segments: dict[str, Any], device_size: int) -> int:
    if list(segments) != ["0"]:
        raise refusal("luks.segments", "exactly one segment, 0", shown(list(segments)))
    segment = require_object(segments["0"], "segment 0")
    equal("segment 0: type", segment.get("type"), "crypt")
    if "flags" in segment:
        raise refusal("luks.segment-flags", "a segment without flags", shown(segment["flags"]))
    if segment.get("integrity", INTEGRITY) != INTEGRITY:
        raise refusal(
            "luks.segment-integrity",
            "a segment without integrity, or with that of `cryptsetup luksFormat --integrity hmac-sha256`",
            shown(segment["integrity"]),
        )
    members(
        segment,
        "segment 0",
        {"type", "offset", "size", "iv_tweak", "encryption", "sector_size"},
        {"integrity"},
    )
    allowed_cipher("segment 0", segment["encryption"])
    offset = decimal("segment 0: offset", segment["offset"])
    if offset < 2 * header.size:
        raise refusal("luks.value", "a segment after the header", shown(segment["offset"]))
    equal("segment 0: size", segment["size"], "dynamic")
    equal("segment 0: iv_tweak", segment["iv_tweak"], "0")
    sector_size = one_of("segment 0: sector_size", segment["sector_size"], SECTOR_SIZES)
    if offset % SECTOR or offset + int(str(sector_size)) > device_size:
        raise refusal("luks.area", f"a segment within a device of {device_size} bytes", f"one at {offset}")
    return offset


def check_places(header: LuksHeader, areas: Iterable[tuple[int, int, int, int]], segment_at: int) -> None:
    """Require that every area lies between header and segment, and on no other.

    Each is given by its offset and size, and the least and the most that this may be.
    """
    end = keyslots_end(header)
    if end > segment_at:
        raise refusal(
            "luks.area", f"keyslots that end before the segment, at {segment_at}", f"an end at {end}"
        )
    free_from = 2 * header.size
    for offset, size, least, most in sorted(areas):
        if not least <= size <= most:
            raise refusal("luks.area", f"a keyslot's area of {least} to {most} bytes", f"{size} bytes")
        if offset < free_from or offset + size > end:
            raise refusal(
                "luks.area",
                f"a keyslot's area between {free_from}, where what comes before it ends, and {end}",
                f"{size} bytes at {offset}",
            )
        free_from = offset + size


def check_tokens(keyslots: dict[str, Any], value: object) -> None:
    """Allow tokens of ours alone, at most one for a keyslot, and none that cryptsetup would use by itself.

    cryptsetup tries tokens before the key that it is given, and a keyring token's success passes for the key's. It keeps a
    token whose keyslot is removed: that one, of no keyslot, says nothing.
    """
    tied: list[str] = []
    for name, token in require_object(value, "tokens").items():
        kind = token.get("type") if isinstance(token, dict) else token
        if kind != TOKEN_TYPE:
            raise refusal(
                "luks.tokens",
                f"no tokens but those of type {TOKEN_TYPE}",
                shown(token),
                "Remove it with `cryptsetup token remove`, after a look at what made it.",
            )
        of = f"token {shown(name)}"
        said = members(token, of, {"type", "keyslots", "epoch", "mac"})
        if decimal(f"{of}: epoch", said["epoch"]) < 1:
            raise refusal("luks.tokens", f"{of}: an epoch from 1", shown(said["epoch"]))
        if not isinstance(said["mac"], str) or not _MAC_FORM.fullmatch(said["mac"]):
            raise refusal("luks.tokens", f"{of}: a MAC of 64 hex digits", shown(said["mac"]))
        slots = said["keyslots"]
        if (
            not isinstance(slots, list)
            or len(slots) > 1
            or not all(isinstance(one, str) and one in keyslots for one in slots)
        ):
            raise refusal("luks.tokens", f"{of}: one keyslot of {shown(sorted(keyslots))}", shown(slots))
        tied += slots
    if len(set(tied)) != len(tied):
        raise refusal("luks.tokens", "at most one token for a keyslot", f"tokens for {shown(sorted(tied))}")


def check_keyslot(name: str, value: object, key_size: int) -> None:
    """Require a keyslot of the type luks2, for a volume key of this size."""
    keyslot = require_object(value, name)
    equal(f"{name}: type", keyslot.get("type"), "luks2")
    members(keyslot, name, {"type", "key_size", "af", "area", "kdf"}, {"priority"})
    equal(f"{name}: key_size", keyslot["key_size"], key_size)
    one_of(f"{name}: priority", keyslot.get("priority", 1), frozenset({0, 1, 2}))
    area = members(keyslot["area"], f"{name}: area", {"type", "offset", "size", "encryption", "key_size"})
    equal(f"{name}: area.type", area["type"], "raw")
    allowed_cipher(name, area["encryption"])
    equal(f"{name}: area.key_size", area["key_size"], KEY_SIZE)
    decimal(f"{name}: area.offset", area["offset"])
    decimal(f"{name}: area.size", area["size"])
    af = members(keyslot["af"], f"{name}: af", {"type", "stripes", "hash"})
    equal(f"{name}: af.type", af["type"], "luks1")
    equal(f"{name}: af.stripes", af["stripes"], STRIPES)
    one_of(f"{name}: af.hash", af["hash"], HASHES)
    kdf = require_object(keyslot["kdf"], f"{name}: kdf")
    kind = one_of(f"{name}: kdf.type", kdf.get("type"), frozenset(KDFS))
    members(kdf, f"{name}: kdf", KDFS[str(kind)])
    one_of(f"{name}: kdf.hash", kdf.get("hash", "sha256"), HASHES)
    base64_of(f"{name}: kdf.salt", kdf["salt"], frozenset({SALT_SIZE}))
    # Costs are hardly bounded from below: an unlock key is 32 random bytes, and no KDF makes it better or worse.
    for cost in KDFS[str(kind)] - {"type", "salt", "hash"}:
        number(f"{name}: kdf.{cost}", kdf[cost], 1)


def _check_digest(keyslots: dict[str, Any], digests: dict[str, Any]) -> None:
    """Require one digest that ties every keyslot to the segment: no keyslot may hold another key.

    Its lengths are held here and not left to cryptsetup: the digest is what tells one volume key from another.
    """
    if list(digests) != ["0"]:
        raise refusal("luks.digests", "exactly one digest, 0", shown(list(digests)))
    digest = check_digest("digest 0", digests["0"])
    equal("digest 0: segments", digest["segments"], ["0"])
    if sorted(digest["keyslots"]) != sorted(keyslots):
        raise refusal(
            "luks.digests", f"a digest of keyslots {shown(sorted(keyslots))}", shown(digest["keyslots"])
        )


def check_digest(name: str, value: object) -> dict[str, Any]:
    """Require the form of one digest; gives it. What it ties is not looked at, but that it names that."""
    digest = members(value, name, {"type", "keyslots", "segments", "hash", "iterations", "salt", "digest"})
    equal(f"{name}: type", digest["type"], "pbkdf2")
    of = one_of(f"{name}: hash", digest["hash"], HASHES)
    base64_of(f"{name}: digest", digest["digest"], DIGEST_SIZES[str(of)])
    base64_of(f"{name}: salt", digest["salt"], frozenset({SALT_SIZE}))
    number(f"{name}: iterations", digest["iterations"], MIN_ITERATIONS)
    for tied in ("keyslots", "segments"):
        names = digest[tied]
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise refusal("luks.digests", f"{name}: {tied} by their names", shown(names))
    return digest


def members(
    value: object,
    name: str,
    required: frozenset[str] | set[str],
    optional: frozenset[str] | set[str] = frozenset(),
) -> dict[str, Any]:
    """Require an object of these members and no others; gives it."""
    found = require_object(value, name)
    missing = sorted(required - set(found))
    unknown = sorted(set(found) - required - optional)
    if missing or unknown:
        raise refusal(
            "luks.members",
            f"{name} with exactly {', '.join(sorted(required))}",
            f"missing: {shown(missing)}, unknown: {shown(unknown)}",
        )
    return found


def allowed_cipher(name: str, value: object) -> None:
    """Require a cipher of the list."""
    if not isinstance(value, str) or value not in ENCRYPTIONS:
        raise refusal(
            "luks.cipher",
            f"{name} encrypted by {', '.join(sorted(ENCRYPTIONS))}",
            shown(value),
            "If nobody made this volume so, the host has changed its header: do not use the disk.",
        )


def equal(name: str, value: object, expected: object) -> None:
    """Require this value, of this type."""
    # Types too: True is no 1 in JSON.
    if type(value) is not type(expected) or value != expected:
        raise refusal("luks.value", f"{name} {shown(expected)}", shown(value))


def one_of(name: str, value: object, allowed: frozenset[Any]) -> object:
    """Require one of these values; gives it."""
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value not in allowed:
        raise refusal("luks.value", f"{name} of {shown(sorted(allowed))}", shown(value))
    return value


def base64_of(name: str, value: object, sizes: frozenset[int]) -> None:
    """Require the one text (RFC 4648, section 4) of bytes of one of these sizes."""
    expected = f"{name} as base64 of {' or '.join(map(str, sorted(sizes)))} bytes"
    if not isinstance(value, str) or not _BASE64.fullmatch(value):
        raise refusal("luks.value", expected, shown(value))
    content = base64.b64decode(value)
    if len(content) not in sizes or base64.b64encode(content) != value.encode("ascii"):
        raise refusal("luks.value", expected, shown(value))


def number(name: str, value: object, least: int) -> None:
    """Require an integer from ``least`` on."""
    if type(value) is not int or not least <= value <= MAX_COST:
        raise refusal("luks.value", f"{name} from {least} to {MAX_COST}", shown(value))


def decimal(name: str, value: object) -> int:
    """Require a number in a string, as the specification writes those of 64 bits; gives it."""
    if not isinstance(value, str) or not _DECIMAL.fullmatch(value):
        raise refusal("luks.value", f"{name} as a decimal number in a string", shown(value))
    return int(value)
