"""Serve a simulated /dev/sev-guest as a file by FUSE, so that unmodified code meets a real ioctl.

A mount whose root is a regular file, with a loop of our own on /dev/fuse: libfuse's ready-made operations drop what an ioctl
copies out as soon as it fails, and the driver's size negotiation lives from exactly that. FUSE passes the argument by the
size that its number carries (32 bytes); what that points to is read and written in the calling process
(process_vm_readv(2)), so this takes root. Where a kernel has CUSE, ``sev_guest_cuse`` serves the same logic as a device.

Source: include/uapi/linux/fuse.h, version 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import HardwareError
from kagimori_simulator.fuse_messages import (
    FOPEN_DIRECT_IO,
    IOCTL_IN,
    IOCTL_OUT,
    OPEN,
    OPEN_OUT,
    RELEASE,
    VERSION,
    Server,
)
from kagimori_simulator.fuse_mount import unmounted_at_end
from kagimori_simulator.sev_guest import ARGUMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kagimori_simulator.sev_guest import SevGuest

_MODE: Final = stat.S_IFREG | 0o600
_READY_S: Final = 10.0
_STOP_S: Final = 5.0
_MAX_WRITE: Final = 4096
_ROOT_NODE: Final = 1

_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2

_GETATTR, _FLUSH, _INIT = 3, 25, 26
_INIT_OUT: Final = struct.Struct("<IIIIHHIIHHI28x")
_ATTR_OUT: Final = struct.Struct("<QII6Q10I")


class _Part(ctypes.Structure):
    """A piece of memory: struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """The memory of a process (or thread) ``pid``. OSError with EFAULT where it has none."""

    pid: int

    def read(self, address: int, size: int) -> bytes:
        """Copy from the process."""
        local = ctypes.create_string_buffer(size)
        self._transfer("process_vm_readv", local, address, size)
        return local.raw

    def write(self, address: int, data: bytes) -> None:
        """Copy to the process."""
        self._transfer("process_vm_writev", ctypes.create_string_buffer(data, len(data)), address, len(data))

    def _transfer(self, call: str, local: ctypes.Array[ctypes.c_char], address: int, size: int) -> None:
        here, there = _Part(ctypes.addressof(local), size), _Part(address, size)
        one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
        libc = ctypes.CDLL(None, use_errno=True)
        # By the number of a pid_t, which ctypes passes as int; a count other than asked for is a hole in the memory.
        done = getattr(libc, call)(self.pid, ctypes.byref(here), one, ctypes.byref(there), one, none)
        if done != size:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


@contextlib.contextmanager
def mounted(driver: SevGuest, path: Path) -> Iterator[Path]:
    """Serve ``driver`` at the file ``path`` (made if absent); unmount whatever happens, also when this process dies.

    Raises HardwareError if the mount does not come up: it takes root and /dev/fuse.
    """
    path.touch(mode=0o600)
    try:
        descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _not_up(path, str(error.strerror)) from error
    with unmounted_at_end(path):
        options = f"fd={descriptor},rootmode={_MODE:o},user_id={os.getuid()},group_id={os.getgid()}"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"kagimori-simulator", os.fsencode(path), b"fuse", ctypes.c_ulong(0), options.encode()):
            os.close(descriptor)
            raise _not_up(path, os.strerror(ctypes.get_errno()))
        server = _Server(driver, descriptor)
        thread = threading.Thread(target=server.serve, name="kagimori-sev-guest", daemon=True)
        thread.start()
        try:
            if not server.ready.wait(_READY_S):
                raise _not_up(path, f"nothing within {_READY_S:.0f} s")
            yield path
        finally:
            libc.umount2(
                os.fsencode(path), _MNT_FORCE | _MNT_DETACH
            )  # also ends requests that are still held
            thread.join(_STOP_S)
            os.close(descriptor)


class _Server(Server):
    """Serves the driver as the root of a mount."""

    def __init__(self, driver: SevGuest, descriptor: int) -> None:
        super().__init__(descriptor)
        self.ready = threading.Event()
        self._driver = driver

    def ioctl(self, pid: int, body: bytes) -> tuple[int, bytes]:
        _, _, command, _, in_size, out_size = IOCTL_IN.unpack_from(body)
        argument = body[IOCTL_IN.size : IOCTL_IN.size + in_size]
        if in_size != out_size or in_size != ARGUMENT.size:  # a number of some other device
            return errno.ENOTTY, b""
        result, copied_out = self._driver.ioctl(command, argument, ProcessMemory(pid))
        return 0, IOCTL_OUT.pack(result, 0, 0, 0) + copied_out

    def plain(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        if opcode == _INIT:
            _, _, readahead, _ = struct.unpack_from("<IIII", body)
            self.ready.set()
            return 0, _INIT_OUT.pack(*VERSION, readahead, 0, 0, 0, _MAX_WRITE, 1, 0, 0, 0)
        if opcode == _GETATTR:
            owner = (os.getuid(), os.getgid())
            return 0, _ATTR_OUT.pack(
                0, 0, 0, _ROOT_NODE, 0, 0, 0, 0, 0, 0, 0, 0, _MODE, 1, *owner, 0, 4096, 0
            )
        if opcode == OPEN:
            return 0, OPEN_OUT.pack(0, FOPEN_DIRECT_IO, 0)
        return (0 if opcode in (RELEASE, _FLUSH) else errno.ENOSYS), b""


def _not_up(path: Path, found: str) -> HardwareError:
    return HardwareError(
        "The simulated /dev/sev-guest did not come up.",
        code="simulator.fuse",
        expected=f"a FUSE mount at {path}",
        found=found,
        todo="Run as root, where /dev/fuse is.",
    )
