"""Give volumes new volume keys: what their host may have kept of the old ones opens nothing any more.

cryptsetup does it, below a mapping that is in use (online), or on a volume that nothing has opened. It keeps a header by which the
passphrase opens the volume, but for a moment among its last writes, after which only the next run opens it. All other keyslots are gone afterwards: they hold the old volume key. So
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
import subprocess
from typing import TYPE_CHECKING, Final

from kagimori_agent import enrol_volumes, header_mirror, keyslots, signals
from kagimori_agent.luks import ENVIRONMENT, cryptsetup
from kagimori_protocol import luks2_settle, luks2_under_way
from kagimori_protocol.errors import DiskError, OperatorError
from kagimori_protocol.luks2_allowed import KEY_SIZE, has_integrity

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kagimori_agent.config import Volume
    from kagimori_agent.header_mirror import Mirror
    from kagimori_protocol.luks2_change import Image

RESILIENCE: Final = ("--resilience", "checksum")
"""Each block that is being changed has a checksum in the header first, so that a crash in it is repaired."""
_REENCRYPT: Final = ("reencrypt", *RESILIENCE)
NEW_KEY_SINCE_2_8: Final = "--new-volume-key-file"
"""Before, ``--volume-key-file`` named the new key; since then it names the key that the volume has."""
NEW_KEY_BEFORE: Final = "--volume-key-file"
WATCH_S: Final = 2
"""How often it is looked whether the disk still takes the header."""


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
    with signals.in_order():
        return _renewed(volumes, secrets, say)


def _renewed(
    volumes: Sequence[tuple[Volume, Path]], secrets: dict[str, bytes], say: Callable[[str], None]
) -> dict[str, bytes]:
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
    tidy(device)
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
    say(f"{device}: gets a new volume key; the VM must not reboot before this has ended")
    key = os.urandom(KEY_SIZE)
    reader, writer = os.pipe()
    try:
        os.write(writer, key)  # so few bytes fit any pipe
        os.close(writer)
        words = [*_REENCRYPT, "--key-slot", slot, *_new_key_option(), f"/proc/self/fd/{reader}"]
        _run(device, image, passphrase, words, (reader,))
    finally:
        os.close(reader)
    say(f"{device}: has a new volume key")
    return key


def end_begun(device: Path, passphrase: bytes, say: Callable[[str], None]) -> bool:
    """End a reencryption that is under way; tell whether there was one. Raises DiskError.

    What is under way is what the header says, and the host writes that: it is judged before cryptsetup does as it says.
    """
    tidy(device)
    image = _under_way(device)
    if image is None:
        return False
    say(
        f"{device}: a reencryption that somebody had begun goes on; the VM must not reboot before it has ended"
    )
    # Below a mapping in use it was repaired when that was made. cryptsetup does not resume before.
    if luks2_under_way.is_below_way(image.header) and enrol_volumes.mapped_name(image.header.uuid) is None:
        _run(device, image, passphrase, ["repair"], ())
        image = _under_way(device)
    if image is not None and luks2_under_way.is_written(image.header):
        with keyslots.opened(device) as disk:
            disk.put(luks2_settle.ended(image, keyslots.salts()), "Run the same command again.")
    elif image is not None:
        _run(device, image, passphrase, [*_REENCRYPT, "--resume-only"], ())
    say(f"{device}: a reencryption that somebody had begun is ended")
    return True


def _under_way(device: Path) -> Image | None:
    """Read and judge the header of a volume that is being reencrypted; None if it is not."""
    with keyslots.opened(device) as disk:
        return luks2_under_way.load(disk.read, disk.size)


def tidy(device: Path) -> None:
    """Take away what a run has left that was killed before cryptsetup had begun, or as it ended. Raises DiskError.

    An agent allows what a fresh volume has. The header as it was is not kept: one copy of it is whole at every moment, and
    opens the volume by the same.
    """
    with keyslots.opened(device) as disk:
        disk.put(luks2_settle.tidied(disk.read, disk.size, keyslots.salts()), "Run the same command again.")


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


def _run(device: Path, image: Image, passphrase: bytes, words: list[str], pass_fds: tuple[int, ...]) -> None:
    """Let cryptsetup work on a volume by the header that was judged, and by no other. Raises DiskError, ImageError."""
    command = [str(cryptsetup()), words[0], "--batch-mode", "--type", "luks2", *words[1:], "--key-file", "-"]
    if stat.S_ISBLK(_mode(device)):
        with header_mirror.mirrored(device, image) as mirror:
            command += ["--header", str(mirror.path), str(device)]
            _require_ended(device, _watched(command, passphrase, (*pass_fds, mirror.hold), mirror))
        return
    # A file is of whoever runs this: no host can change it between two looks, so that cryptsetup may read it itself. And there
    # is no mapping that it could look for.
    with keyslots.opened(device) as disk:
        judged = luks2_settle.rebuilt(image, keyslots.salts())
        disk.put(luks2_settle.settled(judged), "Run the same command again.")
    command += [*(["--force-offline-reencrypt"] if words[0] == "reencrypt" else []), str(device)]
    _require_ended(device, _watched(command, passphrase, pass_fds, None))
    tidy(device)


def _watched(
    command: list[str], passphrase: bytes, pass_fds: tuple[int, ...], mirror: Mirror | None
) -> subprocess.CompletedProcess[bytes]:
    """Run cryptsetup for as long as it takes; a write of the header that does not reach the disk ends it.

    Told to end, it has cryptsetup stop after the blocks that it is at: its header is as on the disk then.
    """
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        pass_fds=pass_fds,
    ) as process:
        try:
            messages = _messages(process, passphrase, mirror)
        except BaseException:
            process.terminate()
            _messages(process, None, mirror)
            raise
    return subprocess.CompletedProcess(command, process.returncode, b"", messages)


def _messages(process: subprocess.Popen[bytes], given: bytes | None, mirror: Mirror | None) -> bytes:
    """Wait for the end of cryptsetup; gives what it has said."""
    while True:
        try:
            return process.communicate(given, timeout=WATCH_S)[1]
        except subprocess.TimeoutExpired:
            given = None  # it has that by now
            if mirror is not None and mirror.broken():
                mirror.fail()


def _require_ended(device: Path, done: subprocess.CompletedProcess[bytes]) -> None:
    if done.returncode:
        raise DiskError(
            f"{device} was not reencrypted to its end.",
            code="enrol.reencrypt",
            expected="cryptsetup to end it",
            found=keyslots.words(done),
            todo="Run the same command again: it ends what was begun. Do that before the machine goes down.",
        )


def _new_key_option() -> tuple[str, ...]:
    """Name the option by which this cryptsetup takes the key that a volume gets."""
    known = keyslots.call([str(cryptsetup()), "--help"], b"").stdout
    if NEW_KEY_SINCE_2_8.encode() in known:
        return "--new-key-size", str(8 * KEY_SIZE), NEW_KEY_SINCE_2_8
    return (NEW_KEY_BEFORE,)


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
