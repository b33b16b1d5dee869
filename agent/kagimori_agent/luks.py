"""Open a volume with its unlock key: find the device, judge its header, then hand the key to cryptsetup.

The key reaches cryptsetup through a pipe and no other way: not by argument, environment or file. It is written only
once the header was found authentic, and cryptsetup uses what was found so, from memory (THREATS T1, T17).

cryptsetup's choices that matter:

- The volume key goes to dm-crypt through the kernel keyring, as cryptsetup does by itself where it can: then the
  mapping's table holds a key's name, and `dmsetup table --showkeys` does not show the key. So no --disable-keyring.
- Tokens in a header are the host's words, and cryptsetup tries them before the key that it is given. The header in memory
  has none; --disable-external-tokens keeps it from loading libraries for them even so.
- Discards stay off, unless crypttab wants them: they tell the host which blocks are free. A volume with integrity takes
  none, and cryptsetup refuses to map one with them: there crypttab's word is passed over, and the console told so.

Import budget: ``subprocess``, ``selectors``, that of ``luks_header`` and that of ``config`` (loaded anyway).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final

from kagimori_agent.config import Volume
from kagimori_agent.luks_header import claimed, guarded
from kagimori_protocol.errors import DiskError, ImageError, KagimoriError, UsageError
from kagimori_protocol.luks2_allowed import has_integrity
from kagimori_protocol.luks2_guard import KEY_SIZE

DIRECTORIES: Final = (Path("/usr/sbin"), Path("/sbin"), Path("/usr/bin"), Path("/bin"))
"""Where cryptsetup is looked for; PATH is not asked."""
ENVIRONMENT: Final = {"LC_ALL": "C", "PATH": ":".join(map(str, DIRECTORIES))}
MAX_STDERR: Final = 2048
"""Bytes of cryptsetup's messages that are kept; the rest is read and dropped."""
ROOT: Final = Path("/")

_DISCARDS: Final = "--allow-discards"
_POLL_S: Final = 0.2
"""Seconds between two looks for a device that is not there yet."""
_REAP_S: Final = 5.0
"""Seconds that a killed cryptsetup gets to end: one that the host lets wait for its disk ends only with that."""
_MAY_APPEAR: Final = frozenset({"luks.no-device", "luks.read"})

_EXIT_CODES: Final = {
    # cryptsetup(8), RETURN CODES: code, what it says, what to do.
    1: ("luks.parameters", "cryptsetup refuses its arguments.", "Use cryptsetup 2.4 or newer in the image."),
    2: (
        "luks.wrong-key",
        "The key opens no keyslot of the volume.",
        "Either this is another disk, or its keyslot was changed: compare with a backup of the header.",
    ),
    3: (
        "luks.memory",
        "cryptsetup has too little memory.",
        "Give the keyslot a KDF of less memory (pbkdf2 will do).",
    ),
    4: (
        "luks.wrong-device",
        "cryptsetup cannot use the device.",
        "See whether the device is there and complete.",
    ),
    5: (
        "luks.busy",
        "The device is in use, or the mapping exists.",
        "See `dmsetup ls --tree` for who holds it.",
    ),
}
_TODO_INTEGRITY: Final = (
    "See that the kernel has dm-integrity and authenc (`modprobe -a dm-integrity authenc`), and what it says (`dmesg`). "
    "If it has both, the host has changed or removed what dm-integrity keeps on the disk: restore that from a backup."
)
_INTEGRITY: Final = dict.fromkeys(
    (1, 4), ("luks.integrity", "The volume's integrity cannot be set up.", _TODO_INTEGRITY)
)
"""What the same codes come from where the header is in order and says integrity; cryptsetup itself says little of it."""


def has_device_mapper(root: Path = ROOT) -> bool:
    """Tell whether the kernel has device-mapper. Opening its node loads the module, if that is not there yet."""
    if _in_proc_misc(root):
        return True
    with contextlib.suppress(OSError), (root / "dev/mapper/control").open("rb", buffering=0):
        pass
    return _in_proc_misc(root)


def find_device(volume: Volume, root: Path = ROOT) -> Path:
    """Give the one device that carries this volume's header.

    ``volume.device`` if that is set, else the only one among all block devices. Raises DiskError: none, more than
    one, or another volume's. A device whose header is damaged counts, so that choosing is never guessing.
    """
    if volume.device is not None:
        _require_uuid(volume, volume.device, claimed(volume.device))
        return volume.device
    seen: list[Path] = []
    candidates: list[Path] = []
    for device in _block_devices(root):
        try:
            uuid = claimed(device)
        except DiskError:
            continue  # such as an empty drive: what cannot be read is not opened either
        seen.append(device)
        if uuid == volume.uuid:
            candidates.append(device)
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise DiskError(
            f"More than one device claims to be volume {volume.name}.",
            code="luks.ambiguous",
            expected=f"one LUKS2 header with UUID {volume.uuid}",
            found=", ".join(map(str, candidates)),
            todo="Detach the copies, or set `device` in agent.toml (as for members of a multipath or RAID).",
        )
    raise DiskError(
        f"There is no device with volume {volume.name}.",
        code="luks.no-device",
        expected=f"a block device whose LUKS2 header has UUID {volume.uuid}",
        found=f"not on {', '.join(map(str, seen))}" if seen else "no block device that can be read",
        todo="See that the disk is attached, and that the image has its driver (such as virtio_blk).",
    )


def open_volume(  # noqa: PLR0913 - what, by what, and what a caller may want otherwise
    volume: Volume,
    key: bytes | memoryview,
    *,
    header_epoch: int,
    prove: bool,
    timeout_s: float,
    say: Callable[[str], None],
    flags: Sequence[str] = (),
    root: Path = ROOT,
) -> str:
    """Open a volume and return "mapped"; with ``prove`` only try the key, map nothing, and return "proved".

    ``header_epoch`` is the least that the header may be of. ``timeout_s`` seconds are for all of it: a device that is not
    there yet is waited for. ``flags`` are cryptsetup's for the mapping. A mapping that is active already is refused, even
    under this name and UUID: a host can plant a volume with a copied UUID and its own passphrase, and whoever opened it
    did not use our key (THREATS T2). Raises UsageError (size of the key), ImageError (no device-mapper, no cryptsetup, no
    memory), DiskError (everything else).
    """
    deadline = time.monotonic() + timeout_s
    if len(key) != KEY_SIZE:
        raise UsageError(
            "An unlock key has the wrong size; it is never padded or cut.",
            code="luks.key-size",
            expected=f"{KEY_SIZE} bytes",
            found=f"{len(key)} bytes",
        )
    if not prove:
        _require_device_mapper(root)
        _require_unmapped(volume, root)
    device = _await_device(volume, root, deadline)
    # The header first, then the key.
    with guarded(device, volume.uuid, key, header_epoch) as (found, memory):
        for note in found.notes:
            say(f"{volume.name}: {note}")
        if has_integrity(found.header) and _DISCARDS in flags:
            say(
                f"{volume.name}: crypttab's discard is passed over: a volume with integrity takes no discards"
            )
            flags = [flag for flag in flags if flag != _DISCARDS]
        arguments = [
            str(cryptsetup()),
            "open",
            *("--type", "luks2"),
            "--batch-mode",
            "--disable-external-tokens",
            *("--header", f"/proc/self/fd/{memory}"),
            *("--key-file", "-"),
            *("--keyfile-size", str(KEY_SIZE)),
            *(["--test-passphrase", str(device)] if prove else [*flags, str(device), volume.name]),
        ]
        code, messages = _run(arguments, key, deadline, memory)
    if code != 0:
        raise _failure(volume, code, messages, integrity=has_integrity(found.header))
    if prove:
        return "proved"
    if not _is_active(volume, root):
        raise DiskError(
            f"cryptsetup has not mapped {volume.name}, though it says so.",
            code="luks.not-mapped",
            expected=f"an active mapping {volume.name} with {_mapping_uuid(volume)}",
            found="none in /sys/class/block",
            todo="See that sysfs is mounted on /sys.",
        )
    return "mapped"


def _await_device(volume: Volume, root: Path, deadline: float) -> Path:
    """Find the device as soon as it is there; raise what ``find_device`` says when time is up."""
    while True:
        try:
            return find_device(volume, root)
        except DiskError as error:
            if error.code not in _MAY_APPEAR or time.monotonic() + _POLL_S > deadline:
                raise
        time.sleep(_POLL_S)


def _in_proc_misc(root: Path) -> bool:
    try:
        text = (root / "proc/misc").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any(line.split()[1:] == ["device-mapper"] for line in text.splitlines())


def _require_device_mapper(root: Path) -> None:
    if not has_device_mapper(root):
        raise ImageError(
            "The kernel has no device-mapper, so no volume can be mapped.",
            code="luks.no-dm",
            expected="device-mapper in /proc/misc",
            found="none",
            todo="Build the kernel with CONFIG_DM_CRYPT, or put dm-mod and dm-crypt into the initramfs.",
        )


def _block_devices(root: Path) -> Iterator[Path]:
    classes = root / "sys/class/block"
    try:
        names = sorted(entry.name for entry in classes.iterdir())
    except OSError as error:
        raise ImageError(
            "The kernel's list of block devices cannot be read.",
            code="luks.no-sysfs",
            expected=str(classes),
            found=str(error.strerror),
            todo="mount -t sysfs sysfs /sys",
        ) from error
    return (root / "dev" / name.replace("!", "/") for name in names)  # sysfs writes cciss/c0d0 as cciss!c0d0


def _require_uuid(volume: Volume, device: Path, found: str | None) -> None:
    if found != volume.uuid:
        raise DiskError(
            f"{device} is not volume {volume.name}.",
            code="luks.other-volume",
            expected=f"a LUKS2 header with UUID {volume.uuid}",
            found="no LUKS2 header" if found is None else ascii(found),
            todo="Correct uuid or device in agent.toml, or attach the right disk.",
        )


def _mapping_uuid(volume: Volume) -> str:
    """Spell a mapping's UUID as libcryptsetup gives it to device-mapper (dm_prepare_uuid)."""
    return f"CRYPT-LUKS2-{volume.uuid.replace('-', '')}-{volume.name}"


def _require_unmapped(volume: Volume, root: Path) -> None:
    """Raise DiskError where something else has opened the volume, or what claims to be it, before us."""
    if _is_active(volume, root):
        raise DiskError(
            f"{volume.name} is open already, and not by its key from the verifier.",
            code="luks.mapping",
            expected=f"no mapping {volume.name} before the agent makes it",
            found=_mapping_uuid(volume),
            todo="See that nothing else in the initramfs opens this volume (crypttab, rd.luks, a prompt).",
        )


def _is_active(volume: Volume, root: Path) -> bool:
    """Tell whether exactly this mapping is active; raise DiskError if its name is another's, or its volume is."""
    prefix = f"CRYPT-LUKS2-{volume.uuid.replace('-', '')}-"
    for directory in sorted((root / "sys/class/block").glob("dm-*/dm")):
        try:
            name = (directory / "name").read_text(encoding="ascii", errors="replace").strip()
            uuid = (directory / "uuid").read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue  # it went away while we looked
        if (name, uuid) == (volume.name, _mapping_uuid(volume)):
            return True
        if name == volume.name or uuid.startswith(prefix):
            raise DiskError(
                f"Another mapping stands where {volume.name} should be.",
                code="luks.mapping",
                expected=f"no mapping {volume.name}, or one with {_mapping_uuid(volume)}",
                found=f"{name!a} with {uuid!a}",
                todo="See that nothing else in the initramfs opens this volume (crypttab, rd.luks).",
            )
    return False


def cryptsetup() -> Path:
    """Find cryptsetup in the fixed directories. Raises ImageError."""
    for directory in DIRECTORIES:
        path = directory / "cryptsetup"
        if os.access(path, os.X_OK):
            return path
    raise ImageError(
        "The image has no cryptsetup.",
        code="luks.no-cryptsetup",
        expected=f"cryptsetup in {', '.join(map(str, DIRECTORIES))}",
        found="none",
        todo="Put cryptsetup into the initramfs.",
    )


def _run(arguments: list[str], key: bytes | memoryview, deadline: float, header: int) -> tuple[int, str]:
    """Run cryptsetup with the key on its standard input; give its exit code and the start of its messages.

    It inherits the descriptor ``header``, at the same number.

    Raises DiskError if it has not ended by ``deadline``, and kills it then; ImageError if it cannot be started.
    """
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            bufsize=0,  # unbuffered, so that no copy of the key stays in a buffer
            cwd="/",
            env=ENVIRONMENT,
            pass_fds=(header,),
        )
    except OSError as error:
        raise ImageError(
            "cryptsetup cannot be started.",
            code="luks.no-cryptsetup",
            expected=f"{arguments[0]} with its libraries",
            found=str(error.strerror),
            todo="Put cryptsetup with all its libraries into the initramfs (`ldd` names them).",
        ) from error
    assert process.stdin is not None  # noqa: S101 - for the type checker; PIPE was asked for
    assert process.stderr is not None  # noqa: S101 - as above
    with process.stdin as stdin, process.stderr as stderr:
        try:
            with contextlib.suppress(BrokenPipeError):  # it failed before it read; its exit code tells why
                stdin.write(key)
            stdin.close()
            messages = _drain(stderr, deadline)
            process.wait(max(0.0, deadline - time.monotonic()))
        except (TimeoutError, subprocess.TimeoutExpired):
            raise DiskError(
                "cryptsetup takes too long.",
                code="luks.timeout",
                expected="an end within limits.cryptsetup_s",
                found="none",
                todo="Give the keyslot a cheaper KDF (pbkdf2 will do: the key is random), or raise the limit.",
            ) from None
        finally:
            process.kill()  # does nothing once it has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_REAP_S)
    printable = "".join(char if char.isprintable() else " " for char in messages.decode("ascii", "replace"))
    return process.returncode, printable.strip()


def _drain(pipe: IO[bytes], deadline: float) -> bytes:
    """Read a pipe to its end and keep MAX_STDERR bytes. Raises TimeoutError."""
    kept = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            part = os.read(pipe.fileno(), MAX_STDERR)
            if not part:
                return kept
            kept = (kept + part)[:MAX_STDERR]


def _failure(volume: Volume, code: int, messages: str, *, integrity: bool) -> KagimoriError:
    name, what, todo = (_EXIT_CODES | (_INTEGRITY if integrity else {})).get(
        code, ("luks.cryptsetup", "cryptsetup failed.", "See the kernel's messages (`dmesg`).")
    )
    return DiskError(
        f"{volume.name}: {what}",
        code=name,
        expected="cryptsetup to succeed",
        found=f"exit code {code}: {messages or 'no message'}" if code >= 0 else f"ended by signal {-code}",
        todo=todo,
    )
