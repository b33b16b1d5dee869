"""Join a guest's connection, on stdin and stdout, to whatever port a file names now: QEMU runs one for each.

``relay.py FILE``: without the file, or with nobody at its port, the connection ends at once, as that of a dead verifier.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading


def main() -> int:
    """Copy both ways until both have ended."""
    try:
        with open(sys.argv[1], encoding="ascii") as file:  # noqa: PTH123 - started for each connection: pathlib costs
            port = int(file.read())
        server = socket.create_connection(("127.0.0.1", port))
    except (OSError, ValueError):
        return 1

    def forward() -> None:
        with contextlib.suppress(OSError):
            while part := os.read(0, 1 << 16):
                server.sendall(part)
            server.shutdown(socket.SHUT_WR)

    # A daemon: the guest's side may stay open after the verifier has answered and closed.
    threading.Thread(target=forward, daemon=True).start()
    with contextlib.suppress(OSError):
        while part := server.recv(1 << 16):
            rest = memoryview(part)
            while rest:
                rest = rest[os.write(1, rest) :]
    return 0


if __name__ == "__main__":
    sys.exit(main())
