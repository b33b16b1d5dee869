"""What enrolment asks of cryptsetup: keyslots of a LUKS2 header, on the owner's machine.

Secrets reach it through pipes only, never by argument, environment or file. The program is looked for in fixed
directories and gets a minimal environment, since whoever enrols is often root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING, Final

import msgspec

from kagimori_protocol.errors import DiskError, OperatorError
from kagimori_protocol.messages import Uuid

if TYPE_CHECKING:
    from pathlib import Path

CRYPTSETUP_S: Final = 120
"""How long one call may take: an existing keyslot's derivation may want seconds on a small machine."""
SEARCH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"

FAST_KEYSLOT: Final = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")
"""The unlock key is 32 uniform random bytes, so a slow derivation buys nothing: there is no guess that it could slow
down. The least that cryptsetup takes saves a second and a gigabyte at each boot."""

_NO_KEY: Final = 2
_MEANINGS: Final = {
    1: "it did not accept the parameters",
    _NO_KEY: "no keyslot opens with this passphrase",
    3: "it ran out of memory",
    4: "the device cannot be used",
    5: "the device is in use",
}


class _Header(msgspec.Struct, frozen=True):
    """The part of a LUKS2 header's JSON that is looked at here."""

    keyslots: dict[str, msgspec.Raw]
    tokens: dict[str, msgspec.Raw]


def luks2_uuid(device: Path) -> str:
    """Read the UUID of a LUKS2 header, in the form that agents ask by. Raises DiskError."""
    if not device.exists():
        raise _failed(device, "there", "volume.luks2", "a device or image", "no such file")
    if _run(device, "isLuks", "--type", "luks2", "--", str(device)).returncode != 0:
        raise DiskError(
            f"{device} is no LUKS2 volume.",
            code="volume.luks2",
            expected="a device or image with a LUKS2 header",
            found="none",
            todo="`cryptsetup convert --type luks2` turns a LUKS1 header into one.",
        )
    found = _output(device, "luksUUID", "--", str(device)).decode(errors="replace").strip()
    try:
        return msgspec.convert(found, Uuid)
    except msgspec.ValidationError as error:
        raise DiskError(
            f"{device} has another kind of UUID.",
            code="volume.uuid",
            expected="a UUID in lower case",
            found=ascii(found[:80]),
            todo="`cryptsetup luksUUID --uuid` gives it one.",
        ) from error


def keyslots(device: Path) -> frozenset[int]:
    """List the numbers of the keyslots in use. Raises DiskError, also for a header with tokens.

    cryptsetup tries tokens before the key that it is given, so that a passphrase in this machine's keyring would pass for
    the key; and agents open no volume that has any.
    """
    text = _output(device, "luksDump", "--dump-json-metadata", "--", str(device))
    try:
        header = msgspec.json.decode(text, type=_Header)
        slots = frozenset(map(int, header.keyslots))
    except (msgspec.MsgspecError, ValueError) as error:
        raise _failed(device, "read", "volume.header", "the header's JSON", str(error)) from error
    if header.tokens:
        raise DiskError(
            f"{device} has tokens in its header.",
            code="volume.tokens",
            expected="a header without tokens, or no agent opens the volume",
            found=f"token {', '.join(ascii(name[:20]) for name in sorted(header.tokens))}",
            todo=f"Look at `cryptsetup luksDump {device}`, then `cryptsetup token remove --token-id N {device}`.",
        )
    return slots


def opens(device: Path, key: bytes) -> bool:
    """Tell whether a keyslot opens with this key, without mapping anything. Raises DiskError if that stays unknown."""
    arguments = ("open", "--test-passphrase", "--type", "luks2", "--key-file", "-", "--", str(device))
    done = _run(device, *arguments, stdin=key)
    if done.returncode not in {0, _NO_KEY}:
        raise _failed(device, "tried", "volume.prove", "an answer about the key", _words(done))
    return done.returncode == 0


def add_keyslot(device: Path, passphrase: bytes, key: bytes) -> None:
    """Add a keyslot for ``key``, whose existing ``passphrase`` opens another, and let it be tried first.

    The passphrase comes on stdin, the key through a pipe of its own. Raises DiskError; keyslots may have changed then.
    """
    before = keyslots(device)
    reader, writer = os.pipe()
    try:
        os.write(writer, key)  # 32 bytes fit any pipe, so this never waits
        os.close(writer)
        done = _run(
            device,
            *("luksAddKey", "--batch-mode", *FAST_KEYSLOT, "--key-file", "-"),
            *("--new-keyfile-size", str(len(key)), "--", str(device), f"/dev/fd/{reader}"),
            stdin=passphrase,
            pass_fds=(reader,),
        )
    finally:
        os.close(reader)
    if done.returncode:
        raise DiskError(
            f"cryptsetup could not add a keyslot to {device}.",
            code="volume.keyslot",
            expected="a passphrase that opens the volume, and a free keyslot",
            found=_words(done),
            todo="Try again with a passphrase that opens the volume.",
        )
    for slot in keyslots(device) - before:
        # Tried first, or each boot would pay for the slow derivation of the keyslots before it.
        _output(device, "config", "--priority", "prefer", "--key-slot", str(slot), "--", str(device))


def remove_keyslots(device: Path, slots: frozenset[int]) -> None:
    """Remove keyslots that were just added beside others. Raises DiskError."""
    for slot in slots:
        _output(device, "luksKillSlot", "--batch-mode", "--", str(device), str(slot))


def _output(device: Path, *arguments: str) -> bytes:
    done = _run(device, *arguments)
    if done.returncode:
        raise _failed(device, "used", "volume.header", f"cryptsetup {arguments[0]} to work", _words(done))
    return done.stdout


def _run(
    device: Path, *arguments: str, stdin: bytes = b"", pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[bytes]:
    program = shutil.which("cryptsetup", path=SEARCH)
    if program is None:
        raise OperatorError(
            "cryptsetup is missing.",
            code="volume.cryptsetup",
            expected=f"the program cryptsetup in {SEARCH}",
            found="none",
            todo="Install it (Debian: cryptsetup-bin).",
        )
    try:
        return subprocess.run(
            [program, *arguments],
            input=stdin,
            capture_output=True,
            check=False,
            timeout=CRYPTSETUP_S,
            env={"PATH": SEARCH, "LC_ALL": "C"},
            pass_fds=pass_fds,
        )
    except subprocess.TimeoutExpired:
        raise _failed(
            device, "used", "volume.timeout", f"cryptsetup to end within {CRYPTSETUP_S} s", "it did not"
        ) from None
    except OSError as error:
        raise _failed(
            device, "used", "volume.cryptsetup", f"{program} to start", str(error.strerror)
        ) from error


def _words(done: subprocess.CompletedProcess[bytes]) -> str:
    """Say what cryptsetup's exit code means, and its own words in one bounded line."""
    meaning = _MEANINGS.get(done.returncode, f"exit code {done.returncode}")
    words = " ".join(done.stderr.decode(errors="replace").split())[:300]
    return f"{meaning}: {words}" if words else meaning


def _failed(device: Path, done: str, code: str, expected: str, found: str) -> DiskError:
    what = f"{device} is not there." if done == "there" else f"{device} cannot be {done}."
    return DiskError(what, code=code, expected=expected, found=found)
