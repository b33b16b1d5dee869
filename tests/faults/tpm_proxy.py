"""A TPM that fails on purpose: between a TSS and swtpm, each command can be the last, or the one that is not answered."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from tpm2_pytss.constants import TPM2_CC

from kagimori_simulator.vtpm import Vtpm

HEADER = struct.Struct(">HII")
"""tag, size of all, and command or response code (TPM 2.0 part 1, section 18)."""
NO_SESSIONS = 0x8001
TRANSIENT = 0x80000000
POLICY_SESSION = 0x03000000
SLOTS = 3
"""Objects, and sessions, that swtpm holds at once."""
WAIT_S = 60.0
BUFFER = 1 << 14
Carry = Callable[[socket.socket, socket.socket], None]
Fault = Literal["dies before", "dies after", "stalls"]


@dataclass
class TpmProxy:
    """Passes commands on to a running swtpm, one client at a time, and counts them.

    ``fault`` comes at the command number ``at``, counted from 0 over all clients.
    """

    vtpm: Vtpm
    path: Path
    at: int | None = None
    fault: Fault = "dies before"
    commands: list[str] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    """Set once a command is held back."""
    go_on: threading.Event = field(default_factory=threading.Event)
    """Set by who wants a command that is held back to be answered."""

    @classmethod
    @contextlib.contextmanager
    def before(cls, vtpm: Vtpm) -> Iterator[Self]:
        """Listen where a TSS would look for swtpm's two sockets."""
        with tempfile.TemporaryDirectory(prefix="kagimori-tpm-proxy-") as private:
            proxy = cls(vtpm, Path(private) / "tpm")
            doors = {proxy.path: (vtpm.socket_path, proxy._carry_commands)}
            doors[Path(f"{proxy.path}.ctrl")] = (Path(f"{vtpm.socket_path}.ctrl"), proxy._carry_control)
            with contextlib.ExitStack() as listening:
                for path, (target, carry) in doors.items():
                    listener = listening.enter_context(socket.socket(socket.AF_UNIX))
                    listener.bind(str(path))
                    listener.listen()
                    threading.Thread(target=proxy._serve, args=(listener, target, carry), daemon=True).start()
                try:
                    yield proxy
                finally:
                    proxy.go_on.set()

    @property
    def tcti(self) -> str:
        """How a TSS reaches the TPM through this."""
        return f"swtpm:path={self.path}"

    def flush(self) -> None:
        """Flush what a process has left loaded, as Linux does when a client of /dev/tpmrm0 goes, however it goes.

        A client of swtpm connects anew for each command, so only who started the process knows that it has gone.
        """
        if self.vtpm.process.poll() is not None:
            return
        with socket.socket(socket.AF_UNIX) as tpm:
            tpm.connect(str(self.vtpm.socket_path))
            for first in (TRANSIENT, POLICY_SESSION):
                for handle in range(first, first + SLOTS):
                    size = HEADER.size + struct.calcsize(">I")
                    tpm.sendall(
                        HEADER.pack(NO_SESSIONS, size, int(TPM2_CC.FlushContext)) + struct.pack(">I", handle)
                    )
                    _message(tpm)

    def _serve(self, listener: socket.socket, target: Path, carry: Carry) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return  # closed: the story is over
            # OSError: the TPM has died, or its client; the other one sees its connection end.
            with client, socket.socket(socket.AF_UNIX) as tpm, contextlib.suppress(OSError):
                tpm.connect(str(target))
                carry(client, tpm)

    def _carry_commands(self, client: socket.socket, tpm: socket.socket) -> None:
        while command := _message(client):
            number = len(self.commands)
            self.commands.append(_name(command))
            fault = self.fault if number == self.at else None
            if fault == "dies before":
                self._die()
                return
            if fault == "stalls":
                self.stalled.set()
                self.go_on.wait(WAIT_S)
            tpm.sendall(command)
            reply = _message(tpm)
            if fault == "dies after":
                self._die()
                return
            client.sendall(reply)

    def _carry_control(self, client: socket.socket, tpm: socket.socket) -> None:
        """Pass control commands on; each has one reply, which comes at once."""
        while part := client.recv(BUFFER):
            tpm.sendall(part)
            client.sendall(tpm.recv(BUFFER))

    def _die(self) -> None:
        self.vtpm.process.kill()
        self.vtpm.process.wait()


def _message(end: socket.socket) -> bytes:
    """Read one command or response; empty at the end."""
    message = b""
    while len(message) < HEADER.size or len(message) < HEADER.unpack_from(message)[1]:
        part = end.recv(BUFFER)
        if not part:
            return b""
        message += part
    return message


def _name(command: bytes) -> str:
    code = HEADER.unpack_from(command)[2]
    return str(TPM2_CC(code)).removeprefix("TPM2_CC.")
