"""Give volumes new volume keys: what their host may have kept of the old ones opens nothing any more.

cryptsetup does it, below a mapping that is in use (online), or on a volume that nothing has opened. It keeps, at every moment,
a header by which the passphrase opens the volume. All other keyslots are gone afterwards: they hold the old volume key. So
this comes before an enrolment and not after one; while it runs, and until it has ended, an agent refuses the header
(``luks.requirements``), as an unfinished reencryption is a way to have data decrypted that nobody wanted to be
(CVE-2021-4122).

The new volume key is made here, and stays in memory until the volume is enrolled. The host owns the disk, and has headers of
before that the same passphrase opens: that a header is the one of the new key is known by the key, and by nothing else
(``keyslots.require_volume_key``). A run that ends what another had begun does not know it, and vouches for nothing.

Import budget: that of ``keyslots``.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from kagimori_agent import keyslots
from kagimori_agent.luks import cryptsetup
from kagimori_protocol.errors import DiskError, OperatorError
from kagimori_protocol.luks2_allowed import KEY_SIZE, has_integrity
from kagimori_protocol.luks2_layout import LuksHeader, build, copies

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kagimori_agent.config import Volume

RESILIENCE: Final = ("--resilience", "checksum")
"""Each block that is being changed has a checksum in the header first, so that a crash in it is repaired."""
NEW_KEY_SINCE_2_8: Final = "--new-volume-key-file"
"""Before, ``--volume-key-file`` named the new key; since then it names the key that the volume has."""
NEW_KEY_BEFORE: Final = "--volume-key-file"
_UNDER_WAY: Final = "online-reencrypt"
"""How cryptsetup's mark of a reencryption begins, in ``config.requirements.mandatory``; its version follows."""


def renew(
    volumes: Sequence[tuple[Volume, Path]],
    secret: Callable[[Volume, Path], bytes],
    say: Callable[[str], None],
) -> dict[str, bytes]:
    """Give each volume a new volume key; gives these, by UUID.

    A reencryption that an earlier run had begun is ended first. Raises OperatorError "enrol.resumed" then, as nobody knows
    its volume key, and DiskError.
    """
    for _, device in volumes:
        require_possible(device)
    secrets = {volume.uuid: secret(volume, device) for volume, device in volumes}
    if begun := [volume for volume, device in volumes if end_begun(device, secrets[volume.uuid], say)]:
        raise OperatorError(
            "A reencryption that an earlier run had begun is ended. Nothing is enrolled yet, and no code was spent.",
            code="enrol.resumed",
            expected="volume keys that this run has made, and knows",
            found=f"volume keys of an earlier run: {', '.join(volume.name for volume in begun)}",
            todo="Run `kagimori-agent enrol --reencrypt` again: it makes other volume keys, from the start. Or run `enrol` "
            "without it: verdicts go on saying that the host may know the volume key.",
        )
    return {volume.uuid: reencrypt(device, secrets[volume.uuid], say) for volume, device in volumes}


def reencrypt(device: Path, passphrase: bytes, say: Callable[[str], None]) -> bytes:
    """Reencrypt a volume from the start to the end, and give its new volume key. Raises DiskError.

    The passphrase opens the volume then, too.
    """
    require_possible(device)
    _tidy(device)
    slot = _slot(device, passphrase)
    key = os.urandom(KEY_SIZE)
    reader, writer = os.pipe()
    try:
        os.write(writer, key)  # so few bytes fit any pipe
        os.close(writer)
        words = ["--key-slot", slot, *_new_key_option(), f"/proc/self/fd/{reader}"]
        _run(device, passphrase, words, (reader,), say)
    finally:
        os.close(reader)
    return key


def end_begun(device: Path, passphrase: bytes, say: Callable[[str], None]) -> bool:
    """End a reencryption that is under way; tell whether there was one. Raises DiskError."""
    with keyslots.opened(device) as disk:
        if not _is_under_way(disk):
            return False
    _run(device, passphrase, ["--resume-only"], (), say)
    return True


def _run(
    device: Path, passphrase: bytes, words: list[str], pass_fds: tuple[int, ...], say: Callable[[str], None]
) -> None:
    say(f"{device}: gets a new volume key; the VM must not reboot before this has ended")
    # Without a block device there is no mapping that cryptsetup could look for.
    offline = [] if stat.S_ISBLK(_mode(device)) else ["--force-offline-reencrypt"]
    command = [
        *(str(cryptsetup()), "reencrypt", "--batch-mode", "--type", "luks2"),
        *(*RESILIENCE, *offline, *words, "--key-file", "-", str(device)),
    ]
    done = keyslots.call(command, passphrase, pass_fds, timeout_s=None)
    if done.returncode:
        raise DiskError(
            f"{device} was not reencrypted to its end.",
            code="enrol.reencrypt",
            expected="cryptsetup to end it",
            found=keyslots.words(done),
            todo="The passphrase opens it as before. Run the same command again: it ends what was begun.",
        )
    renumber(device)
    say(f"{device}: has a new volume key")


def _new_key_option() -> tuple[str, ...]:
    """Name the option by which this cryptsetup takes the key that a volume gets."""
    known = keyslots.call([str(cryptsetup()), "--help"], b"").stdout
    if NEW_KEY_SINCE_2_8.encode() in known:
        return "--new-key-size", str(8 * KEY_SIZE), NEW_KEY_SINCE_2_8
    return (NEW_KEY_BEFORE,)


def _tidy(device: Path) -> None:
    """Take away what a run has left that was killed before cryptsetup had begun, or as it ended. Raises DiskError.

    That is a keyslot of a volume key that no data is under: the new one, or the old one.
    """
    with keyslots.opened(device) as disk:
        digests = _newest(disk).get("digests")
    tied = digests.values() if isinstance(digests, dict) else ()
    unused = [one for one in tied if isinstance(one, dict) and one.get("segments") == []]
    named = [slot for one in unused if isinstance(one.get("keyslots"), list) for slot in one["keyslots"]]
    for slot in [slot for slot in named if isinstance(slot, str) and slot.isdecimal()]:
        command = [str(cryptsetup()), "luksKillSlot", "--batch-mode", "--", str(device), slot]
        done = keyslots.call(command, b"")
        if done.returncode:
            raise DiskError(
                f"{device} has a keyslot that a reencryption has left.",
                code="enrol.leftover",
                expected="cryptsetup to remove it",
                found=keyslots.words(done),
                todo=f"See what it is, then: cryptsetup luksKillSlot {device} {slot}.",
            )
    renumber(device)


def _is_under_way(disk: keyslots.Disk) -> bool:
    """Tell whether the newest copy of a header says that the volume is being reencrypted."""
    config = _newest(disk).get("config")
    requirements = config.get("requirements") if isinstance(config, dict) else None
    mandatory = requirements.get("mandatory") if isinstance(requirements, dict) else None
    return isinstance(mandatory, list) and any(str(one).startswith(_UNDER_WAY) for one in mandatory)


def _newest(disk: keyslots.Disk) -> Mapping[str, Any]:
    """Give the JSON of the newest copy of a header, of which nothing is verified; empty where there is none."""
    found = [copy for copy in copies(disk.read) if isinstance(copy, LuksHeader)]
    return max(found, key=lambda one: one.seqid).json if found else {}


def require_possible(device: Path) -> None:
    """Raise DiskError for a volume with integrity, which cryptsetup cannot reencrypt; nothing was changed then."""
    with keyslots.opened(device) as disk:
        try:
            image = disk.load()
        except DiskError:
            return  # what is wrong with it is told where it is opened, or mended
    if has_integrity(image.header):
        raise DiskError(
            f"{device} cannot be reencrypted: it has integrity.",
            code="enrol.reencrypt",
            expected="a volume without integrity, as cryptsetup reencrypts no other",
            found="`integrity` in the header's segment",
            todo="Enrol it without --reencrypt, and format it where the host cannot know the volume key: on your own "
            "machine, or in a VM that was attested, with the data copied over. Nothing was changed.",
        )


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


def _slot(device: Path, passphrase: bytes) -> str:
    """Give the keyslot that is kept."""
    with keyslots.opened(device) as disk:
        image = disk.load()
    slot = keyslots.opens(image, passphrase)
    if slot is None:
        raise DiskError(
            f"{device} does not open with what was given.",
            code="enrol.passphrase",
            expected="a passphrase or key of one of its keyslots",
            found="one that opens none",
        )
    return slot
