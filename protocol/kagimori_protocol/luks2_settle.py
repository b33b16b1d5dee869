"""A LUKS2 header before and after a reencryption: tidied of what one has left, and in copies that say only what was judged.

Cut off after any of the writes that are planned here, one copy of the header is whole, and opens as before.

Import budget: that of ``luks2_change``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from kagimori_protocol.luks2_allowed import area_of, check
from kagimori_protocol.luks2_change import Image
from kagimori_protocol.luks2_layout import LuksHeader, build, copies

_DIGITS: Final = 19

if TYPE_CHECKING:
    from collections.abc import Container

    from kagimori_protocol.luks2_change import Pieces, Read, Salts


def tidied(read: Read, device_size: int, salts: Salts) -> Pieces:
    """Plan to take away what a run has left that was killed before cryptsetup had begun, or as it ended; nothing if nothing is.

    That is a keyslot of a volume key that no data is under, and a number other than 0 of the digest of the one that data is
    under. What opens the data opens it with either copy. Raises DiskError if the header would not be allowed even so.
    """
    found = [copy for copy in copies(read) if isinstance(copy, LuksHeader)]
    newest = max(found, key=lambda one: one.seqid) if found else None
    if newest is None or (document := _tidied(newest)) is None:
        return ()
    whole = {one.offset for one in found if replace(one, offset=newest.offset) == newest}
    return _rewritten(newest, document, whole, device_size, salts)


def ended(image: Image, salts: Salts) -> Pieces:
    """Plan the end of a reencryption whose data are all written, as a judged header says (``luks2_under_way.is_written``).

    cryptsetup does the same in several writes. Cut off between them it may not find its way: without the old key's keyslots it
    opens nothing, and with them it may take all data for not written yet. Raises DiskError.
    """
    document: dict[str, Any] = json.loads(json.dumps(image.header.json))
    segments = document["segments"]
    final = str(len(segments) - 1)
    (digest,) = (one for one in document["digests"].values() if final in one["segments"])
    document["digests"] = {"0": {**digest, "segments": ["0"]}}
    document["segments"] = {"0": {name: said for name, said in segments[final].items() if name != "flags"}}
    gone = [name for name in document["keyslots"] if name not in digest["keyslots"]]
    _drop(document, gone)
    del document["config"]["requirements"]
    return _rewritten(image.header, document, image.whole, image.device_size, salts)


def _rewritten(
    before: LuksHeader, document: dict[str, Any], whole: Container[int], device_size: int, salts: Salts
) -> Pieces:
    """Plan both copies anew, the one first that is not ``whole``, and the areas of keyslots that are gone."""
    header = check(replace(before, json=document, seqid=before.seqid + 1, offset=0), device_size)
    raw = build(header, salts)
    gone = [one for name, one in before.json["keyslots"].items() if name not in document["keyslots"]]
    order = sorted((0, header.size), key=lambda at: (at in whole, at == 0))
    return (*((at, raw[at : at + header.size]) for at in order), *_wiped(header, gone))


def rebuilt(image: Image, salts: Salts, digest: str | None = None) -> Image:
    """Make both copies of a header anew from its judged one; ``whole`` are still those that the device has so.

    ``digest`` is the number that its one digest gets, for the header of a mapping that knows its key by another than 0.
    """
    header = replace(image.header, offset=0)
    if digest is not None:
        (only,) = header.json["digests"].values()
        header = replace(header, json={**header.json, "digests": {digest: only}})
    built = build(header, salts)
    return replace(image, raw=built + image.raw[len(built) :])


def settled(image: Image) -> Pieces:
    """Plan the copies of a header that do not say what its judged one says: nothing if both do."""
    size = image.header.size
    return tuple((at, image.raw[at : at + size]) for at in (size, 0) if at not in image.whole)


def _tidied(header: LuksHeader) -> dict[str, Any] | None:
    """Give what a header should say; None if it says that, or is of no kind that a run leaves."""
    document: dict[str, Any] = json.loads(json.dumps(header.json))
    config, digests, keyslots = (document.get(name) for name in ("config", "digests", "keyslots"))
    if not isinstance(config, dict) or config.get("requirements"):
        return None  # a reencryption is under way: that is ended, and not tidied
    if not isinstance(digests, dict) or not isinstance(keyslots, dict) or list(digests) == ["0"]:
        return None
    unused = [one for one in digests.values() if isinstance(one, dict) and one.get("segments") == []]
    used = [one for one in digests.values() if one not in unused]
    if len(used) != 1:
        return None
    named = [slot for one in unused if isinstance(one.get("keyslots"), list) for slot in one["keyslots"]]
    _drop(document, named)
    document["digests"] = {"0": used[0]}
    return document


def _drop(document: dict[str, Any], slots: list[Any]) -> None:
    """Take keyslots out of a header, and out of its tokens."""
    for slot in slots:
        if isinstance(slot, str):
            document["keyslots"].pop(slot, None)
    tokens = document.get("tokens")
    for token in tokens.values() if isinstance(tokens, dict) else ():
        if isinstance(token, dict) and isinstance(token.get("keyslots"), list):
            token["keyslots"] = [slot for slot in token["keyslots"] if slot not in slots]


def _wiped(header: LuksHeader, gone: list[Any]) -> Pieces:
    """Overwrite areas of keyslots that are gone, where nothing that is left lies on them."""
    kept = [(0, 2 * header.size), *(area_of(one) for one in header.json["keyslots"].values())]
    end = 2 * header.size + int(header.json["config"]["keyslots_size"])
    wiped = []
    for keyslot in gone:
        area = keyslot.get("area") if isinstance(keyslot, dict) else None
        places = [area.get(name) if isinstance(area, dict) else None for name in ("offset", "size")]
        if not all(
            isinstance(one, str) and one.isascii() and one.isdecimal() and len(one) < _DIGITS
            for one in places
        ):
            continue
        at, size = (int(str(one)) for one in places)
        if at + size <= end and not any(at < one + more and one < at + size for one, more in kept):
            wiped.append((at, bytes(size)))
    return tuple(wiped)
