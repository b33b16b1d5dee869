"""Attestation reports from Linux's /dev/sev-guest: one ioctl, with pointers to request, response and certificates.

Source: include/uapi/linux/sev-guest.h (Linux 5.19 and newer); drivers/virt/coco/sev-guest/sev-guest.c, whose messages moved
to arch/x86/coco/sev/core.c in 6.14; AMD 56860, MSG_REPORT_REQ and MSG_REPORT_RSP; AMD 56421 (GHCB) for the host's part.

What makes the call below right, and is easy to get wrong:

- The driver waits for a host that throttles, every 2 s for up to a minute, and then gives up its message key (VMPCK): every
  later call is ENOTTY until the VM is launched anew. Any other failure between the driver and the firmware costs the
  key, too. So what failed is not asked again, whatever the errno.
- The one failure that costs nothing is a certificate buffer that is too small (EIO with vmm_error 1, and ``certs_len``
  rewritten to what the host needs). All that the driver takes is offered at once, so that this hardly happens; if it does,
  there is one more request and no third.
- A refusal by the *firmware* is a success of the call: it stands in the response's header, and there is no report.
- A success leaves the argument as it was: ``exitinfo2`` is copied back only if it is not zero.
- The certificate buffer comes back zeroed where the host supplied none.

Import budget: ``ctypes``, the standard library, the error tree, and the layout of a report.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from kagimori_agent.devices.report import DEAD_KEY, KeyWiped, Meaning, PlainReport, require_over
from kagimori_protocol.certificate_table import ENTRY_SIZE
from kagimori_protocol.errors import HardwareError, ImageError, KagimoriError, UsageError
from kagimori_protocol.snp_layout import FIELDS, REPORT_DATA_SIZE, REPORT_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

DEVICE: Final = Path("/dev/sev-guest")
VMPL_FILE: Final = Path("sys/devices/system/cpu/sev/vmpl")
"""The guest kernel's own VMPL, below the root directory (Linux 6.11 and newer)."""
VMPL_MAX: Final = 3

SNP_GET_REPORT: Final = 0xC0205300
"""_IOWR('S', 0x0, struct snp_guest_request_ioctl)."""
SNP_GET_EXT_REPORT: Final = 0xC0205302
"""_IOWR('S', 0x2, struct snp_guest_request_ioctl)."""

CERTIFICATES_MAX: Final = 0x4000
"""Bytes of certificates that the driver takes (SEV_FW_BLOB_MAX_SIZE)."""
PAGE_SIZE: Final = 0x1000
"""``certs_len`` is a multiple of it."""

_MESSAGE_VERSION: Final = 1
_VMM_ERROR_INVALID_LEN: Final = 1

RESPONSE_HEADER_SIZE: Final = 0x20
"""MSG_REPORT_RSP: STATUS, REPORT_SIZE, 24 reserved bytes, then the report."""
_STATUS: Final = {0x16: "INVALID_PARAMS", 0x27: "INVALID_KEY"}


class ReportRequest(ctypes.Structure):
    """struct snp_report_req, 96 bytes. ``rsvd`` is KEY_SEL and reserved of MSG_REPORT_REQ: 0, the VLEK if one is loaded."""

    _fields_ = (
        ("user_data", ctypes.c_uint8 * REPORT_DATA_SIZE),
        ("vmpl", ctypes.c_uint32),
        ("rsvd", ctypes.c_uint8 * 28),
    )


class ExtendedRequest(ctypes.Structure):
    """struct snp_ext_report_req, 112 bytes."""

    _fields_ = (
        ("data", ReportRequest),
        ("certs_address", ctypes.c_uint64),
        ("certs_len", ctypes.c_uint32),
    )


class ReportResponse(ctypes.Structure):
    """struct snp_report_resp, 4000 bytes."""

    _fields_ = (("data", ctypes.c_uint8 * 4000),)


class GuestRequest(ctypes.Structure):
    """struct snp_guest_request_ioctl, 32 bytes; the last two are also one number, ``exitinfo2``."""

    _fields_ = (
        ("msg_version", ctypes.c_uint8),
        ("req_data", ctypes.c_uint64),
        ("resp_data", ctypes.c_uint64),
        ("fw_error", ctypes.c_uint32),
        ("vmm_error", ctypes.c_uint32),
    )


_MEANINGS: Final[dict[int, Meaning]] = {
    errno.ENOTTY: Meaning(
        "sev-guest.key-wiped",
        "Linux has wiped its key to the firmware after an earlier failure (VMPCK is disabled).",
        DEAD_KEY,
    ),
    errno.ETIMEDOUT: Meaning(
        "sev-guest.throttled",
        "The host held the request back for a minute; Linux then wiped its key to the firmware.",
        DEAD_KEY + " Ask the host's operator about throttling of guest requests.",
    ),
    errno.EBADMSG: Meaning(
        "sev-guest.key-wiped",
        "The firmware's answer could not be decrypted, and Linux gave up its key to it.",
        DEAD_KEY,
    ),
    errno.EIO: Meaning(
        "sev-guest.firmware",
        "The AMD secure processor or the host failed to answer, and Linux gave up its key to the firmware.",
        DEAD_KEY,
    ),
    errno.EINVAL: Meaning(
        "sev-guest.invalid",
        "The driver calls the request invalid, and has sent none.",
        "Update the kernel: this agent keeps to the interface as it is since Linux 5.19.",
    ),
    errno.EFAULT: Meaning(
        "sev-guest.memory",
        "The driver could not reach the agent's memory, or could not share its own with the host.",
        "Power the VM off and start it again; `dmesg` has the reason.",
    ),
    errno.ENOMEM: Meaning(
        "sev-guest.memory", "The kernel has no memory for the request.", "Give the VM more memory."
    ),
    errno.EINTR: Meaning(
        "sev-guest.interrupted",
        "A signal ended the request. It may have reached the firmware, so it is not made again.",
        "Start the VM again, and find what sends signals to the agent.",
    ),
    errno.ENXIO: Meaning(
        "sev-guest.no-driver", "No driver stands behind the device.", "`modprobe sev-guest`; see `dmesg`."
    ),
    errno.ENODEV: Meaning(
        "sev-guest.no-driver", "No driver stands behind the device.", "`modprobe sev-guest`; see `dmesg`."
    ),
}
_FINAL: Final = frozenset({errno.ENOTTY, errno.ETIMEDOUT, errno.EBADMSG, errno.EIO})
"""After these the key is gone."""


class _TooSmall(Exception):
    """The host needs another size for its certificates: a step of the negotiation, which never leaves this module."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class SevGuest:
    """The report door at ``device``, for reports of one ``vmpl``: the guest's own, or a weaker one.

    ``offered`` is how many bytes of certificates are asked for first, a multiple of 4096: all that the driver takes.
    """

    def __init__(self, device: Path = DEVICE, *, vmpl: int, offered: int = CERTIFICATES_MAX) -> None:
        """Remember what to ask for; nothing is opened before a report is. Raises UsageError."""
        if vmpl not in range(VMPL_MAX + 1) or offered not in range(
            PAGE_SIZE, CERTIFICATES_MAX + 1, PAGE_SIZE
        ):
            raise UsageError(
                "There is no such report.",
                code="sev-guest.request",
                expected=f"VMPL 0 to {VMPL_MAX}, and 1 to {CERTIFICATES_MAX // PAGE_SIZE} pages for certificates",
                found=f"VMPL {vmpl}, {offered} bytes",
            )
        self.device = device
        self._vmpl = vmpl
        self._offered = offered

    def plain_report(self, report_data: bytes) -> PlainReport:
        """Ask AMD's firmware for a report with these 64 bytes of REPORT_DATA, and the host for its certificates.

        Blocks for up to a minute while the host throttles. Raises ImageError (no device), HardwareError (each errno and
        status by name; KeyWiped for what is final until the VM is launched anew), UsageError (size, rights).
        """
        if len(report_data) != REPORT_DATA_SIZE:
            raise UsageError(
                "REPORT_DATA has the wrong size; it is never padded or cut.",
                code="sev-guest.report-data",
                expected=f"{REPORT_DATA_SIZE} bytes",
                found=f"{len(report_data)} bytes",
            )
        request = ReportRequest(vmpl=self._vmpl)
        ctypes.memmove(request.user_data, report_data, REPORT_DATA_SIZE)
        with self._opened() as descriptor:
            response, table = self._ask(descriptor, request)
        report = parse_response(response)
        require_over(report, report_data)
        self._require_vmpl(report)
        return PlainReport(report, trimmed(table), "sev_guest")

    def _ask(self, descriptor: int, request: ReportRequest) -> tuple[bytes, bytes]:
        """Make the request; once more, with the size that the host names, if what was offered is too small.

        Where no size would do, the report goes without certificates, since the verifier may have them.
        """
        try:
            return self._extended(descriptor, request, self._offered)
        except _TooSmall as error:
            needed = error.needed
        try:
            if self._offered < needed <= CERTIFICATES_MAX and needed % PAGE_SIZE == 0:
                return self._extended(descriptor, request, needed)
            return self._issue(descriptor, SNP_GET_REPORT, request), b""
        except _TooSmall as error:
            raise HardwareError(
                "The host does not take the certificate buffer that it asked for.",
                code="sev-guest.certificates-size",
                expected=f"at most {needed} bytes of certificates",
                found=f"{error.needed or 'another number of'} bytes wanted now",
                todo="Ask the host's operator: it changes its certificates, or lies about their size.",
            ) from None

    def _extended(self, descriptor: int, request: ReportRequest, size: int) -> tuple[bytes, bytes]:
        certificates = (ctypes.c_uint8 * size)()
        extended = ExtendedRequest(request, ctypes.addressof(certificates), size)
        try:
            response = self._issue(descriptor, SNP_GET_EXT_REPORT, extended)
        except _TooSmall:
            raise _TooSmall(extended.certs_len) from None
        return response, bytes(certificates)

    def _issue(self, descriptor: int, command: int, request: ReportRequest | ExtendedRequest) -> bytes:
        """Make one call and copy its response. The structures stay alive over it: the driver has their addresses."""
        response = ReportResponse()
        argument = GuestRequest(
            msg_version=_MESSAGE_VERSION,
            req_data=ctypes.addressof(request),
            resp_data=ctypes.addressof(response),
        )
        try:
            ioctl(descriptor, command, argument)
        except OSError as error:
            if error.errno == errno.EIO and argument.vmm_error == _VMM_ERROR_INVALID_LEN:
                raise _TooSmall(0) from None
            errors = f"fw_error 0x{argument.fw_error:x}, vmm_error 0x{argument.vmm_error:x}"
            raise self._explain(error, "a report request succeeds", f", {errors}") from error
        return bytes(response.data)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            descriptor = os.open(self.device, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ImageError(
                "The kernel has no report door (sev-guest).",
                code="sev-guest.absent",
                expected=str(self.device),
                found="nothing there",
                todo="Use Linux 5.19 or newer with CONFIG_SEV_GUEST in an SEV-SNP VM; `modprobe sev-guest`.",
            ) from None
        except OSError as error:
            raise self._explain(error, "opening succeeds") from error
        try:
            yield descriptor
        finally:
            with contextlib.suppress(OSError):  # nothing was written that closing could lose
                os.close(descriptor)

    def _explain(self, error: OSError, expected: str, more: str = "") -> KagimoriError:
        """Turn what the kernel said into who must act."""
        number = error.errno or 0
        found = f"{errno.errorcode.get(number, number)} ({os.strerror(number)}) on {self.device}{more}"
        if number in (errno.EACCES, errno.EPERM):
            return UsageError(
                "Reports may be asked for by root only.",
                code="sev-guest.rights",
                expected=expected,
                found=found,
                todo="Run as root.",
            )
        unknown = Meaning(
            "sev-guest.errno", "The kernel failed in a way that its driver does not document.", "See `dmesg`."
        )
        meaning = _MEANINGS.get(number, unknown)
        kind = KeyWiped if number in _FINAL else HardwareError
        return kind(meaning.what, code=meaning.code, expected=expected, found=found, todo=meaning.todo)

    def _require_vmpl(self, report: bytes) -> None:
        place = FIELDS["vmpl"]
        found = int.from_bytes(report[place.offset : place.offset + place.size], "little")
        if found != self._vmpl:
            raise HardwareError(
                "A report is of another VMPL than was asked for.",
                code="sev-guest.other-vmpl",
                expected=f"VMPL {self._vmpl}",
                found=f"VMPL {found}",
                todo="Update the kernel: it answers with the report of another request.",
            )


def parse_response(response: bytes) -> bytes:
    """Take the 1184 bytes of a report out of a MSG_REPORT_RSP. Raises HardwareError with the firmware's status.

    The header's reserved bytes, and what follows the report, are not looked at: they decide nothing, and a newer firmware
    may use them.
    """
    status, size = (int.from_bytes(response[at : at + 4], "little") for at in (0, 4))
    report = response[RESPONSE_HEADER_SIZE : RESPONSE_HEADER_SIZE + REPORT_SIZE]
    if status:
        raise HardwareError(
            "The firmware refuses to make a report.",
            code="sev-guest.status",
            expected="STATUS 0 (AMD 56860, MSG_REPORT_RSP)",
            found=f"STATUS 0x{status:x} ({_STATUS.get(status, 'see AMD 56860, status codes')})",
            todo="A guest gets reports of its own VMPL and of weaker ones only: see /sys/devices/system/cpu/sev/vmpl.",
        )
    if size != REPORT_SIZE or len(report) != REPORT_SIZE:
        raise HardwareError(
            "A report has the wrong size.",
            code="sev-guest.report-size",
            expected=f"{REPORT_SIZE} bytes (AMD 56860, ATTESTATION_REPORT)",
            found=f"{size} bytes announced, {len(report)} there",
            todo="Update the kernel: a report of SEV-SNP has one size.",
        )
    return report


def trimmed(table: bytes) -> bytes:
    """Cut a certificate buffer to where its entries reach, as Linux does for configfs-tsm; all zeros are no table.

    A table without an end, or one that points outside, is left as it is: it is the verifier that judges it.
    """
    if not any(table):
        return b""
    reach = 0
    for at in range(0, len(table) - ENTRY_SIZE + 1, ENTRY_SIZE):
        row = table[at : at + ENTRY_SIZE]
        if not any(row):
            return table[: max(reach, at + ENTRY_SIZE)] if at else b""
        reach = max(reach, int.from_bytes(row[16:20], "little") + int.from_bytes(row[20:], "little"))
    return table


def own_vmpl(root: Path = Path("/")) -> int:
    """Read the VMPL that this kernel runs at; 0 where it does not tell, for kernels before 6.11 run at no other.

    Raises HardwareError for what is no VMPL.
    """
    path = root / VMPL_FILE
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return 0
    except OSError as error:
        text = str(error.strerror)
    if text not in map(str, range(VMPL_MAX + 1)):
        raise HardwareError(
            "The kernel does not tell its own VMPL.",
            code="sev-guest.vmpl",
            expected=f"0 to {VMPL_MAX} in {path}",
            found=ascii(text[:40]),
            todo="Update the kernel.",
        )
    return int(text)


def ioctl(descriptor: int, command: int, argument: GuestRequest) -> None:
    """Make the system call, which writes to ``argument`` also when it fails. Raises OSError.

    Not Python's own, which need not show what a failed call has written; and not repeated after EINTR, as the request
    may have been made.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ioctl(ctypes.c_int(descriptor), ctypes.c_ulong(command), ctypes.byref(argument)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
