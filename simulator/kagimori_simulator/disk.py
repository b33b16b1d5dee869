"""A LUKS2 volume in a file, made by the real cryptsetup: the disk of a simulated VM."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Final

from kagimori_protocol import luks2_change
from kagimori_protocol.errors import ImageError
from kagimori_protocol.luks2_guard import FIRST_EPOCH
from kagimori_verifier import luks_enrol

if TYPE_CHECKING:
    from pathlib import Path

VOLUME_BYTES: Final = 20 << 20
"""LUKS2 takes 16 MiB for its headers; the rest is there to be opened."""

_FAST: Final = ("--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000")


def make_volume(path: Path, passphrase: bytes) -> str:
    """Format a file as LUKS2 with one keyslot, as an installer would; returns its UUID. Raises ImageError.

    The derivation is fast because this passphrase is the simulator's; an installer's would be slow.
    """
    with path.open("wb") as file:
        file.truncate(VOLUME_BYTES)
    _cryptsetup(
        "luksFormat",
        "--batch-mode",
        "--type",
        "luks2",
        *_FAST,
        "--key-file",
        "-",
        str(path),
        secret=passphrase,
    )
    return _cryptsetup("luksUUID", str(path)).strip()


def seal(path: Path, key: bytes, epoch: int = FIRST_EPOCH) -> None:
    """Authenticate a volume's header by the unlock key that opens it, as `volume add` does. Raises KagimoriError."""
    with luks_enrol.opened(path) as disk:
        disk.write(
            luks2_change.reseal(
                disk.load(), luks_enrol.cryptsetup, key=key, epoch=epoch, salts=luks_enrol.salts()
            )
        )


def _cryptsetup(*arguments: str, secret: bytes = b"") -> str:
    try:
        done = subprocess.run(
            ["cryptsetup", *arguments], input=secret, capture_output=True, check=True, timeout=60
        )
    except FileNotFoundError as error:
        raise ImageError(
            "cryptsetup is missing.",
            code="simulator.cryptsetup",
            expected="the program cryptsetup",
            found="none",
        ) from error
    except subprocess.SubprocessError as error:
        stderr = getattr(error, "stderr", None) or b""
        raise ImageError(
            f"cryptsetup {arguments[0]} failed.",
            code="simulator.cryptsetup",
            expected="exit code 0",
            found=stderr.decode(errors="replace").strip() or str(error),
        ) from error
    return done.stdout.decode()
