"""Give a volume a new volume key: what its host may have kept of the old one opens nothing any more.

cryptsetup does it, below a mapping that is in use (online), or on a volume that nothing has opened. It keeps, at every moment,
a header by which the passphrase opens the volume, and goes on where it was interrupted. All other keyslots are gone
afterwards: they hold the old volume key. So this comes before an enrolment and not after one; while it runs, and until it has
ended, an agent refuses the header (``luks.requirements``), as an unfinished reencryption is a way to have data decrypted that
nobody wanted to be (CVE-2021-4122).

Import budget: that of ``keyslots``.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from kagimori_agent import keyslots
from kagimori_agent.luks import cryptsetup
from kagimori_protocol.errors import DiskError
from kagimori_protocol.luks2_layout import LuksHeader, build, copies

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

RESILIENCE: Final = ("--resilience", "checksum")
"""Each block that is being changed has a checksum in the header first, so that a crash in it is repaired."""


def reencrypt(device: Path, passphrase: bytes, say: Callable[[str], None]) -> None:
    """Reencrypt a volume to its end, beginning or resuming. Raises DiskError; the passphrase opens the volume then, too."""
    say(f"{device}: gets a new volume key; the VM must not reboot before this has ended")
    # Without a block device there is no mapping that cryptsetup could look for.
    offline = [] if stat.S_ISBLK(_mode(device)) else ["--force-offline-reencrypt"]
    words = [
        "reencrypt",
        "--batch-mode",
        "--type",
        "luks2",
        *RESILIENCE,
        *offline,
        "--key-file",
        "-",
        str(device),
    ]
    slot = _slot(device, passphrase)
    if slot is not None:
        words[1:1] = ["--key-slot", slot]
    done = keyslots.call([str(cryptsetup()), *words], passphrase, timeout_s=None)
    if done.returncode:
        raise DiskError(
            f"{device} was not reencrypted to its end.",
            code="enrol.reencrypt",
            expected="cryptsetup to end it",
            found=keyslots.words(done),
            todo="The passphrase opens it as before. Run the same command again: it goes on where it was.",
        )
    renumber(device)
    say(f"{device}: has a new volume key")


def renumber(device: Path) -> None:
    """Give the one digest of a header the number 0, which cryptsetup has not left it. Raises DiskError.

    An agent allows what a fresh volume has. Both copies are written, one after the other, as for any other change.
    """
    with keyslots.opened(device) as disk:
        found = [copy for copy in copies(disk.read) if isinstance(copy, LuksHeader)]
        if not found:
            disk.load()  # raises what is wrong with it
        header = max(found, key=lambda one: one.seqid)
        digests = header.json.get("digests")
        if not isinstance(digests, dict) or len(digests) != 1 or "0" in digests:
            return
        (digest,) = digests.values()
        document = {**header.json, "digests": {"0": digest}}
        raw = build(replace(header, json=document, seqid=header.seqid + 1, offset=0), keyslots.salts())
    try:
        file = os.open(device, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for offset in (header.size, 0):
                os.pwrite(file, raw[offset : offset + header.size], offset)
                os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise DiskError(
            f"{device} cannot be written.",
            code="enrol.write",
            expected="a device that can be written",
            found=str(error.strerror),
            todo="Run the same command again.",
        ) from error


def _mode(device: Path) -> int:
    try:
        return device.stat().st_mode
    except OSError as error:
        raise DiskError(
            f"{device} cannot be opened.",
            code="enrol.device",
            expected="a device or image with a LUKS2 header",
            found=str(error.strerror),
        ) from error


def _slot(device: Path, passphrase: bytes) -> str | None:
    """Give the keyslot that is kept; None while a reencryption is under way, which has chosen it."""
    with keyslots.opened(device) as disk:
        try:
            image = disk.load()
        except DiskError as error:
            if error.code in {"luks.requirements", "luks.flags"}:
                return None
            raise
    slot = keyslots.opens(image, passphrase)
    if slot is None:
        raise DiskError(
            f"{device} does not open with what was given.",
            code="enrol.passphrase",
            expected="a passphrase or key of one of its keyslots",
            found="one that opens none",
        )
    return slot
