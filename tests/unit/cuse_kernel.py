"""The kernel's end of /dev/cuse, as far as an ioctl goes: what fs/fuse/cuse.c and fs/fuse/ioctl.c do with an answer.

A caller's memory is that of this process, so the agent's own code can call.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
import threading
from collections.abc import Sequence

from kagimori_simulator.sev_guest_fuse import ProcessMemory

CUSE_INIT, OPEN, RELEASE, INTERRUPT, IOCTL, READ = 4096, 14, 18, 36, 39, 15
UNRESTRICTED, RETRY = 1 << 1, 1 << 2
MAX_IOV = 256
MAX_BYTES = 32 << 12
"""fc->max_pages of a CUSE connection."""


class FuseError(OSError):
    """An errno in an answer's header: no ioctl took place."""


class Kernel:
    """One open /dev/cuse. ``end`` is the server's; ``rounds`` keeps (in_size, out_size) of each message of an ioctl."""

    def __init__(self) -> None:
        # Keeps messages apart, as a read from /dev/cuse does.
        self._ours, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(10)
        self._uniques = itertools.count(2, 2)
        self._memory = ProcessMemory(os.getpid())
        self.rounds: list[tuple[int, int]] = []

    def hang_up(self) -> None:
        """End the connection."""
        self._ours.close()

    def close(self) -> None:
        """Close both ends."""
        self._ours.close()
        self.end.close()

    def send(self, opcode: int, body: bytes, pid: int | None = None) -> int:
        """Send a message without waiting for its answer; gives its number."""
        unique = next(self._uniques)
        pid = threading.get_native_id() if pid is None else pid
        head = struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, 0, 0, 0, pid, 0, 0)
        self._ours.sendall(head + body)
        return unique

    def answer(self, unique: int) -> bytes:
        """Take the answer to a message, which is the next one: these tests have one caller. Raises FuseError."""
        raw = self._ours.recv(1 << 17)
        length, error, answered = struct.unpack_from("<IiQ", raw)
        assert (length, answered) == (len(raw), unique)
        assert -1000 < error <= 0
        if error:
            assert len(raw) == 16
            raise FuseError(-error, os.strerror(-error))
        return raw[16:]

    def ask(self, opcode: int, body: bytes) -> bytes:
        """Send a message and take its answer."""
        return self.answer(self.send(opcode, body))

    def init(self) -> tuple[int, dict[str, str]]:
        """Let the server introduce its device; gives its flags and its info, as cuse_process_init_reply reads them."""
        raw = self.ask(CUSE_INIT, struct.pack("<IIII", 7, 38, 0, 1))
        major, minor, _, flags, _, _, dev_major, _ = struct.unpack_from("<8I", raw)
        assert (major, minor >= 16, dev_major) == (7, True, 0)  # 16: struct fuse_ioctl_iovec as it is now
        info = raw[72:]
        assert info.endswith(b"\0")
        return flags, dict(entry.split("=", 1) for entry in info.decode().split("\0") if entry)

    def open(self) -> int:
        """Open the device; gives the server's handle."""
        handle, _, _ = struct.unpack("<QII", self.ask(OPEN, struct.pack("<II", os.O_RDWR, 0)))
        return int(handle)

    def release(self, handle: int) -> None:
        """Close it."""
        assert self.ask(RELEASE, struct.pack("<QIIQ", handle, 0, 0, 0)) == b""

    def ioctl(self, handle: int, command: int, argument_at: int, flags: int = UNRESTRICTED) -> int:
        """Do what fuse_do_ioctl does; gives the result or a negative errno."""
        in_pages, page = False, b""
        wanted: Sequence[tuple[int, int]] = ()
        room: Sequence[tuple[int, int]] = ()
        while True:
            try:
                data = b"".join(self._memory.read(*piece) for piece in wanted)
            except OSError:
                return -errno.EFAULT
            out_size = sum(size for _, size in room)
            self.rounds.append((len(data), out_size))
            head = struct.pack("<QIIQII", handle, flags, command, argument_at, len(data), out_size)
            # ap.args.in_pages is never cleared: once it is set, the last thing sent comes from the pages, whatever it is.
            in_pages = in_pages or bool(data)
            try:
                answer = self.ask(
                    IOCTL, head + data if data or not in_pages else page.ljust(len(head), b"\0")[: len(head)]
                )
            except FuseError as error:
                return -errno.ENOTTY if error.errno == errno.ENOSYS else -(error.errno or 0)
            result, said, in_iovs, out_iovs = struct.unpack_from("<iIII", answer)
            body = page = answer[16:]
            if not said & RETRY:
                return -errno.EIO if len(body) > out_size else self._copy_out(room, body) or int(result)
            pieces = list(struct.iter_unpack("<QQ", body))
            wanted, room = pieces[:in_iovs], pieces[in_iovs:]
            assert len(pieces) == in_iovs + out_iovs <= MAX_IOV
            assert all(sum(size for _, size in part) <= MAX_BYTES for part in (wanted, room))

    def _copy_out(self, room: Sequence[tuple[int, int]], body: bytes) -> int:
        for address, size in room:
            part, body = body[:size], body[size:]
            try:
                if part:
                    self._memory.write(address, part)
            except OSError:
                return -errno.EFAULT
        return 0
