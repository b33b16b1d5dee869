"""Which TPMs the kernel has, which of them is the SVSM's, and where its event log lies.

A TPM is chosen by its kernel driver's name and never by its index: the host decides what other TPMs a VM has
and in which order the kernel finds them, while only an SVSM makes ``tpm_svsm`` bind. Exactly one must match.

Import budget: the standard library and the error tree (``doctor`` and ``cap`` need this without a TPM
library).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kagimori_protocol.errors import HardwareError, ImageError, KagimoriError, UsageError

DRIVER: Final = "tpm_svsm"
NO_DRIVER: Final = "(none)"

EVENT_LOG_LIMIT: Final = 512 * 1024
"""Bytes of an event log. Real ones take 5 to 100 KiB; as base64 it must fit into Evidence of 1 MiB with the
rest."""

_CHIP: Final = re.compile(r"tpm[0-9]+")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one TPM is: kernel name, driver (underscores for hyphens), TCTI string and event log.

    ``tcti`` is None when the kernel has the TPM but /dev has no node for it.
    """

    name: str
    driver: str
    tcti: str | None
    event_log: Path

    def require_tcti(self) -> str:
        """Return the TCTI string, or raise ImageError."""
        if self.tcti is None:
            raise ImageError(
                f"There is no device node for {self.name}.",
                code="tpm.no-node",
                expected=f"/dev/tpmrm{self.name.removeprefix('tpm')} or /dev/{self.name}",
                found="neither",
                todo="Mount devtmpfs on /dev before the agent runs.",
            )
        return self.tcti


def present(root: Path = Path("/")) -> list[Place]:
    """List every TPM that the kernel has, by index; empty if there is none.

    Source: Linux Documentation/ABI/stable/sysfs-class-tpm. ``root`` is where sys and dev are.
    """
    classes = root / "sys/class/tpm"
    try:
        chips = [entry.name for entry in classes.iterdir() if _CHIP.fullmatch(entry.name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise HardwareError(
            "The kernel's list of TPMs cannot be read.",
            code="tpm.list",
            expected=str(classes),
            found=str(error),
        ) from error
    return [_place(root, name) for name in sorted(chips, key=lambda name: int(name.removeprefix("tpm")))]


def by_driver(driver: str = DRIVER, root: Path = Path("/")) -> Place:
    """Return the one TPM that ``driver`` runs; ``tpm-svsm`` and ``tpm_svsm`` are the same name.

    Raises ImageError when none matches, HardwareError when more than one does: choosing would be guessing.
    """
    found = present(root)
    matching = [place for place in found if place.driver == normalised(driver)]
    if len(matching) == 1:
        return matching[0]
    listed = ", ".join(f"{place.name} by {place.driver}" for place in found) or "no TPM at all"
    if matching:
        raise HardwareError(
            "More than one TPM has the driver that was asked for.",
            code="tpm.ambiguous",
            expected=f"exactly one TPM by {driver}",
            found=listed,
            todo="Remove the other TPMs from the VM: none is taken as long as two match.",
        )
    raise ImageError(
        f"No TPM has the driver {driver}.",
        code="tpm.no-driver",
        expected=f"exactly one TPM by {driver}",
        found=listed,
        todo="For an SVSM's vTPM use Linux 6.16 or newer with CONFIG_TCG_SVSM, put its module tpm_svsm"
        " into the initramfs, and start the VM with an SVSM that has one.",
    )


def normalised(driver: str) -> str:
    """Spell a driver's name as its module is: the platform driver is "tpm-svsm", the module "tpm_svsm"."""
    return driver.replace("-", "_")


def read_event_log(path: Path, root: Path = Path("/")) -> bytes:
    """Read a firmware event log to its end; the kernel gives its size as 0.

    Raises ImageError (securityfs not mounted), HardwareError (absent, empty, too large, unreadable),
    UsageError (rights).
    """
    expected = f"an event log of at most {EVENT_LOG_LIMIT} bytes in {path}"
    try:
        with path.open("rb") as file:
            log = file.read(EVENT_LOG_LIMIT + 1)
    except FileNotFoundError:
        raise _explain_no_log(path, root, expected) from None
    except PermissionError as error:
        raise UsageError(
            "The event log may be read by root only.",
            code="eventlog.rights",
            expected=expected,
            found=str(error),
            todo="Run as root.",
        ) from error
    except OSError as error:
        raise HardwareError(
            "The event log cannot be read.", code="eventlog.unreadable", expected=expected, found=str(error)
        ) from error
    if not log:
        raise HardwareError(
            "The event log is empty, so nothing would explain the PCRs.",
            code="eventlog.empty",
            expected=expected,
            found="0 bytes",
            todo="Use firmware that measures the boot into the vTPM (OVMF with TPM2_ENABLE).",
        )
    if len(log) > EVENT_LOG_LIMIT:
        raise HardwareError(
            "The event log is larger than any honest one.",
            code="eventlog.too-big",
            expected=expected,
            found="more",
            todo="Look at it with tpm2_eventlog: one event is likely far too large.",
        )
    return log


def _place(root: Path, name: str) -> Place:
    try:
        link = (root / "sys/class/tpm" / name / "device/driver").readlink()
    except OSError:
        link = Path(NO_DRIVER)  # such as a TPM of tpm_vtpm_proxy, which has no parent device
    index = name.removeprefix("tpm")
    nodes = (root / f"dev/tpmrm{index}", root / f"dev/{name}")
    node = next((node for node in nodes if node.exists()), None)
    return Place(
        name=name,
        driver=normalised(link.name),
        tcti=None if node is None else f"device:{node}",
        event_log=root / f"sys/kernel/security/{name}/binary_bios_measurements",
    )


def _explain_no_log(path: Path, root: Path, expected: str) -> KagimoriError:
    securityfs = root / "sys/kernel/security"
    if securityfs in path.parents and not (securityfs.is_dir() and any(securityfs.iterdir())):
        return ImageError(
            "securityfs is not mounted, so there is no event log to read.",
            code="eventlog.no-securityfs",
            expected=expected,
            found=f"nothing in {securityfs}",
            todo=f"mount -t securityfs securityfs {securityfs}",
        )
    return HardwareError(
        "There is no event log of this TPM.",
        code="eventlog.absent",
        expected=expected,
        found="no such file",
        todo="Use firmware with TCG2 measured boot, and a boot loader that enters Linux by its EFI stub, which saves the "
        "log: GRUB 2.06 does so only with Secure Boot on. Linux drops a log that it cannot parse (see `dmesg`).",
    )
