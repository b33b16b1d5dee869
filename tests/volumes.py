"""What a volume's header is, told by cryptsetup itself: nothing of ours looks."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path


def opens(image: Path, key: bytes) -> bool:
    """Tell whether a keyslot opens with this key."""
    command = ["cryptsetup", "open", "--test-passphrase", "--type", "luks2", "--key-file", "-", str(image)]
    return subprocess.run(command, input=key, capture_output=True, check=False).returncode == 0


def keyslots(image: Path) -> set[int]:
    """Give the numbers of the keyslots in use."""
    command = ["cryptsetup", "luksDump", "--dump-json-metadata", str(image)]
    done = subprocess.run(command, capture_output=True, check=True)
    return set(map(int, json.loads(done.stdout)["keyslots"]))


def dump(image: Path) -> str:
    """Give all that cryptsetup tells of a header."""
    return subprocess.run(
        ["cryptsetup", "luksDump", str(image)], capture_output=True, check=True
    ).stdout.decode()
