"""The agent's doors to hardware: one module each, found by name and imported only when used.

An initramfs carries what a kind of evidence needs and no more, so a door that is not opened must cost
nothing. Import budget of this module: ``importlib`` and the error tree. ``configfs_tsm``, ``sev_guest`` and ``tpm_places``
add the standard library only; ``vtpm`` alone loads tpm2-pytss, and with it ``cryptography`` (about 0.1 s, and
1.8 s in an emulated VM).
"""

from __future__ import annotations

import importlib
from typing import Final

from kagimori_protocol.errors import ImageError, UsageError

DEVICES: Final[dict[str, str]] = {
    "configfs-tsm": "kagimori_agent.devices.configfs_tsm:ConfigfsTsm",
    "sev-guest": "kagimori_agent.devices.sev_guest:SevGuest",
    "vtpm": "kagimori_agent.devices.vtpm:Vtpm",
}
"""Name of a door -> "module:Class"; nothing outside this table is a door."""


def device_class(name: str) -> type:
    """Import and return the class behind a door's ``name``.

    Raises UsageError for a name that is not in the table, ImageError if the image lacks what the door needs.
    """
    try:
        module, _, attribute = DEVICES[name].partition(":")
    except KeyError:
        raise UsageError(
            "There is no such device.",
            code="device.unknown",
            expected=", ".join(sorted(DEVICES)),
            found=repr(name),
        ) from None
    try:
        found: type = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ImageError(
            f"A Python module or library for {name} is missing.",
            code="device.import",
            expected=f"{module} can be imported",
            found=str(error),
            todo="Build the initramfs again with Kagimori's own hook: it asks `footprint` for the file list.",
        ) from error
    return found
