"""One request to Linux's configfs-tsm: its attributes, its count of writes, and what each failure means.

Kept apart from ``configfs_tsm``, which knows the order of things: here every read is bounded, every errno and
every missing attribute has a name, and ``generation`` is compared. Source:
Documentation/ABI/testing/configfs-tsm-report.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from kagimori_agent.devices.report import DEAD_KEY, KeyWiped, Meaning
from kagimori_protocol.errors import HardwareError, ImageError, KagimoriError, UsageError
from kagimori_protocol.snp_layout import REPORT_SIZE

if TYPE_CHECKING:
    from pathlib import Path

PROVIDER: Final = "sev_guest"

TEXT_LIMIT: Final = 4096
"""Bytes of a text attribute: the kernel gives at most one page."""

BLOB_LIMIT: Final = 32 * 1024
"""Bytes of any blob: TSM_REPORT_OUTBLOB_MAX as it was up to Linux 6.18; newer ones raise it, but for TDX.

A report takes 1184, a vTPM's manifest 314, and a host's certificates at most 16 KiB (SEV_FW_BLOB_MAX_SIZE) in
a plain request; only an SVSM's answer may be larger. More than this is not what was asked for.
"""

PRIVLEVEL_MAX: Final = 3
_GENERATION_DIGITS: Final = 20


class GenerationChanged(HardwareError):
    """Something else wrote to the request's directory, so what was read may be of two requests."""

    default_code = "tsm.generation"


_MEANINGS: Final[dict[int, Meaning]] = {
    errno.ENXIO: Meaning(
        "tsm.no-provider",
        "No driver stands behind the report door, or the firmware refused for a reason of its own.",
        "Run `modprobe sev-guest` (CONFIG_SEV_GUEST); if no /dev/sev-guest appears, this is no SEV-SNP VM.",
    ),
    errno.EINVAL: Meaning(
        "tsm.invalid",
        "The kernel, the SVSM or the firmware calls the request invalid.",
        "For a plain report look at privlevel_floor; for a service, at whether this SVSM offers it.",
    ),
    errno.EBUSY: Meaning(
        "tsm.busy",
        "The request's directory is used by something else.",
        "Find what else writes to configfs-tsm.",
    ),
    errno.EFBIG: Meaning(
        "tsm.too-big",
        "A blob is larger than the kernel passes on.",
        "Update the kernel; if it is the certificates, the host has to load fewer of them.",
    ),
    errno.EIO: Meaning(
        "tsm.firmware", "The AMD secure processor or the host failed to answer the request.", DEAD_KEY
    ),
    errno.EBADMSG: Meaning(
        "tsm.key-wiped",
        "The firmware's answer could not be decrypted, and Linux gave up its key to it.",
        DEAD_KEY,
    ),
    errno.ETIMEDOUT: Meaning(
        "tsm.throttled",
        "The host held the request back for a minute; Linux then wipes its key to the firmware.",
        DEAD_KEY + " Ask the host's operator about throttling of guest requests.",
    ),
    errno.ENOTTY: Meaning(
        "tsm.key-wiped",
        "Linux has wiped its key to the firmware after an earlier failure (VMPCK is disabled).",
        DEAD_KEY,
    ),
    errno.EWOULDBLOCK: Meaning(
        "tsm.not-ready",
        "The kernel has no answer for the request.",
        "Update the kernel: it must answer or fail.",
    ),
    errno.ENOSPC: Meaning(
        "tsm.busy", "The kernel has no room for another request.", "Find what else uses configfs-tsm."
    ),
    errno.ENOMEM: Meaning(
        "tsm.memory", "The kernel has no memory for the request.", "Give the VM more memory."
    ),
}

_FINAL: Final = frozenset({errno.ENOTTY, errno.ETIMEDOUT, errno.EBADMSG})
"""After these the key is gone. EIO may also be a host with more certificates than Linux asks for, which leaves it."""


class Entry:
    """One request: its directory, and the count of writes that ``generation`` must agree with."""

    def __init__(self, path: Path) -> None:
        """Start with no write counted."""
        self.path = path
        self._first = 0
        self._writes = 0

    def start(self) -> None:
        """Note the generation that counting starts from."""
        self._first = self._generation()

    def provider(self) -> str:
        """Return the provider if it is SEV-SNP's, or raise HardwareError."""
        provider = self.text("provider")
        if provider != PROVIDER:
            raise HardwareError(
                "Another kind of confidential computing stands behind the report door.",
                code="tsm.provider",
                expected=PROVIDER,
                found=repr(provider),
                todo="Run this VM on SEV-SNP: version 1 of Kagimori knows no other evidence.",
            )
        return provider

    def privlevel_floor(self) -> int | None:
        """Give the lowest VMPL that the guest may name; None where the kernel does not know such a limit."""
        if not self._has("privlevel_floor"):
            return None
        return self._number("privlevel_floor", PRIVLEVEL_MAX)

    def require_service_attributes(self) -> None:
        """Raise ImageError unless the kernel can ask an SVSM; say whether kernel or SVSM is what lacks."""
        for name in ("service_provider", "service_guid", "service_manifest_version", "manifestblob"):
            if not self._has(name):
                floor = self.privlevel_floor()
                if floor:
                    found = f"no {name}, though the guest runs at VMPL {floor}: the kernel is older than 6.11"
                else:
                    found = f"no {name}, and privlevel_floor is {floor}: no SVSM runs below this guest"
                raise ImageError(
                    "The kernel shows no way to ask an SVSM for a service's report.",
                    code="tsm.no-service-attributes",
                    expected="service_provider, service_guid, service_manifest_version and manifestblob",
                    found=found,
                    todo="Start the VM with a COCONUT-SVSM IGVM file, and use Linux 6.11 or newer in it.",
                )

    def report(self) -> bytes:
        """Read ``outblob``: the 1184 bytes of a report, and of this request. Raises HardwareError."""
        report = self.blob("outblob")
        self.require_generation("outblob")
        if len(report) != REPORT_SIZE:
            raise HardwareError(
                "A report has the wrong size.",
                code="tsm.report-size",
                expected=f"{REPORT_SIZE} bytes (AMD 56860, ATTESTATION_REPORT)",
                found=f"{len(report)} bytes",
                todo="Update the kernel or the SVSM: a report of SEV-SNP has one size.",
            )
        return report

    def require_generation(self, after: str) -> None:
        """Raise GenerationChanged unless exactly our own writes were counted since ``start``."""
        found = self._generation()
        if found != self._first + self._writes:
            raise GenerationChanged(
                f"The request changed by the time {after} had been read: its blobs may be of two requests.",
                expected=f"generation {self._first + self._writes}",
                found=f"generation {found}",
                todo="Find what else writes to configfs-tsm, or why the kernel did not take a write.",
            )

    def write(self, name: str, value: bytes) -> None:
        """Give the kernel a value by a single call of write, and count it."""
        path = self.path / name
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                written = os.write(descriptor, value)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as error:
            raise explain(error, f"writing {name}", path) from error
        if written != len(value):
            raise HardwareError(
                f"The kernel took only a part of {name}.",
                code="tsm.short-write",
                expected=f"{len(value)} bytes in one write()",
                found=f"{written} bytes",
                todo="Update the kernel: what is bound to a report is never cut.",
            )
        self._writes += 1

    def text(self, name: str) -> str:
        """Read a text attribute without its end of line."""
        raw = self._read(name, TEXT_LIMIT)
        try:
            return raw.decode("ascii").strip()
        except UnicodeDecodeError as error:
            raise HardwareError(
                f"{name} is no text.", code="tsm.attribute", expected="ASCII", found=repr(raw[:40])
            ) from error

    def blob(self, name: str) -> bytes:
        """Read a binary attribute; missing is an error, empty is not."""
        return self._read(name, BLOB_LIMIT)

    def optional_blob(self, name: str) -> bytes:
        """Read a binary attribute that a kernel or host may leave out; then it is empty."""
        return self.blob(name) if self._has(name) else b""

    def _has(self, name: str) -> bool:
        path = self.path / name
        try:
            path.stat()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise explain(error, f"looking for {name}", path) from error
        return True

    def _generation(self) -> int:
        return self._number("generation", 10**_GENERATION_DIGITS)

    def _number(self, name: str, most: int) -> int:
        text = self.text(name)
        if not text.isdecimal() or len(text) > _GENERATION_DIGITS or int(text) > most:
            raise HardwareError(
                f"{name} is no number that it may be.",
                code="tsm.attribute",
                expected=f"a decimal number up to {most}",
                found=repr(text[:40]),
                todo="Update the kernel.",
            )
        return int(text)

    def _read(self, name: str, limit: int) -> bytes:
        """Read an attribute to its end; one byte more than ``limit`` is an error, never cut off."""
        path = self.path / name
        parts: list[bytes] = []
        left = limit + 1
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while left and (part := os.read(descriptor, left)):
                    parts.append(part)
                    left -= len(part)
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as error:
            raise explain(error, f"reading {name}", path) from error
        if not left:
            raise HardwareError(
                f"{name} is larger than anything it may hold.",
                code="tsm.too-big",
                expected=f"at most {limit} bytes",
                found="more",
                todo="If it is the certificates, the host has to load fewer of them.",
            )
        return b"".join(parts)


def _missing(path: Path) -> ImageError:
    return ImageError(
        f"The kernel's report door has no attribute {path.name}.",
        code="tsm.attribute-missing",
        expected=str(path),
        found="nothing there",
        todo="Use Linux 6.7 or newer with CONFIG_TSM_REPORTS and CONFIG_SEV_GUEST.",
    )


def explain(error: OSError, doing: str, path: Path) -> KagimoriError:
    """Turn what the kernel said into who must act."""
    number = error.errno or 0
    found = f"{errno.errorcode.get(number, number)} ({os.strerror(number)}) on {path}"
    expected = f"{doing} succeeds"
    if number in (errno.EACCES, errno.EPERM):
        return UsageError(
            "Reports may be asked for by root only.",
            code="tsm.rights",
            expected=expected,
            found=found,
            todo="Run as root.",
        )
    meaning = _MEANINGS.get(
        number,
        Meaning(
            "tsm.errno", "The kernel failed the request in a way that it does not document.", "See `dmesg`."
        ),
    )
    kind = KeyWiped if number in _FINAL else HardwareError
    return kind(meaning.what, code=meaning.code, expected=expected, found=found, todo=meaning.todo)
