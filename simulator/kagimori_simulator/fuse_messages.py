"""The kernel's messages on /dev/fuse and /dev/cuse, and a loop that answers them: for what libfuse cannot do here.

Source: include/uapi/linux/fuse.h, version 7.31; fs/fuse/dev.c for what interrupts a request.
"""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import signal
import struct
import threading
from pathlib import Path
from typing import Final

VERSION: Final = (7, 31)

OPEN: Final = 14
RELEASE: Final = 18
INTERRUPT: Final = 36
IOCTL: Final = 39

IN_HEADER: Final = struct.Struct("<IIQQIIII")
OUT_HEADER: Final = struct.Struct("<IiQ")
OPEN_OUT: Final = struct.Struct("<QII")
IOCTL_IN: Final = struct.Struct("<QIIQII")
"""struct fuse_ioctl_in: fh, flags, cmd, arg, in_size, out_size."""
IOCTL_OUT: Final = struct.Struct("<iIII")
"""struct fuse_ioctl_out: result, flags, in_iovs, out_iovs."""
FOPEN_DIRECT_IO: Final = 1

_BUFFER: Final = 1 << 17
"""More than FUSE_MIN_READ_BUFFER, and than any request that is made here."""
_UNANSWERED: Final = frozenset({2, INTERRUPT, 42})
"""FORGET, INTERRUPT, BATCH_FORGET."""
_SIGKILL_BIT: Final = 1 << (signal.SIGKILL - 1)


class Server(abc.ABC):
    """Answers the kernel. Each ioctl has a thread of its own, so that a held request does not hold the file."""

    def __init__(self, descriptor: int) -> None:
        """Serve the open /dev/fuse or /dev/cuse ``descriptor``, which stays the caller's."""
        self._descriptor = descriptor
        self._callers: dict[int, int] = {}

    @abc.abstractmethod
    def ioctl(self, pid: int, body: bytes) -> tuple[int, bytes]:
        """Answer an ioctl of the thread ``pid``: an errno, and the body of the answer. May block."""

    @abc.abstractmethod
    def plain(self, opcode: int, body: bytes) -> tuple[int, bytes]:
        """Answer what is no ioctl, likewise; must not block."""

    def serve(self) -> None:
        """Go on until the kernel has ended the connection."""
        while True:
            try:
                raw = os.read(self._descriptor, _BUFFER)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):  # ENOENT: the caller gave up
                    continue
                return  # ENODEV: unmounted
            if not raw:
                return
            _, opcode, unique, _, _, _, pid, _ = IN_HEADER.unpack_from(raw)
            body = raw[IN_HEADER.size :]
            if opcode == INTERRUPT:
                self._let_go(*struct.unpack_from("<Q", body))
            if opcode in _UNANSWERED:
                continue
            if opcode == IOCTL:
                self._callers[unique] = pid
                threading.Thread(target=self._answer_ioctl, args=(unique, pid, body), daemon=True).start()
            else:
                self._reply(unique, *self.plain(opcode, body))

    def _answer_ioctl(self, unique: int, pid: int, body: bytes) -> None:
        answer = (errno.EIO, b"")  # also after a mistake of ours nobody may wait for ever
        try:
            answer = self.ioctl(pid, body)
        finally:
            self._reply(unique, *answer)

    def _let_go(self, unique: int) -> None:
        """Answer for the driver if the caller has been killed: FUSE keeps the dead until there is an answer.

        The driver itself goes on whatever signals come, but not for longer than a minute.
        """
        pid = self._callers.get(unique)
        if pid is not None and _is_killed(pid):
            self._reply(unique, errno.EINTR)

    def _reply(self, unique: int, number: int, body: bytes = b"") -> None:
        self._callers.pop(unique, None)
        header = OUT_HEADER.pack(OUT_HEADER.size + len(body), -number, unique)
        with contextlib.suppress(OSError):  # who asked has gone, or the connection has
            os.write(self._descriptor, header + body)


def _is_killed(pid: int) -> bool:
    """Tell whether a thread has SIGKILL pending, as all threads of a process that ends have."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in ("SigPnd", "ShdPnd") and int(value, 16) & _SIGKILL_BIT:
                return True
    return False
