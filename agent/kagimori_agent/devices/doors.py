"""Which of a kernel's report doors is used: by agent.toml, or by what is there. Never by what failed.

Both doors of Linux, configfs-tsm and /dev/sev-guest, have one driver and one message key behind them. A request that failed
at one has used, and may have cost, the key of the other, so there is no second try at the other door.

Import budget: the standard library and the error tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from kagimori_agent.devices import device_class
from kagimori_agent.devices.report import within
from kagimori_protocol.errors import ImageError, KagimoriError
from kagimori_protocol.snp_layout import REPORT_DATA_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kagimori_agent.devices.report import PlainDoor

CONFIGFS_TSM: Final = "configfs-tsm"
SEV_GUEST: Final = "sev-guest"
AUTO: Final = "auto"

HINT_S: Final = 5
"""Seconds that certificates may cost a boot: time for two more tries of a driver that a host throttles."""
_HINT_PART: Final = 4
"""And never more than this part of what is left of the boot's time."""


def existing(tsm_root: Path, device: Path) -> list[str]:
    """Name the doors that this kernel has, in the order in which "auto" prefers them."""
    doors = {CONFIGFS_TSM: tsm_root / "report", SEV_GUEST: device}
    return [name for name, path in doors.items() if path.exists()]


def choose(door: str, tsm_root: Path, device: Path) -> str:
    """Name the door for plain reports: ``door`` itself, or for "auto" the first that exists. Raises ImageError."""
    if door != AUTO:
        return door
    found = existing(tsm_root, device)
    if not found:
        raise ImageError(
            "The kernel has no report door.",
            code="report.no-door",
            expected=f"the directory {tsm_root / 'report'} (Linux 6.7) or the device {device} (Linux 5.19)",
            found="neither",
            todo="modprobe sev-guest, where this is an SEV-SNP guest; mount -t configfs configfs /sys/kernel/config",
        )
    return found[0]


def open_plain(door: str, tsm_root: Path, device: Path) -> PlainDoor:
    """Give the door of this name for reports at the guest's own VMPL. Raises ImageError, HardwareError, UsageError."""
    opened: PlainDoor
    if door == SEV_GUEST:
        cls = device_class(SEV_GUEST)
        from kagimori_agent.devices.sev_guest import own_vmpl  # noqa: PLC0415 - loads ctypes; only this door needs it

        opened = cls(device, vmpl=own_vmpl())
    else:
        opened = device_class(door)(tsm_root)
    return opened


class HostCertificates:
    """The host's certificate table through /dev/sev-guest, for where an SVSM passes none on. At most one request.

    The report that comes with it is thrown away. Certificates are hints, which the verifier may have already, so a failure
    is told and costs nothing else: it is neither raised nor tried again.
    """

    def __init__(self, device: Path, vmpl: Callable[[], int], say: Callable[[str], None]) -> None:
        """Remember the door; ``vmpl`` tells the guest's own VMPL, the strongest that it may name."""
        self._device = device
        self._vmpl = vmpl
        self._say = say
        self._table: bytes | None = None

    def get(self, wait_s: float) -> bytes:
        """Give the table, or nothing; waits for 5 s, or for a quarter of ``wait_s`` where that is less."""
        if self._table is None:
            self._table = b""  # whatever happens now, the host is not asked again
            if self._device.exists():
                self._table = self._ask(min(HINT_S, wait_s / _HINT_PART))
        return self._table

    def _ask(self, wait_s: float) -> bytes:
        def ask() -> bytes:
            table: bytes = (
                device_class(SEV_GUEST)(self._device, vmpl=self._vmpl())
                .plain_report(bytes(REPORT_DATA_SIZE))
                .certificates
            )
            return table

        try:
            table = within(wait_s, ask)
        except KagimoriError as error:
            self._say(f"no certificates from {self._device} ({error.code}): the verifier has to know them")
            return b""
        if not table:
            self._say(f"the host supplies no certificates at {self._device}: the verifier has to know them")
        return table
