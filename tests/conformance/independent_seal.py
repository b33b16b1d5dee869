#!/usr/bin/env python3
"""Another sealer, written from docs/protocol.md and docs/conformance.md alone: it shares no code with ours.

::

    cryptsetup luksDump --dump-json-metadata DISK | independent_seal.py --uuid UUID --slot N --key-file FILE [--epoch 1]

It prints the token that `cryptsetup token import --json-file -` takes.
"""

from __future__ import annotations

import argparse
import hmac
import json
import sys
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def token(header: dict[str, Any], uuid: str, slot: str, key: bytes, epoch: str) -> dict[str, Any]:
    """Authenticate what opening by one keyslot uses."""
    used = {
        "config": {name: header["config"][name] for name in ("json_size", "keyslots_size")},
        "digests": {"0": {**header["digests"]["0"], "keyslots": [slot]}},
        "keyslots": {
            slot: {name: value for name, value in header["keyslots"][slot].items() if name != "priority"}
        },
        "segments": header["segments"],
        "tokens": {},
    }
    content = {"epoch": epoch, "header": used, "uuid": uuid}
    text = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    mac_key = HKDF(hashes.SHA256(), 32, None, b"kagimori/1/header-mac").derive(key)
    mac = hmac.digest(mac_key, b"kagimori/1/header\0" + text, "sha256")
    return {"type": "kagimori-header", "keyslots": [slot], "epoch": epoch, "mac": mac.hex()}


def main() -> None:
    """Read a header, print its token."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--uuid", required=True)
    parser.add_argument("--slot", required=True)
    parser.add_argument("--key-file", required=True, type=Path)
    parser.add_argument("--epoch", default="1")
    options = parser.parse_args()
    header = json.load(sys.stdin)
    made = token(header, options.uuid, options.slot, options.key_file.read_bytes(), options.epoch)
    sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
