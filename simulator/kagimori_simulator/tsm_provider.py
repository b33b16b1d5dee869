"""The signing half behind a real kernel's configfs-tsm, whose other half is the module simulator/kernel/kagimori_tsm.

The kernel has the attributes, the generations and their errors; what a driver or an SVSM answers comes from ``configfs``,
which simulates the whole door where there is no such module. The module says for itself at which VMPL the guest runs.

Source: simulator/kernel/kagimori_tsm.h, whose two structures these are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_protocol.errors import HardwareError
from kagimori_simulator.configfs import ReportItem

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_simulator.configfs import ConfigfsTsm

DEVICE: Final = Path("/dev/kagimori-tsm")

REQUEST: Final = struct.Struct("<5I64s16s64s")
"""struct kagimori_tsm_request: number, flags, privlevel, manifest_version, inblob_size, inblob, service_guid, service_provider."""
ANSWER: Final = struct.Struct("<5I")
"""struct kagimori_tsm_answer: number, error, and the sizes of outblob, auxblob and manifestblob, which follow."""
SERVICE: Final = 1


def serve(tsm: ConfigfsTsm, device: Path = DEVICE, ready: Callable[[], None] = lambda: None) -> None:
    """Answer the kernel's requests until this process ends, or the device's other end does.

    ``ready`` is called once the kernel has somebody to ask.

    Raises HardwareError if the device cannot be opened: it takes root and the module, and there is one daemon at a time.
    """
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HardwareError(
            "The kernel has no place for a simulated provider of reports.",
            code="simulator.tsm-provider",
            expected=f"the device {device}",
            found=str(error.strerror),
            todo="Run as root, after `insmod kagimori_tsm.ko`, and once.",
        ) from error
    try:
        ready()
        while request := os.read(descriptor, REQUEST.size):
            # ESTALE: who asked has given up, which is no reason to stop.
            with contextlib.suppress(OSError):
                os.write(descriptor, answer(tsm, request))
    finally:
        os.close(descriptor)


def answer(tsm: ConfigfsTsm, request: bytes) -> bytes:
    """Give the answer to one request, whatever becomes of it: an errno of the driver or the SVSM, or blobs."""
    number, flags, privlevel, manifest_version, inblob_size, inblob, guid, provider = REQUEST.unpack(request)
    item = ReportItem(
        tsm,
        inblob[:inblob_size],
        privlevel,
        provider.split(b"\0", 1)[0].decode("latin-1") if flags & SERVICE else None,
        uuid.UUID(bytes_le=guid),
        manifest_version,
    )
    try:
        tsm.require_provider()
        tsm.fail("outblob")
        blobs = item.request()
    except OSError as error:
        return ANSWER.pack(number, error.errno or errno.EIO, 0, 0, 0)
    parts = [blobs[name] for name in ("outblob", "auxblob", "manifestblob")]
    return ANSWER.pack(number, 0, *map(len, parts)) + b"".join(parts)
