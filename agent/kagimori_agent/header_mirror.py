"""A header that cryptsetup reads from memory and writes to memory and disk: what was judged is what it works by (ADR 12).

The host owns the disk, and may show another header at each look. cryptsetup looks many times while it reencrypts a volume, and
rewrites the data as the header says. So it gets one of ours, as ``--header``: a device whose reads come from memory alone, and
whose every write is on the disk, too, before cryptsetup goes on. A power cut leaves there what it leaves of any
reencryption, and the passphrase opens that.

::

    /dev/mapper/kagimori-header-UUID   dm-mirror, in sync from the start: it reads from its first leg
        loop over a memfd              what was judged
        loop over the device           header and keyslots, up to the data

dm-mirror (``handle_errors``) lets nobody go on whose write has not reached both legs: the write waits, and ``Mirror.fail`` has it
fail. A loop device, unlike dm-linear, does not claim the device: cryptsetup would take it for a volume in use.

Import budget: that of ``keyslots`` and of ``enrol_volumes``, and ``mmap``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import struct
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_agent import keyslots, luks, signals
from kagimori_agent.enrol_volumes import mapped_name
from kagimori_protocol import luks2_settle, luks2_under_way
from kagimori_protocol.errors import DiskError, ImageError, OperatorError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kagimori_protocol.luks2_change import Image

ROOT: Final = Path("/")
MAPPED: Final = Path("/dev/mapper")
NAME: Final = "kagimori-header-"
DM_UUID: Final = "KAGIMORI-HEADER-"
"""How the names of a mirror begin; the volume's UUID follows."""
DMSETUP_S: Final = 60
SECTOR: Final = 512
BLOCK: Final = 4096
REGION: Final = 1024
"""Sectors that dm-mirror takes for one, a power of two."""
GONE_S: Final = 10
"""How long udev may go on looking at a loop device that is not needed any more."""

# linux/loop.h: ioctls, flags, loop_config with loop_info64 (device, inode, rdevice, offset, sizelimit, number, encrypt_type,
# encrypt_key_size, flags, file_name, crypt_name, encrypt_key, init).
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_AUTOCLEAR: Final = 4
_DIRECT_IO: Final = 16
_CONFIG: Final = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 64s")
_TRIES: Final = 100
_POLL_S: Final = 0.1
_BROKEN_LEG: Final = "D"


@dataclass(frozen=True)
class Mirror:
    """``path`` is what cryptsetup gets; whoever inherits ``hold`` keeps the device from being removed by another run."""

    path: Path
    hold: int

    def broken(self) -> bool:
        """Tell whether a write has not reached the disk, and waits."""
        words = _dmsetup("status", self.path.name).split()
        # START LENGTH mirror 2 DEVICE DEVICE IN-SYNC/ALL 1 HEALTH ...; of another kind once it was made to fail
        return words[2] == "mirror" and _BROKEN_LEG in words[8]

    def fail(self) -> None:
        """Let that write fail, and all that follow."""
        _dmsetup("wipe_table", "--nolockfs", self.path.name)


@contextlib.contextmanager
def mirrored(device: Path, image: Image) -> Iterator[Mirror]:
    """Mirror the header of an image, whose copies are made anew from what was judged; on the way out the disk has it.

    A mapping in use knows its volume key by the number of its digest, so the header has that number meanwhile, and 0 again once
    it is at rest. Raises ImageError "enrol.reencrypt-header" if this system cannot, DiskError.
    """
    size = len(image.raw)
    if size % BLOCK:
        raise DiskError(
            f"{device} cannot be reencrypted.",
            code="luks.area",
            expected=f"keyslots that end at a multiple of {BLOCK} bytes",
            found=f"an end at {size}",
            todo="Compare with `cryptsetup luksDump`: cryptsetup makes no other.",
        )
    name = NAME + image.header.uuid
    with contextlib.ExitStack() as ways_out:
        try:
            digest = None if luks2_under_way.is_under_way(image.header) else _known_as(image.header.uuid)
            memory = _memory(luks2_settle.rebuilt(image, keyslots.salts(), digest).raw, ways_out)
            disk = os.open(device, os.O_RDWR | os.O_CLOEXEC)
            ways_out.callback(os.close, disk)
            legs = [_loop(memory, size, 0, ways_out), _loop(disk, size, _DIRECT_IO, ways_out)]
            table = (
                f"0 {size // SECTOR} mirror core 2 {REGION} nosync 2 {legs[0]} 0 {legs[1]} 0 1 handle_errors"
            )
            _dmsetup("create", name, "--uuid", DM_UUID + image.header.uuid, "--table", table)
        except (OSError, DiskError) as error:
            found = error.found if isinstance(error, DiskError) else str(error.strerror)
            raise ImageError(
                f"The header of {device} cannot be kept from the host while the volume is reencrypted. Nothing was changed.",
                code="enrol.reencrypt-header",
                expected="a kernel with loop devices and dm-mirror (CONFIG_BLK_DEV_LOOP, CONFIG_DM_MIRROR), and dmsetup",
                found=found,
                todo="Boot a kernel of the distribution's, which has both. Or run `enrol` without --reencrypt: verdicts go on "
                "saying that the host may know the volume key.",
            ) from error
        ways_out.callback(_dmsetup, "remove", "--retry", name)
        path = MAPPED / name
        hold = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield Mirror(path, hold)
        finally:
            with signals.unheeded():  # it is short, and must be done whole
                os.close(hold)
                try:
                    _write_down(device, _at_rest(os.pread(memory, size, 0), image.device_size), disk)
                finally:
                    ways_out.close()


def remove_left(root: Path = ROOT) -> None:
    """Remove what a killed run has left behind. Raises OperatorError if it, or its cryptsetup, still runs."""
    for directory in sorted((root / "sys/class/block").glob("dm-*/dm")):
        try:
            uuid, name = (
                (directory / one).read_text(encoding="ascii", errors="replace").strip()
                for one in ("uuid", "name")
            )
        except OSError:
            continue  # it went away while we looked
        if not uuid.startswith(DM_UUID):
            continue
        try:
            _dmsetup("remove", "--retry", name)
        except DiskError as error:
            raise OperatorError(
                "A reencryption of another run still goes on.",
                code="enrol.reencrypt-runs",
                expected=f"no device {name}, or one that nothing uses",
                found=error.found,
                todo="Wait until its cryptsetup has ended (`pgrep -a cryptsetup`), then run the same command again.",
            ) from error


def _memory(raw: bytes, ways_out: contextlib.ExitStack) -> int:
    """Give a file in memory with this content, which keeps its size and, where memory may be locked, is in no swap."""
    file = os.memfd_create("luks-header", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    ways_out.callback(os.close, file)
    os.ftruncate(file, len(raw))
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    mapped = mmap.mmap(file, len(raw))  # memory.lock_memory counts for what is mapped
    ways_out.callback(mapped.close)
    mapped[:] = raw
    return file


def _loop(file: int, size: int, flags: int, ways_out: contextlib.ExitStack) -> Path:
    """Give a loop device over the start of a file. It goes with its last user. Raises OSError."""
    info = (0, 0, 0, 0, size, 0, 0, 0, _AUTOCLEAR | flags, b"kagimori", b"", b"", 0, 0)
    config = _CONFIG.pack(file, 0, *info, b"")
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            path = Path(f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}")
            loop = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                # A lock keeps udev from looking, which would find the volume's UUID there.
                fcntl.flock(loop, fcntl.LOCK_EX | fcntl.LOCK_NB)
                fcntl.ioctl(loop, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(loop)
                # Somebody was faster, or udev looks at a device that was only just made.
                if error.errno not in {errno.EBUSY, errno.EWOULDBLOCK}:
                    raise
                time.sleep(_POLL_S)
                continue
            ways_out.callback(_await_gone, path)
            ways_out.callback(os.close, loop)
            return path
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "every loop device is in use")


def _await_gone(path: Path) -> None:
    """Wait until a loop device shows its file no more: the volume's UUID has to be on one device when it is looked for."""
    backing = ROOT / "sys/class/block" / path.name / "loop/backing_file"
    deadline = time.monotonic() + GONE_S
    while backing.exists() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _known_as(uuid: str) -> str | None:
    """Give the number of the digest by which the mapping of a volume knows its key; None without a mapping."""
    name = mapped_name(uuid, ROOT)
    found = re.search(rf":cryptsetup:{uuid}-d([0-9]{{1,2}}) ", _dmsetup("table", name)) if name else None
    return found[1] if found else None


def _at_rest(raw: bytes, device_size: int) -> bytes:
    """Give the digest of a header the number 0, if it is the only one."""
    after = bytearray(raw)
    # A header that no agent would allow stays as it is, and is refused by name when it is looked at next.
    with contextlib.suppress(DiskError):
        for at, data in luks2_settle.tidied(
            lambda offset, size: raw[offset : offset + size], device_size, keyslots.salts()
        ):
            after[at : at + len(data)] = data
    return bytes(after)


def _write_down(device: Path, raw: bytes, disk: int) -> None:
    """Let the disk have what memory has, wherever it differs: the host may have changed what cryptsetup never read.

    Keyslots come first, then the header's copies, the secondary before the primary. Raises DiskError.
    """
    try:
        for at in range(len(raw) - BLOCK, -1, -BLOCK):
            block = raw[at : at + BLOCK]
            if os.pread(disk, BLOCK, at) != block:
                keyslots.write(disk, at, block)
    except OSError as error:
        raise DiskError(
            f"The header of {device} was not written to its end.",
            code="enrol.write",
            expected="a device that can be written",
            found=str(error.strerror),
            todo="Run the same command again: it ends what was begun. Do that before the machine goes down.",
        ) from error


def _dmsetup(*words: str) -> str:
    """Run dmsetup, and give what it says. Raises DiskError."""
    program = next((one / "dmsetup" for one in luks.DIRECTORIES if os.access(one / "dmsetup", os.X_OK)), None)
    if program is None:
        raise _not_done(words, f"no dmsetup in {', '.join(map(str, luks.DIRECTORIES))}")
    try:
        done = subprocess.run(
            [str(program), *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=DMSETUP_S,
            env=luks.ENVIRONMENT,
        )
    except subprocess.TimeoutExpired:
        raise _not_done(words, f"no end within {DMSETUP_S} s") from None
    except OSError as error:
        raise _not_done(words, str(error.strerror)) from error
    if done.returncode:
        raise _not_done(words, " ".join(done.stderr.decode(errors="replace").split())[:300])
    return done.stdout.decode(errors="replace")


def _not_done(words: tuple[str, ...], found: str) -> DiskError:
    return DiskError(
        f"dmsetup {words[0]} failed.",
        code="enrol.dmsetup",
        expected="device-mapper to do it",
        found=found,
        todo="See the kernel's messages (`dmesg`); `dmsetup ls --tree` shows what is there.",
    )
