"""Serve a simulated /dev/sev-guest as a file by FUSE, so that unmodified code meets a real ioctl.

A mount whose root is a regular file, with a loop of our own on /dev/fuse: libfuse's ready-made operations drop what an ioctl
copies out as soon as it fails, and the driver's size negotiation lives from exactly that. FUSE passes the argument by the
size that its number carries (32 bytes); what that points to is read and written in the calling process
(process_vm_readv(2)), so this takes root. Where a kernel has CUSE, a device node can be served by the same logic instead.

Source: include/uapi/linux/fuse.h, version 7.31.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import HardwareError
from kagimori_simulator.fuse_mount import unmounted_at_end
from kagimori_simulator.sev_guest import ARGUMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kagimori_simulator.sev_guest import SevGuest

_MODE: Final = stat.S_IFREG | 0o600
_READY_S: Final = 10.0
_STOP_S: Final = 5.0
_BUFFER: Final = 1 << 17
"""More than FUSE_MIN_READ_BUFFER, and than a request with ``_MAX_WRITE`` bytes."""
_MAX_WRITE: Final = 4096
_VERSION: Final = (7, 31)
_ROOT_NODE: Final = 1
_FOPEN_DIRECT_IO: Final = 1

_MNT_FORCE: Final = 1
_MNT_DETACH: Final = 2

_GETATTR, _OPEN, _RELEASE, _FLUSH, _INIT, _INTERRUPT, _IOCTL = 3, 14, 18, 25, 26, 36, 39
_UNANSWERED: Final = frozenset({2, _INTERRUPT, 42})
"""FORGET, INTERRUPT, BATCH_FORGET."""
_SIGKILL_BIT: Final = 1 << (signal.SIGKILL - 1)

_IN_HEADER: Final = struct.Struct("<IIQQIIII")
_OUT_HEADER: Final = struct.Struct("<IiQ")
_INIT_OUT: Final = struct.Struct("<IIIIHHIIHHI28x")
_ATTR_OUT: Final = struct.Struct("<QII6Q10I")
_OPEN_OUT: Final = struct.Struct("<QII")
_IOCTL_IN: Final = struct.Struct("<QIIQII")
_IOCTL_OUT: Final = struct.Struct("<iIII")


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


class _Server:
    """Answers the kernel. Each ioctl has a thread of its own, so that a held request does not hold the file."""

    def __init__(self, driver: SevGuest, descriptor: int) -> None:
        self.ready = threading.Event()
        self._driver = driver
        self._descriptor = descriptor
        self._callers: dict[int, int] = {}

    def serve(self) -> None:
        """Go on until the file is unmounted."""
        while True:
            try:
                raw = os.read(self._descriptor, _BUFFER)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):  # ENOENT: the caller gave up
                    continue
                return  # ENODEV: unmounted
            _, opcode, unique, _, _, _, pid, _ = _IN_HEADER.unpack_from(raw)
            body = raw[_IN_HEADER.size :]
            if opcode == _INTERRUPT:
                self._let_go(*struct.unpack_from("<Q", body))
            if opcode in _UNANSWERED:
                continue
            if opcode == _IOCTL:
                self._callers[unique] = pid
                threading.Thread(target=self._ioctl, args=(unique, pid, body), daemon=True).start()
            else:
                self._reply(unique, *_plain(opcode, body))
            if opcode == _INIT:
                self.ready.set()

    def _ioctl(self, unique: int, pid: int, body: bytes) -> None:
        _, _, command, _, in_size, out_size = _IOCTL_IN.unpack_from(body)
        argument = body[_IOCTL_IN.size : _IOCTL_IN.size + in_size]
        if in_size != out_size or in_size != ARGUMENT.size:  # a number of some other device
            self._reply(unique, errno.ENOTTY)
            return
        result, copied_out = self._driver.ioctl(command, argument, ProcessMemory(pid))
        self._reply(unique, 0, _IOCTL_OUT.pack(result, 0, 0, 0) + copied_out)

    def _let_go(self, unique: int) -> None:
        """Answer for the driver if the caller has been killed: FUSE keeps the dead until there is an answer.

        The driver itself goes on whatever signals come, but not for longer than a minute.
        """
        pid = self._callers.get(unique)
        if pid is not None and _is_killed(pid):
            self._reply(unique, errno.EINTR)

    def _reply(self, unique: int, number: int, body: bytes = b"") -> None:
        self._callers.pop(unique, None)
        header = _OUT_HEADER.pack(_OUT_HEADER.size + len(body), -number, unique)
        with contextlib.suppress(OSError):  # who asked has gone, or the mount has
            os.write(self._descriptor, header + body)


def _is_killed(pid: int) -> bool:
    """Tell whether a thread has SIGKILL pending, as all threads of a process that ends have."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in ("SigPnd", "ShdPnd") and int(value, 16) & _SIGKILL_BIT:
                return True
    return False


def _plain(opcode: int, body: bytes) -> tuple[int, bytes]:
    """Answer what is no ioctl: an errno, and the body of the answer."""
    if opcode == _INIT:
        _, _, readahead, _ = struct.unpack_from("<IIII", body)
        return 0, _INIT_OUT.pack(*_VERSION, readahead, 0, 0, 0, _MAX_WRITE, 1, 0, 0, 0)
    if opcode == _GETATTR:
        owner = (os.getuid(), os.getgid())
        return 0, _ATTR_OUT.pack(0, 0, 0, _ROOT_NODE, 0, 0, 0, 0, 0, 0, 0, 0, _MODE, 1, *owner, 0, 4096, 0)
    if opcode == _OPEN:
        return 0, _OPEN_OUT.pack(0, _FOPEN_DIRECT_IO, 0)
    return (0 if opcode in (_RELEASE, _FLUSH) else errno.ENOSYS), b""


def _not_up(path: Path, found: str) -> HardwareError:
    return HardwareError(
        "The simulated /dev/sev-guest did not come up.",
        code="simulator.fuse",
        expected=f"a FUSE mount at {path}",
        found=found,
        todo="Run as root, where /dev/fuse is.",
    )
