"""Change a volume's header so that, cut off after any write, it opens as before or as after.

Everything is done on a copy in memory: cryptsetup works there, the token is made there, and the new header is held against
our own guard and opened there, as an agent would at a boot. Only then is it written, in an order in which one copy of the
header on the disk is always whole:

::

    load  ->  add_key, reseal or remove_key  ->  (keep Change.before)  ->  require_unchanged  ->  apply

What it works on are arguments, so that the owner's machine and the guest run the same steps: ``Read`` and ``Write`` are the
device, ``Cryptsetup`` runs the program with a header that is in memory. Whoever calls keeps ``Change.before`` in a file
first; `cryptsetup luksHeaderRestore` takes it as it is.

Import budget: that of ``luks2_guard``.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, Protocol

from kagimori_protocol import luks2_guard
from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_allowed import ENCRYPTIONS, area_of, check, has_integrity, keyslots_end
from kagimori_protocol.luks2_layout import LuksHeader, build, copies

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kagimori_protocol.luks2_guard import Guarded

Read = Callable[[int, int], bytes]
"""Gives bytes of the device from an offset on, fewer where it ends. Raises DiskError."""
Write = Callable[[int, bytes], None]
"""Writes bytes to the device at an offset, and returns once they would outlive a power cut. Raises DiskError."""
Salts = tuple[bytes, bytes]
"""64 random bytes for each copy of a header."""
Pieces = tuple[tuple[int, bytes], ...]
"""What lies where in a file; zeros between."""

HEADER: Final = "@header"
NEW_KEY: Final = "@new-key"
"""Words that ``Cryptsetup`` replaces by paths: to the header in memory, to a pipe with the new key."""
NO_KEY: Final = 2
"""cryptsetup(8), RETURN CODES: no keyslot opens."""
PREFERRED: Final = 2
"""A keyslot's priority: tried first, or who opens the volume by hand would wait for slow derivations before it."""
FAST: Final = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha256")
"""An unlock key is 32 uniform random bytes, so a slow derivation buys nothing: there is no guess that it could slow down.
The least that cryptsetup takes saves a second and a gigabyte at each boot."""
_CIPHER: Final = ("--keyslot-cipher", *ENCRYPTIONS, "--keyslot-key-size", "512")
_BLOCK: Final = 4096


class Cryptsetup(Protocol):
    """Runs cryptsetup on a header in memory."""

    def __call__(
        self,
        arguments: Sequence[str],
        *,
        size: int,
        pieces: Pieces,
        stdin: bytes | memoryview,
        new_key: bytes | memoryview = b"",
    ) -> tuple[int, str, bytes]:
        """Give exit code, its meaning in one line, and the ``size`` bytes that the header then has.

        ``HEADER`` and ``NEW_KEY`` in ``arguments`` stand for paths. Secrets go through pipes. Raises KagimoriError if it
        cannot be run or does not end.
        """
        ...


@dataclass(frozen=True, slots=True)
class Image:
    """A volume's header and keyslots as they were read: all bytes of the device before ``len(raw)``.

    ``header`` is the newest copy that is allowed; ``whole`` are the offsets of the copies that say the same.
    """

    header: LuksHeader
    raw: bytes = field(repr=False)
    whole: frozenset[int]
    device_size: int

    def read(self, offset: int, size: int) -> bytes:
        """Give bytes as the device would."""
        return self.raw[offset : offset + size]


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be written, in this order; ``before`` is what must be kept, ``after`` what the header becomes."""

    before: Image
    after: Image
    slot: str
    writes: Pieces = field(repr=False)


def load(read: Read, device_size: int) -> Image:
    """Read header and keyslots, at most 40 MiB. Raises DiskError if no copy of the header is allowed.

    That it is authentic is not asked: whoever changes a header says that it is the right one.
    """
    end = max(keyslots_end(one) for one in _allowed(read, device_size))
    raw = read(0, end)
    if len(raw) != end:
        raise _refusal("luks.size", f"{end} bytes of header and keyslots", f"{len(raw)} bytes")
    # Once more, now on what was read and stays: the device may have changed between two looks.
    found = _allowed(lambda offset, size: raw[offset : offset + size], device_size)
    newest = max(found, key=lambda one: one.seqid)
    if keyslots_end(newest) > end:
        raise _refusal("luks.size", f"keyslots that end at {end}", "a header that has changed meanwhile")
    whole = frozenset(one.offset for one in found if replace(one, offset=newest.offset) == newest)
    return Image(newest, raw[: keyslots_end(newest)], whole, device_size)


def add_key(  # noqa: PLR0913 - the header, who works on it, by what, for what
    image: Image,
    cryptsetup: Cryptsetup,
    *,
    passphrase: bytes | memoryview,
    key: bytes | memoryview,
    epoch: int,
    salts: Salts,
) -> Change:
    """Add a keyslot for a new unlock key, with its token; ``passphrase`` opens an existing keyslot.

    Raises DiskError; nothing was written then.
    """
    # With integrity cryptsetup takes no cipher for a keyslot, and uses its default, which is the same.
    cipher = () if has_integrity(image.header) else _CIPHER
    words = ("luksAddKey", "--batch-mode", *FAST, *cipher, "--key-file", "-")
    code, meaning, raw = cryptsetup(
        [*words, "--new-keyfile-size", str(len(key)), "--", HEADER, NEW_KEY],
        size=len(image.raw),
        pieces=_judged(image),
        stdin=passphrase,
        new_key=key,
    )
    if code != 0:
        raise DiskError(
            "cryptsetup could not add a keyslot to the volume.",
            code="volume.keyslot",
            expected="a passphrase that opens the volume, and a free keyslot",
            found=meaning,
            todo="Try again with a passphrase that opens the volume.",
        )
    added = load(lambda offset, size: raw[offset : offset + size], image.device_size)
    new = set(added.header.json["keyslots"]) - set(image.header.json["keyslots"])
    if len(new) != 1:
        raise _refusal("volume.keyslot", "one keyslot more", f"{len(new)} more")
    (slot,) = new
    return _sealed(image, added, cryptsetup, slot, key, epoch, salts)


def joined(
    first: Change, second: Change, cryptsetup: Cryptsetup, key: bytes | memoryview, epoch: int
) -> Change:
    """Make one change of two keyslots that were added one after the other: the header gets both, or neither.

    ``key`` is the first's: that it opens the header that comes of both is proved as well. Raises DiskError.
    """
    prove(second.after, cryptsetup, key, epoch)
    before, raw = first.before, second.after.raw
    return Change(before, second.after, second.slot, (*_areas(before, raw), *_copies(before, raw)))


def reseal(
    image: Image, cryptsetup: Cryptsetup, *, key: bytes | memoryview, epoch: int, salts: Salts
) -> Change:
    """Give the keyslot of an unlock key a new token over the header as it is now.

    Raises DiskError, also if the key opens no keyslot; nothing was written then.
    """
    slot = slot_of(image, cryptsetup, key)
    if slot is None:
        raise _refusal("volume.prove", "a keyslot that this volume's unlock key opens", "none")
    return _sealed(image, image, cryptsetup, slot, key, epoch, salts)


def remove_key(image: Image, slot: str, salts: Salts) -> Change:
    """Remove a keyslot with its token; its area is overwritten after both copies of the header are without it.

    Raises DiskError if there is no such keyslot or no other.
    """
    others = set(image.header.json["keyslots"]) - {slot}
    if not others or slot not in image.header.json["keyslots"]:
        raise _refusal(
            "volume.keyslot", f"keyslot {slot} and another", f"keyslots {', '.join(sorted(others))}"
        )
    document = _copied(image.header)
    at, size = area_of(document["keyslots"].pop(slot))
    document["digests"]["0"]["keyslots"].remove(slot)
    document["tokens"] = {
        name: one for name, one in document["tokens"].items() if slot not in one["keyslots"]
    }
    after = _built(image, document, image.raw, salts)
    wiped = after.raw[:at] + bytes(size) + after.raw[at + size :]
    writes = (*_copies(image, after.raw), (at, bytes(size)))
    return Change(image, replace(after, raw=wiped), slot, writes)


def slot_of(image: Image, cryptsetup: Cryptsetup, key: bytes | memoryview) -> str | None:
    """Give the keyslot that a key opens, or None. Sealed keyslots and cheap derivations are tried first."""
    keyslots: dict[str, Any] = image.header.json["keyslots"]
    sealed = luks2_guard.tied(image.header)
    ordered = sorted(
        keyslots, key=lambda one: (one not in sealed, keyslots[one]["kdf"]["type"] != "pbkdf2", int(one))
    )
    for slot in ordered:
        alone = luks2_guard.alone(image.header, slot)
        if _opens(image, cryptsetup, alone, area_of(keyslots[slot]), key):
            return slot
    return None


def has_volume_key(image: Image, cryptsetup: Cryptsetup, volume_key: bytes | memoryview) -> bool:
    """Tell whether this is the volume key of a header, whatever opens it. Raises DiskError if that stays unknown.

    cryptsetup holds it against the digest of the segment, against which it holds what comes out of every keyslot, too. The
    digest itself is the host's to write, but one that two keys fit is not to be found.
    """
    code, meaning, _ = cryptsetup(
        [
            *("open", "--test-passphrase", "--type", "luks2", "--disable-external-tokens"),
            *("--volume-key-file", NEW_KEY, HEADER),
        ],
        size=len(image.raw),
        pieces=_judged(image),
        stdin=b"",
        new_key=volume_key,
    )
    if code not in {0, NO_KEY}:
        raise _refusal("volume.prove", "an answer about the volume key", meaning)
    return code == 0


def sealed_by(image: Image, key: bytes | memoryview) -> Guarded | None:
    """Tell whether a header is authenticated by this key, whatever its epoch."""
    try:
        return luks2_guard.authenticate(image.header, key, 0)
    except DiskError:
        return None


def prove(image: Image, cryptsetup: Cryptsetup, key: bytes | memoryview, epoch: int) -> None:
    """Open the volume as an agent would: guard, header in memory, key by pipe. Raises DiskError."""
    guarded = luks2_guard.choose(image.read, image.device_size, image.header.uuid, key, epoch)
    if not _opens(image, cryptsetup, guarded.memory, guarded.area, key):
        raise _refusal(
            "volume.prove", "a keyslot that opens with the key that was just added", "none that does"
        )


def require_unchanged(change: Change, read: Read) -> None:
    """Raise DiskError if the device's header is no longer what the change was made from."""
    if not hmac.compare_digest(read(0, len(change.before.raw)), change.before.raw):
        raise DiskError(
            "The volume's header has changed while it was being worked on.",
            code="volume.changed",
            expected="the header that was read",
            found="another",
            todo="See that nothing else changes it (cryptsetup, another enrolment), then run the command again.",
        )


def apply(change: Change, write: Write) -> None:
    """Write it. Cut off anywhere, one copy of the header is whole, and all that it points at."""
    for offset, data in change.writes:
        write(offset, data)


def _sealed(  # noqa: PLR0913 - as above, and what was done so far
    image: Image,
    work: Image,
    cryptsetup: Cryptsetup,
    slot: str,
    key: bytes | memoryview,
    epoch: int,
    salts: Salts,
) -> Change:
    """Put the token into ``work``, prove it, and plan how ``image`` becomes it."""
    document = _copied(work.header)
    document["keyslots"][slot]["priority"] = PREFERRED
    kept = [one for one in document["tokens"].values() if one["keyslots"] and slot not in one["keyslots"]]
    tokens = [*kept, luks2_guard.seal(work.header, slot, key, epoch)]
    document["tokens"] = {str(number): one for number, one in enumerate(tokens)}
    after = _built(image, document, work.raw, salts)
    prove(after, cryptsetup, key, epoch)
    return Change(image, after, slot, (*_areas(image, after.raw), *_copies(image, after.raw)))


def _judged(image: Image) -> Pieces:
    """Give what cryptsetup gets: twice the copy that ``load`` has judged, and the areas of keyslots.

    Of the device's two copies it would choose by a parser of its own, and the other may be the host's.
    """
    header = build(image.header, (b"", b""))
    return (0, header), (len(header), image.raw[len(header) :])


def _built(before: Image, document: dict[str, Any], raw: bytes, salts: Salts) -> Image:
    newest = max(one.seqid for one in copies(before.read) if isinstance(one, LuksHeader))
    header = replace(before.header, json=document, seqid=newest + 1, offset=0)
    check(header, before.device_size)
    built = build(header, salts)
    return Image(header, built + raw[len(built) :], frozenset({0, header.size}), before.device_size)


def _areas(before: Image, after: bytes) -> Iterator[tuple[int, bytes]]:
    """Give the blocks of keyslots that differ, joined where they touch. Raises DiskError if one is in use."""
    used = [area_of(one) for one in before.header.json["keyslots"].values()]
    start = stop = 2 * before.header.size
    for at in range(start, len(after), _BLOCK):
        if before.raw[at : at + _BLOCK] == after[at : at + _BLOCK]:
            continue
        if any(offset < at + _BLOCK and at < offset + size for offset, size in used):
            raise _refusal("luks.area", "keyslots in use untouched", f"a change at {at}")
        if at != stop:
            if start != stop:
                yield start, after[start:stop]
            start = at
        stop = min(at + _BLOCK, len(after))
    if start != stop:
        yield start, after[start:stop]


def _copies(before: Image, after: bytes) -> Iterator[tuple[int, bytes]]:
    """Give both copies of the header: first the one that nobody can rely on, else the secondary."""
    size = before.header.size
    for offset in sorted((0, size), key=lambda one: (one in before.whole, one != size)):
        yield offset, after[offset : offset + size]


def _opens(
    image: Image,
    cryptsetup: Cryptsetup,
    header: bytes,
    area: tuple[int, int],
    key: bytes | memoryview,
) -> bool:
    code, meaning, _ = cryptsetup(
        [
            *("open", "--test-passphrase", "--type", "luks2", "--disable-external-tokens"),
            *("--key-file", "-", HEADER),
        ],
        size=len(image.raw),
        pieces=((0, header), (area[0], image.read(*area))),
        stdin=key,
    )
    if code not in {0, NO_KEY}:
        raise _refusal("volume.prove", "an answer about the key", meaning)
    return code == 0


def _allowed(read: Read, device_size: int) -> list[LuksHeader]:
    """Give the copies that are allowed. Raises DiskError if none is."""
    found: list[LuksHeader] = []
    errors: list[DiskError] = []
    for copy in copies(read):
        try:
            if isinstance(copy, DiskError):
                raise copy
            found.append(check(copy, device_size))
        except DiskError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _copied(header: LuksHeader) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(header.json))
    return document


def _refusal(code: str, expected: str, found: str) -> DiskError:
    return DiskError("The volume's header is left as it is.", code=code, expected=expected, found=found)
