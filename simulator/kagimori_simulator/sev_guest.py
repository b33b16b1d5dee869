"""Linux's driver behind /dev/sev-guest over a simulated machine: what it does with each request, errno by errno.

Source: include/uapi/linux/sev-guest.h; drivers/virt/coco/sev-guest/sev-guest.c, whose messages to the firmware moved to
arch/x86/coco/sev/core.c in Linux 6.14; AMD 56860, MSG_REPORT_REQ and MSG_REPORT_RSP; AMD 56421 (GHCB), SNP Guest Request.

This is the logic alone: the argument's bytes come in, the caller's memory is reached through ``Memory``, and a result goes
out. All that a request reads is read before it has any effect, so a front end may also run it again with more memory at
hand. ``sev_guest_fuse`` serves it as a file; ``configfs`` asks it for plain reports, because both doors of a kernel have
one driver and one message key behind them. Keys are not derived (SNP_GET_DERIVED_KEY): nothing here asks for one.

OSError is raised on purpose here: an errno is what the kernel says.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from kagimori_protocol.errors import HardwareError
from kagimori_protocol.snp import REPORT_DATA_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable

    from kagimori_simulator.machine import SnpMachine

SNP_GET_REPORT: Final = 0xC0205300
SNP_GET_EXT_REPORT: Final = 0xC0205302

ARGUMENT: Final = struct.Struct("<B7xQQQ")
"""struct snp_guest_request_ioctl: msg_version, req_data, resp_data, exitinfo2 (fw_error below, vmm_error above)."""
REPORT_REQUEST: Final = struct.Struct("<64sI28s")
"""struct snp_report_req: user_data, vmpl, and what MSG_REPORT_REQ calls KEY_SEL and reserved."""
EXTENDED_TAIL: Final = struct.Struct("<QI4x")
"""struct snp_ext_report_req after its snp_report_req: certs_address, certs_len."""
RESPONSE_SIZE: Final = 4000
"""struct snp_report_resp."""

CERTIFICATES_MAX: Final = 0x4000
"""SEV_FW_BLOB_MAX_SIZE."""
PAGE: Final = 0x1000
EXITINFO2_UNSET: Final = 0xFF
VMM_INVALID_LEN: Final = 1
VMM_BUSY: Final = 2

STATUS_INVALID_PARAM: Final = 0x16
STATUS_INVALID_KEY: Final = 0x27
_KEY_SELECTIONS: Final = {0: None, 1: "vcek", 2: "vlek"}
"""MSG_REPORT_REQ KEY_SEL: whichever there is, or exactly that one."""


class Memory(Protocol):
    """The memory of the process that calls. OSError with EFAULT for what is not there."""

    def read(self, address: int, size: int) -> bytes:
        """Copy from the caller."""

    def write(self, address: int, data: bytes) -> None:
        """Copy to the caller."""


@dataclass
class _Message:
    """One MSG_REPORT_REQ on its way: what it asks, the pages offered for certificates, and what came back."""

    request: bytes
    extended: bool
    pages: int
    exitinfo2: int = EXITINFO2_UNSET


@dataclass
class SevGuest:
    """The driver of one guest. What a test may set: the state of the message key, and what the host and the firmware do.

    ``wiped``: the message key (VMPCK) is gone. ``busy_until``: moment of ``time.monotonic`` until which the host throttles.
    ``stalled``: the host holds a request until this is set. ``vmm_error``: the host's answer to everything. ``needs_pages``:
    what the host claims to need for certificates, whatever it is offered. ``garbles``: answers do not decrypt. ``status``:
    of the firmware's answer. ``bend``: changes an answer before the guest gets it. ``retry_*``: the driver's patience.
    ``asked``: every MSG_REPORT_REQ that went out, the driver's own repetitions not counted.
    """

    machine: SnpMachine
    wiped: bool = False
    busy_until: float = 0
    stalled: threading.Event | None = None
    vmm_error: int = 0
    needs_pages: int | None = None
    garbles: bool = False
    status: int = 0
    bend: Callable[[bytes], bytes] | None = None
    retry_delay_s: float = 2
    retry_most_s: float = 60
    asked: list[bytes] = field(default_factory=list)
    _mutex: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def ioctl(self, command: int, argument: bytes, memory: Memory) -> tuple[int, bytes]:
        """Serve one call; ``argument`` is its 32 bytes, already copied in. Gives the result, and what is copied out.

        The result is 0 or a negative errno. As in the driver, the argument is copied out if its exitinfo2 is not zero,
        which also says that a success copies nothing out.
        """
        msg_version, req_data, resp_data, _ = ARGUMENT.unpack(argument)
        if not msg_version:
            return -errno.EINVAL, b""
        message = _Message(b"", extended=command == SNP_GET_EXT_REPORT, pages=0)
        with self._mutex:
            if self.wiped:
                return -errno.ENOTTY, b""
            result = 0
            try:
                if command == SNP_GET_REPORT:
                    self._get_report(message, req_data, resp_data, memory)
                elif command == SNP_GET_EXT_REPORT:
                    self._get_ext_report(message, req_data, resp_data, memory)
                else:
                    result = -errno.ENOTTY
            except OSError as error:
                result = -(error.errno or errno.EIO)
        if not message.exitinfo2:
            return result, b""
        return result, ARGUMENT.pack(msg_version, req_data, resp_data, message.exitinfo2)

    def report_new(self, report_data: bytes, vmpl: int) -> tuple[bytes, bytes]:
        """Serve configfs-tsm's plain report: 1184 bytes and the host's table, untrimmed.

        Raises OSError: ENOTTY for a wiped key, EINVAL or ENXIO for the firmware's refusals, else as the request failed.
        """
        if len(report_data) != REPORT_DATA_SIZE:
            _refuse(errno.EINVAL)
        with self._mutex:
            if self.wiped:
                _refuse(errno.ENOTTY)
            request = REPORT_REQUEST.pack(report_data, vmpl, b"")
            response, table = self._send(_Message(request, extended=True, pages=CERTIFICATES_MAX // PAGE))
        status, size = struct.unpack_from("<II", response)
        if status:
            _refuse(errno.EINVAL if status in (STATUS_INVALID_PARAM, STATUS_INVALID_KEY) else errno.ENXIO)
        if size + 0x20 > PAGE:
            _refuse(errno.ENOMEM)
        return response[0x20 : 0x20 + size], table

    def _get_report(self, message: _Message, req_data: int, resp_data: int, memory: Memory) -> None:
        if not req_data or not resp_data:
            _refuse(errno.EINVAL)
        message.request = memory.read(req_data, REPORT_REQUEST.size)
        response, _ = self._send(message)
        memory.write(resp_data, response)

    def _get_ext_report(self, message: _Message, req_data: int, resp_data: int, memory: Memory) -> None:
        if not req_data or not resp_data:
            _refuse(errno.EINVAL)
        raw = memory.read(req_data, REPORT_REQUEST.size + EXTENDED_TAIL.size)
        message.request = raw[: REPORT_REQUEST.size]
        certs_address, certs_len = EXTENDED_TAIL.unpack(raw[REPORT_REQUEST.size :])
        if certs_address and certs_len:
            if certs_len > CERTIFICATES_MAX or certs_len % PAGE:
                _refuse(errno.EINVAL)
            message.pages = certs_len // PAGE
        offered = message.pages
        try:
            response, table = self._send(message)
        except OSError:
            if message.exitinfo2 >> 32 == VMM_INVALID_LEN:
                needed = message.pages * PAGE & 0xFFFFFFFF
                memory.write(req_data, message.request + EXTENDED_TAIL.pack(certs_address, needed))
            raise
        if offered:
            memory.write(certs_address, table.ljust(certs_len, b"\x00"))
        memory.write(resp_data, response)

    def _send(self, message: _Message) -> tuple[bytes, bytes]:
        """Exchange one message with the firmware (snp_send_guest_request); whatever fails here costs the key.

        The one exception is a buffer that was too small: the driver then repeats the request without certificates, so
        that the sequence number moves on, and the key lives.
        """
        self.asked.append(message.request)
        try:
            self._through_the_host(message)
            if self.garbles:
                _refuse(errno.EBADMSG)
        except OSError as error:
            if error.errno != errno.EIO or message.exitinfo2 != VMM_INVALID_LEN << 32:
                self.wiped = True
            raise
        table = self.machine.certificate_table() if message.extended and message.pages else b""
        return self._firmware(message.request), table

    def _through_the_host(self, message: _Message) -> None:
        started = time.monotonic()
        needed: int | None = None
        while vmm_error := self._vmgexit(message):
            if vmm_error == VMM_BUSY:
                message.exitinfo2 = VMM_BUSY << 32
                if time.monotonic() - started > self.retry_most_s:
                    _refuse(errno.ETIMEDOUT)
                time.sleep(self.retry_delay_s)
            elif vmm_error == VMM_INVALID_LEN and message.extended:
                needed = self._pages_needed()
                message.extended = False
            else:
                message.exitinfo2 = vmm_error << 32
                _refuse(errno.EIO)
        message.exitinfo2 = 0
        if needed is not None:
            message.pages = needed
            message.exitinfo2 = VMM_INVALID_LEN << 32
            _refuse(errno.EIO)

    def _vmgexit(self, message: _Message) -> int:
        """Let the host look at a request; gives its error, or 0 once the firmware has answered."""
        if self.stalled is not None:
            self.stalled.wait()
        if time.monotonic() < self.busy_until:
            return VMM_BUSY
        if self.vmm_error:
            return self.vmm_error
        if message.extended and (self.needs_pages is not None or self._pages_needed() > message.pages):
            return VMM_INVALID_LEN
        return 0

    def _pages_needed(self) -> int:
        if self.needs_pages is not None:
            return self.needs_pages
        return -(-len(self.machine.certificate_table()) // PAGE)

    def _firmware(self, request: bytes) -> bytes:
        """Answer a MSG_REPORT_REQ by a MSG_REPORT_RSP, in the 4000 bytes that the driver hands on."""
        report_data, vmpl, rest = REPORT_REQUEST.unpack(request)
        key_selection = int.from_bytes(rest[:4], "little")
        status, report = self.status, b""
        if key_selection not in _KEY_SELECTIONS or any(rest[4:]):
            status = STATUS_INVALID_PARAM
        elif _KEY_SELECTIONS[key_selection] not in (None, self.machine.signer):
            status = STATUS_INVALID_KEY
        if not status:
            try:
                report = self.machine.report(report_data, vmpl, vmpck=self.machine.guest_vmpl)
            except HardwareError:
                status = STATUS_INVALID_PARAM
        response = struct.pack("<II24x", status, len(report)) + report
        if self.bend is not None:
            response = self.bend(response)
        return response.ljust(RESPONSE_SIZE, b"\x00")


def _refuse(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))
