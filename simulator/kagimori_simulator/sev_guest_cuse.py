"""Serve a simulated /dev/sev-guest as a device node by CUSE, in a guest whose kernel has it: raw messages, no libfuse.

FUSE knows nothing of what an ioctl's argument points to. With CUSE_UNRESTRICTED_IOCTL the kernel copies nothing by itself,
and a server asks for memory by answering FUSE_IOCTL_RETRY with a list of pieces; the kernel copies them and comes again:

1. nothing copied: ask for the 32 bytes of the argument
2. the argument: ask for what its req_data points to, 96 or 112 bytes by the command
3. the request: let the driver work, and ask for room for exactly what it writes (certificates, response, and argument, each
   only where it does), since a piece that is offered is overwritten from its start; and for the argument once more, as
   fuse_do_ioctl does not forget that there was something to copy in
4. room: answer with all of that

So each piece is read once, whoever changes it meanwhile. The driver is run again after 1 and 2, which has no effect until it
has read everything. One thing differs from Linux's driver: for a pointer to nowhere the kernel says EFAULT by itself, and
exitinfo2 is not copied out.

Source: include/uapi/linux/fuse.h (struct fuse_ioctl_iovec since 7.16, struct cuse_init_out); fs/fuse/cuse.c; fs/fuse/ioctl.c.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import struct
import threading
import time
from dataclasses import dataclass, field
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
from kagimori_simulator.sev_guest import ARGUMENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kagimori_simulator.sev_guest import SevGuest

NAME: Final = "sev-guest"

INIT: Final = 4096
READ, WRITE = 15, 16
INIT_OUT: Final = struct.Struct("<8I40x")
"""struct cuse_init_out: major, minor, unused, flags, max_read, max_write, dev_major, dev_minor; the device's name follows."""
IOVEC: Final = struct.Struct("<QQ")
"""struct fuse_ioctl_iovec: base, len."""
UNRESTRICTED_IOCTL: Final = 1 << 0
IOCTL_COMPAT: Final = 1 << 0
IOCTL_RETRY: Final = 1 << 2

_MAX_TRANSFER: Final = 4096
_READY_S: Final = 10.0
_STOP_S: Final = 5.0
_POLL_S: Final = 0.01


class _Missing(Exception):
    """The driver wants to read a piece of memory that has not been copied yet."""

    def __init__(self, address: int, size: int) -> None:
        super().__init__(address, size)
        self.piece = (address, size)


@dataclass
class _Call:
    """One ioctl, over all the kernel's rounds: the memory it has read so far, and once the driver has worked, its end.

    Serves the driver as its caller's memory.
    """

    command: int
    argument_at: int
    awaited: tuple[int, int] | None = None
    pieces: dict[tuple[int, int], bytes] = field(default_factory=dict)
    written: list[tuple[int, bytes]] = field(default_factory=list)
    result: int | None = None

    def read(self, address: int, size: int) -> bytes:
        """Give a piece, or interrupt the driver until the kernel has copied it."""
        if (address, size) not in self.pieces:
            raise _Missing(address, size)
        return self.pieces[address, size]

    def write(self, address: int, data: bytes) -> None:
        """Keep what is to be copied out at the end."""
        self.written.append((address, data))

    def run(self, driver: SevGuest) -> None:
        """Let the driver work. Raises _Missing, and has had no effect then."""
        argument = self.read(self.argument_at, ARGUMENT.size)
        self.result, copied_out = driver.ioctl(self.command, argument, self)
        if copied_out:
            self.write(self.argument_at, copied_out)


class CuseServer(Server):
    """Answers as the device ``name``; ``descriptor`` is an open /dev/cuse, or whatever speaks like it."""

    def __init__(self, driver: SevGuest, descriptor: int, name: str = NAME) -> None:
        """Remember whom to ask."""
        super().__init__(descriptor)
        self._driver = driver
        self._name = name
        self._handles = itertools.count(1)
        self._calls: dict[tuple[int, int], _Call] = {}
        """By open file and calling thread, which is in one ioctl at a time. What a killed caller leaves, goes at close."""

    def plain(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        """Introduce the device, open, close; what the driver has no function for is EINVAL, as Linux says then."""
        if opcode == INIT:
            answer = INIT_OUT.pack(*VERSION, 0, UNRESTRICTED_IOCTL, _MAX_TRANSFER, _MAX_TRANSFER, 0, 0)
            return 0, answer + f"DEVNAME={self._name}\0".encode()
        if opcode == OPEN:
            return 0, OPEN_OUT.pack(next(self._handles), FOPEN_DIRECT_IO, 0)
        if opcode == RELEASE:
            (handle,) = struct.unpack_from("<Q", body)
            for key in [key for key in self._calls if key[0] == handle]:
                del self._calls[key]
            return 0, b""
        return (errno.EINVAL if opcode in (READ, WRITE) else errno.ENOSYS), b""

    def ioctl(self, pid: int, body: bytes) -> tuple[int, bytes]:
        """Go one round further with an ioctl."""
        handle, flags, command, argument_at, in_size, out_size = IOCTL_IN.unpack_from(body)
        if flags & IOCTL_COMPAT:  # the driver has no function for callers of 32 bits
            return errno.ENOTTY, b""
        if not in_size and not out_size:
            self._calls[handle, pid] = _Call(command, argument_at)
        call = self._calls.get((handle, pid))
        if call is None:
            return errno.EIO, b""
        if call.result is None:
            if call.awaited is not None:
                call.pieces[call.awaited] = body[IOCTL_IN.size : IOCTL_IN.size + in_size]
            try:
                call.run(self._driver)
            except _Missing as missing:
                call.awaited = missing.piece
                return 0, _retry([missing.piece], [])
            if call.written:
                room = [(address, len(data)) for address, data in call.written]
                # Without anything to copy in, Linux would send us its own last pages in place of what we need to know.
                return 0, _retry([(argument_at, ARGUMENT.size)], room)
        self._calls.pop((handle, pid), None)
        return 0, IOCTL_OUT.pack(call.result or 0, 0, 0, 0) + b"".join(data for _, data in call.written)


def _retry(wanted: list[tuple[int, int]], room: list[tuple[int, int]]) -> bytes:
    """Ask the kernel to come again with these pieces of the caller's memory, and with room for those."""
    head = IOCTL_OUT.pack(0, IOCTL_RETRY, len(wanted), len(room))
    return head + b"".join(IOVEC.pack(*piece) for piece in (*wanted, *room))


@contextlib.contextmanager
def served(driver: SevGuest, name: str = NAME, channel: Path = Path("/dev/cuse")) -> Iterator[Path]:
    """Serve ``driver`` as the device node /dev/``name`` until the block ends, or this process does.

    Raises HardwareError if the node does not come up: it takes root, and the kernel's module cuse.
    """
    path = channel.parent / name
    if path.exists():
        raise _not_up(path, "one that is there already")
    try:
        descriptor = os.open(channel, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _not_up(path, f"{channel}: {error.strerror}") from error
    server = CuseServer(driver, descriptor, name)
    thread = threading.Thread(target=server.serve, name="kagimori-sev-guest", daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + _READY_S
        while not path.exists():
            if time.monotonic() > deadline or not thread.is_alive():
                raise _not_up(path, "nothing" if thread.is_alive() else "the kernel refused it")
            time.sleep(_POLL_S)
        yield path
    finally:
        with contextlib.suppress(
            OSError
        ):  # ends the thread's wait for messages; there is none if it never came up
            Path(f"/sys/class/cuse/{name}/abort").write_text("1", encoding="ascii")
        thread.join(_STOP_S)
        os.close(descriptor)


def _not_up(path: Path, found: str) -> HardwareError:
    return HardwareError(
        f"The simulated {path} did not come up.",
        code="simulator.cuse",
        expected=f"a device node at {path}",
        found=found,
        todo="Run as root, after `modprobe cuse`; a kernel without CONFIG_CUSE cannot do it.",
    )
