"""What a machine's operator does to it while it runs, by QEMU's monitor (QMP): pull the cable, press an emergency key, read the memory."""

from __future__ import annotations

import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_TIMEOUT_S: Final = 60
CABLE: Final = "n0"


class Monitor:
    """One connection to a monitor; ``words`` are what QEMU must be started with."""

    def __init__(self, path: Path) -> None:
        """Wait at ``path`` for QEMU to connect."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(_TIMEOUT_S)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._replies: Any = None
        self.words = ["-qmp", f"unix:{path}"]

    def set_cable(self, *, plugged: bool) -> None:
        """Pull the network cable or plug it in."""
        self._do("set_link", name=CABLE, up=plugged)

    def send_break(self) -> None:
        """Send a break on the serial line: Linux takes the next key for an emergency key (sysrq)."""
        self._do("chardev-send-break", id="serial0")

    def save_memory(self, to: Path, size: int) -> None:
        """Write the first ``size`` bytes of the guest's memory, which no chip hides here."""
        self._do("pmemsave", val=0, size=size, filename=str(to))

    def _do(self, command: str, **arguments: object) -> None:
        if self._replies is None:
            self._connection, _ = self._listener.accept()
            self._connection.settimeout(_TIMEOUT_S)
            self._replies = self._connection.makefile("r", encoding="utf-8")
            assert "QMP" in json.loads(self._replies.readline())
            self._ask({"execute": "qmp_capabilities"})
        self._ask({"execute": command, "arguments": arguments})

    def _ask(self, request: dict[str, object]) -> None:
        self._connection.sendall(json.dumps(request).encode() + b"\n")
        while "return" not in (reply := json.loads(self._replies.readline())):
            assert "event" in reply, reply

    def close(self) -> None:
        """Hang up."""
        if self._replies is not None:
            self._replies.close()
            self._connection.close()
        self._listener.close()


@contextmanager
def monitor() -> Iterator[Monitor]:
    """Give a monitor; its socket has a short path, as sun_path takes 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kagimori-qmp-") as directory:
        one = Monitor(Path(directory) / "qmp")
        try:
            yield one
        finally:
            one.close()
