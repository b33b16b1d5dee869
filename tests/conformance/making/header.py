"""Vectors of the token that authenticates a LUKS2 header: docs/protocol.md section 7, from its words."""

from __future__ import annotations

import base64
import copy
import hmac
import json
from collections.abc import Iterator
from typing import Any, Final

from tests.conformance.making import hpke
from tests.conformance.making.vector import Vector, given

Json = dict[str, Any]

UUID: Final = "6f1c1a58-8a52-4b7e-9c8c-0d6f3c7f2a11"
UNLOCK_KEY: Final = bytes(range(32))
OTHER_KEY: Final = bytes(range(32, 64))
SALT: Final = base64.b64encode(bytes(range(64, 96))).decode()
DIGEST: Final = base64.b64encode(bytes(range(96, 128))).decode()
SLASHES: Final = base64.b64encode(bytes([255]) * 32).decode()


def _keyslot(number: int) -> Json:
    return {
        "type": "luks2",
        "key_size": 64,
        "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
        "area": {
            "type": "raw",
            "offset": str(32768 + number * 258048),
            "size": "258048",
            "encryption": "aes-xts-plain64",
            "key_size": 64,
        },
        "kdf": {"type": "pbkdf2", "hash": "sha256", "iterations": 1000, "salt": SALT},
    }


HEADER: Final[Json] = {
    "keyslots": {"0": _keyslot(0), "1": _keyslot(1) | {"priority": 2}},
    "tokens": {},
    "segments": {
        "0": {
            "type": "crypt",
            "offset": "16777216",
            "size": "dynamic",
            "iv_tweak": "0",
            "encryption": "aes-xts-plain64",
            "sector_size": 4096,
        }
    },
    "digests": {
        "0": {
            "type": "pbkdf2",
            "keyslots": ["0", "1"],
            "segments": ["0"],
            "hash": "sha256",
            "iterations": 1000,
            "salt": SALT,
            "digest": DIGEST,
        }
    },
    "config": {"json_size": "12288", "keyslots_size": "16744448"},
}
"""A volume whose passphrase opens keyslot 0; keyslot 1 is for an unlock key."""


INTEGRITY: Final[Json] = {
    "type": "hmac(sha256)",
    "journal_encryption": "none",
    "journal_integrity": "none",
}
"""What `cryptsetup luksFormat --integrity hmac-sha256` writes into the segment."""


def reduced(header: Json, slot: str) -> Json:
    """Give what opening by one keyslot uses."""
    keyslot = dict(header["keyslots"][slot])
    keyslot.pop("priority", None)
    return {
        "config": {
            "json_size": header["config"]["json_size"],
            "keyslots_size": header["config"]["keyslots_size"],
        },
        "digests": {"0": {**header["digests"]["0"], "keyslots": [slot]}},
        "keyslots": {slot: keyslot},
        "segments": header["segments"],
        "tokens": {},
    }


def canonical(value: object) -> bytes:
    """Write JSON in the one form that is authenticated."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def mac(header: Json, slot: str, key: bytes, epoch: str, uuid: str = UUID) -> bytes:
    """Authenticate it."""
    content = {"epoch": epoch, "header": reduced(header, slot), "uuid": uuid}
    derived = hpke.expand(hpke.extract(b"", key), b"kagimori/1/header-mac", 32)
    return hmac.digest(derived, b"kagimori/1/header\0" + canonical(content), "sha256")


def token(header: Json, slot: str, key: bytes, epoch: str = "1", uuid: str = UUID) -> Json:
    """Make the token that goes into the header."""
    return {
        "type": "kagimori-header",
        "keyslots": [slot],
        "epoch": epoch,
        "mac": mac(header, slot, key, epoch, uuid).hex(),
    }


def sealed(header: Json, slot: str, key: bytes, epoch: str = "1", uuid: str = UUID) -> Json:
    """Give a header with that token beside those that it has."""
    made = copy.deepcopy(header)
    made["tokens"][str(len(made["tokens"]))] = token(header, slot, key, epoch, uuid)
    return made


def vectors() -> Iterator[Vector]:
    """Give all of them."""
    both = sealed(sealed(HEADER, "1", UNLOCK_KEY, "4"), "0", OTHER_KEY, "9")
    good = {
        "one-key": ("The token of one unlock key.", sealed(HEADER, "1", UNLOCK_KEY), 1),
        "later-epoch": (
            "A header may be newer than what is expected.",
            sealed(HEADER, "1", UNLOCK_KEY, "7"),
            3,
        ),
        "unsealed-expected": ("Epoch 0 expects any sealed header.", sealed(HEADER, "1", UNLOCK_KEY), 0),
        "two-keys": ("Each unlock key has its own token, with its own epoch.", both, 4),
        "escapes": (
            "A slash is not escaped in what is authenticated, though cryptsetup escapes it in the header.",
            sealed(_changed("digests", salt=SLASHES), "1", UNLOCK_KEY),
            1,
        ),
        "other-keyslot-removed": (
            "Keyslots that this key does not open do not count.",
            _without(sealed(HEADER, "1", UNLOCK_KEY), "0"),
            1,
        ),
        "integrity": (
            "A volume that its owner formatted with integrity: the volume key is of both keys.",
            sealed(_with_integrity(), "1", UNLOCK_KEY),
            1,
        ),
        "empty-flags": (
            "Empty flags and requirements say nothing.",
            _config(sealed(HEADER, "1", UNLOCK_KEY), flags=[], requirements={}),
            1,
        ),
    }
    for name, (about, header, epoch) in good.items():
        slot = "1"
        (entry,) = (one for one in header["tokens"].values() if one["keyslots"] == [slot])
        gives = {
            "slot": slot,
            "epoch": int(entry["epoch"]),
            "mac": entry["mac"],
            "memory": canonical(reduced(header, slot)).decode(),
        }
        yield _vector(name, about, header, epoch, gives=gives)
    yield from _refused()


def _refused() -> Iterator[Vector]:
    good = sealed(HEADER, "1", UNLOCK_KEY)
    no_token = "luks.unguarded"
    changed = {
        "no-token": ("A header without any token is nobody's.", HEADER, no_token),
        "other-key": ("Sealed by another unlock key.", sealed(HEADER, "1", OTHER_KEY), "luks.mac"),
        "other-volume": (
            "Sealed for another UUID.",
            sealed(HEADER, "1", UNLOCK_KEY, uuid=UUID.replace("6", "7")),
            "luks.mac",
        ),
        "other-slot": ("The token of another keyslot.", _retied(good, ["0"]), "luks.mac"),
        "raised-epoch": ("The epoch is authenticated.", _retoken(good, epoch="2"), "luks.mac"),
        "mac-flipped": (
            "One bit of the MAC.",
            _retoken(good, mac=f"{int(good['tokens']['0']['mac'], 16) ^ 1:064x}"),
            "luks.mac",
        ),
        "sector-size": (
            "The segment is authenticated.",
            _merged(good, "segments", sector_size=512),
            "luks.mac",
        ),
        "offset": ("So is where it begins.", _merged(good, "segments", offset="16781312"), "luks.mac"),
        "integrity-taken-away": (
            "And that a volume has integrity.",
            _without_integrity(sealed(_with_integrity(), "1", UNLOCK_KEY)),
            "luks.mac",
        ),
        "integrity-key-size": (
            "A volume key without the integrity's key.",
            _merged(good, "segments", integrity=INTEGRITY),
            "luks.value",
        ),
        "integrity-other": (
            "No integrity but one.",
            _merged(good, "segments", integrity={**INTEGRITY, "type": "hmac(sha512)"}),
            "luks.segment-integrity",
        ),
        "digest": ("And the digest.", _merged(good, "digests", digest=SALT), "luks.mac"),
        "digest-length": (
            "A digest is as long as its hash.",
            sealed(_changed("digests", digest=DIGEST[:40]), "1", UNLOCK_KEY),
            "luks.value",
        ),
        "digest-salt-length": (
            "Its salt has 32 bytes.",
            sealed(_changed("digests", salt=""), "1", UNLOCK_KEY),
            "luks.value",
        ),
        "keyslots-size": ("And sizes.", _config(good, keyslots_size="16740352"), "luks.mac"),
        "token-twice": (
            "A keyslot has one token.",
            {**good, "tokens": {"0": good["tokens"]["0"], "1": good["tokens"]["0"]}},
            "luks.tokens",
        ),
        "token-member": ("A token has no other members.", _retoken(good, more="x"), "luks.members"),
        "token-epoch-0": ("Epochs begin at 1.", _retoken(good, epoch="0"), "luks.tokens"),
        "token-mac-capitals": (
            "Hex in lower case.",
            _retoken(good, mac=good["tokens"]["0"]["mac"].upper()),
            "luks.tokens",
        ),
        "foreign-token": (
            "No tokens of other types.",
            {
                **good,
                "tokens": {
                    **good["tokens"],
                    "1": {"type": "luks2-keyring", "keyslots": ["1"], "key_description": "planted"},
                },
            },
            "luks.tokens",
        ),
    }
    for name, (about, header, fails) in changed.items():
        yield _vector(name, about, header, 1, fails=fails)
    about = "The owner has sealed this volume anew since."
    yield _vector("old-epoch", about, sealed(HEADER, "1", UNLOCK_KEY, "2"), 3, fails="luks.epoch")


def _vector(
    name: str, about: str, header: Json, epoch: int, *, gives: Json | None = None, fails: str | None = None
) -> Vector:
    inputs = given(uuid=UUID, unlock_key=UNLOCK_KEY, header_epoch=epoch)
    area = {"header.json": json.dumps(header, separators=(",", ":")).replace("/", "\\/").encode()}
    return Vector(f"header/{name}", about, inputs | area, gives, fails)


def _changed(part: str, **changes: object) -> Json:
    return _merged(HEADER, part, **changes)


def _merged(header: Json, part: str, **changes: object) -> Json:
    made = copy.deepcopy(header)
    made[part]["0"].update(changes)
    return made


def _with_integrity() -> Json:
    made = _merged(HEADER, "segments", integrity=INTEGRITY)
    for number, keyslot in enumerate(made["keyslots"].values()):
        keyslot["key_size"] = 64 + 32
        keyslot["area"] |= {"offset": str(32768 + number * 385024), "size": "385024"}
    return made


def _without_integrity(header: Json) -> Json:
    made = copy.deepcopy(header)
    del made["segments"]["0"]["integrity"]
    for keyslot in made["keyslots"].values():
        keyslot["key_size"] = 64
    return made


def _config(header: Json, **changes: object) -> Json:
    made = copy.deepcopy(header)
    made["config"].update(changes)
    return made


def _retoken(header: Json, **changes: object) -> Json:
    return _merged(header, "tokens", **changes)


def _retied(header: Json, slots: list[str]) -> Json:
    return _merged(header, "tokens", keyslots=slots)


def _without(header: Json, slot: str) -> Json:
    made = copy.deepcopy(header)
    del made["keyslots"][slot]
    made["digests"]["0"]["keyslots"].remove(slot)
    return made
