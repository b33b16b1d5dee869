"""The simulated device over CUSE: the kernel's end is ours, the memory real, and so is the agent that calls."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit import cuse_kernel
from tests.unit.cuse_kernel import FuseError, Kernel

from kagimori_agent.devices import sev_guest
from kagimori_agent.devices.report import KeyWiped
from kagimori_agent.devices.sev_guest import SevGuest as Device
from kagimori_protocol.errors import HardwareError
from kagimori_protocol.snp import REPORT_SIZE, Report
from kagimori_simulator import faults, fuse_messages, sev_guest_cuse
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine, certificate_extent
from kagimori_simulator.sev_guest import (
    ARGUMENT,
    EXITINFO2_UNSET,
    EXTENDED_TAIL,
    REPORT_REQUEST,
    RESPONSE_SIZE,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    VMM_INVALID_LEN,
    SevGuest,
)
from kagimori_simulator.sev_guest_cuse import CuseServer

DATA = bytes(range(64))
NOWHERE = 0x10
"""An address in the first page, which no process has."""
TCGETS = 0x5401


@pytest.fixture
def driver(cache: Path) -> SevGuest:
    """Give the driver of a guest without an SVSM."""
    return SevGuest(SnpMachine(AmdRoot.cached(cache / "amd")), retry_delay_s=0.05)


@pytest.fixture
def end() -> Iterator[Kernel]:
    """Give a kernel whose device nobody is yet."""
    kernel = Kernel()
    yield kernel
    kernel.close()


@pytest.fixture
def server(driver: SevGuest, end: Kernel) -> CuseServer:
    """Give the driver's server, to which nothing has been said yet."""
    return CuseServer(driver, end.end.fileno())


@pytest.fixture
def kernel(server: CuseServer, end: Kernel) -> Iterator[Kernel]:
    """Give a kernel whose device the server is."""
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    # Without CUSE_UNRESTRICTED_IOCTL the kernel would copy by the number of the command, and refuse to come again.
    assert end.init() == (1, {"DEVNAME": "sev-guest"})
    yield end
    end.hang_up()
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def device(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the agent's ioctl reach that kernel; the file that it opens is only there to be opened."""
    path = tmp_path / "sev-guest"
    path.touch()

    def ioctl(_descriptor: int, command: int, argument: sev_guest.GuestRequest) -> None:
        handle = kernel.open()
        result = kernel.ioctl(handle, command, ctypes.addressof(argument))
        kernel.release(handle)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    monkeypatch.setattr(sev_guest, "ioctl", ioctl)
    return path


class Caller:
    """A process's memory: argument, request, response and certificates, each in a place of its own."""

    def __init__(self, certs_len: int | None = None) -> None:
        request = REPORT_REQUEST.pack(DATA, 0, b"")
        self.certificates = ctypes.create_string_buffer(b"\xee" * 0x4000, 0x4000)
        if certs_len is not None:
            request += EXTENDED_TAIL.pack(ctypes.addressof(self.certificates), certs_len)
        self.request = ctypes.create_string_buffer(request, len(request))
        self.response = ctypes.create_string_buffer(b"\xdd" * RESPONSE_SIZE, RESPONSE_SIZE)
        self.argument = ctypes.create_string_buffer(
            ARGUMENT.pack(1, ctypes.addressof(self.request), ctypes.addressof(self.response), 0x1234),
            ARGUMENT.size,
        )

    def point(self, *, request: int | None = None, response: int | None = None) -> None:
        """Let the argument point elsewhere."""
        version, old_request, old_response, exitinfo2 = ARGUMENT.unpack(self.argument.raw)
        request = old_request if request is None else request
        response = old_response if response is None else response
        self.argument.raw = ARGUMENT.pack(version, request, response, exitinfo2)

    @property
    def exitinfo2(self) -> int:
        """What the driver left there, or 0x1234."""
        return int(ARGUMENT.unpack(self.argument.raw)[3])

    def call(self, kernel: Kernel, command: int) -> int:
        """Make the ioctl in a file of its own."""
        handle = kernel.open()
        try:
            return kernel.ioctl(handle, command, ctypes.addressof(self.argument))
        finally:
            kernel.release(handle)


def test_the_agent_gets_a_report_and_the_hosts_certificates(device: Path, driver: SevGuest) -> None:
    """The agent's own code, over real memory; only the system call goes elsewhere."""
    report = Device(device, vmpl=0).plain_report(DATA)
    assert Report.parse(report.report).report_data == DATA
    table = driver.machine.certificate_table()
    assert report.certificates == table[: certificate_extent(table)]


def test_a_plain_report_takes_four_rounds_and_leaves_the_argument_as_it_was(kernel: Kernel) -> None:
    """Nothing, the argument, the request, then room for the response alone: exitinfo2 is not copied out.

    In the last one the argument comes again: Linux would send rubbish where nothing is to be copied in any more.
    """
    caller = Caller()
    assert caller.call(kernel, SNP_GET_REPORT) == 0
    assert kernel.rounds == [
        (0, 0),
        (ARGUMENT.size, 0),
        (REPORT_REQUEST.size, 0),
        (ARGUMENT.size, RESPONSE_SIZE),
    ]
    assert caller.exitinfo2 == 0x1234
    status, size = struct.unpack_from("<II", caller.response.raw)
    assert (status, size) == (0, REPORT_SIZE)
    assert Report.parse(caller.response.raw[32 : 32 + REPORT_SIZE]).report_data == DATA


def test_an_extended_report_fills_the_certificate_buffer_and_nothing_behind_it(
    kernel: Kernel, driver: SevGuest
) -> None:
    """Two pages were offered, and two are written."""
    caller = Caller(0x2000)
    assert caller.call(kernel, SNP_GET_EXT_REPORT) == 0
    assert kernel.rounds[2:] == [(112, 0), (ARGUMENT.size, 0x2000 + RESPONSE_SIZE)]
    table = driver.machine.certificate_table()
    assert caller.certificates.raw == table.ljust(0x2000, b"\x00").ljust(0x4000, b"\xee")
    assert len(driver.asked) == 1


def test_a_buffer_that_is_too_small_is_eio_and_only_the_size_and_the_argument_change(
    kernel: Kernel, driver: SevGuest
) -> None:
    """vmm_error 1, never ENOSPC; response and certificates stay as they were, and the key lives."""
    caller = Caller(0x1000)
    assert caller.call(kernel, SNP_GET_EXT_REPORT) == -errno.EIO
    assert caller.exitinfo2 == VMM_INVALID_LEN << 32
    assert EXTENDED_TAIL.unpack(caller.request.raw[96:])[1] == 0x2000
    assert caller.response.raw == b"\xdd" * RESPONSE_SIZE
    assert caller.certificates.raw == b"\xee" * 0x4000
    assert not driver.wiped


def test_the_agent_negotiates_the_size(device: Path, driver: SevGuest) -> None:
    """One more request, with what the host needs."""
    report = Device(device, vmpl=0, offered=0x1000).plain_report(DATA)
    assert report.certificates
    assert len(driver.asked) == 2


def test_a_wiped_key_is_enotty_without_a_look_at_the_request(
    kernel: Kernel, driver: SevGuest, device: Path
) -> None:
    """Also where the request's pointer leads nowhere; to the agent it is final."""
    faults.wiped_key(driver)
    caller = Caller()
    caller.point(request=NOWHERE)
    assert caller.call(kernel, SNP_GET_REPORT) == -errno.ENOTTY
    assert caller.exitinfo2 == 0x1234
    with pytest.raises(KeyWiped) as caught:
        Device(device, vmpl=0).plain_report(DATA)
    assert caught.value.code == "sev-guest.key-wiped"


@pytest.mark.parametrize("command", [TCGETS, SNP_GET_REPORT + 9, 0])
def test_an_unknown_call_is_enotty_and_says_that_nobody_answered(kernel: Kernel, command: int) -> None:
    """The driver has the argument by then, whatever size the number names."""
    caller = Caller()
    assert caller.call(kernel, command) == -errno.ENOTTY
    assert caller.exitinfo2 == EXITINFO2_UNSET


def test_a_caller_of_32_bits_is_enotty(kernel: Kernel) -> None:
    """The driver has no compat_ioctl."""
    caller = Caller()
    handle = kernel.open()
    compat = cuse_kernel.UNRESTRICTED | sev_guest_cuse.IOCTL_COMPAT
    assert kernel.ioctl(handle, SNP_GET_REPORT, ctypes.addressof(caller.argument), compat) == -errno.ENOTTY


def test_an_argument_or_a_request_nowhere_is_efault_and_never_sent(kernel: Kernel, driver: SevGuest) -> None:
    """The kernel says so before the server could; the next call on the same file is not disturbed."""
    handle = kernel.open()
    caller = Caller()
    assert kernel.ioctl(handle, SNP_GET_REPORT, NOWHERE) == -errno.EFAULT
    caller.point(request=NOWHERE)
    assert kernel.ioctl(handle, SNP_GET_REPORT, ctypes.addressof(caller.argument)) == -errno.EFAULT
    assert driver.asked == []
    again = Caller()
    assert kernel.ioctl(handle, SNP_GET_REPORT, ctypes.addressof(again.argument)) == 0


def test_a_response_nowhere_is_efault_after_the_request(kernel: Kernel, driver: SevGuest) -> None:
    """As with the driver, it has been sent by then."""
    caller = Caller()
    caller.point(response=NOWHERE)
    assert caller.call(kernel, SNP_GET_REPORT) == -errno.EFAULT
    assert (len(driver.asked), driver.wiped) == (1, False)


def test_one_call_asks_the_firmware_once_though_the_kernel_comes_four_times(
    kernel: Kernel, driver: SevGuest
) -> None:
    """A request that is run again has no second effect."""
    for count in (1, 2, 3):
        assert Caller(0x4000).call(kernel, SNP_GET_EXT_REPORT) == 0
        assert len(driver.asked) == count


def test_a_busy_host_costs_time_and_nothing_else(kernel: Kernel, driver: SevGuest) -> None:
    """The caller sees one long call."""
    faults.throttling_host(driver, 0.2)
    began = time.monotonic()
    assert Caller(0x4000).call(kernel, SNP_GET_EXT_REPORT) == 0
    assert time.monotonic() - began >= 0.2


def hold(kernel: Kernel, handle: int, caller: Caller) -> int:
    """Bring an ioctl to where the driver works; gives the number of the message that it will answer."""
    data, argument_at = b"", ctypes.addressof(caller.argument)
    for following in (caller.argument.raw, caller.request.raw):
        head = struct.pack("<QIIQII", handle, 2, SNP_GET_REPORT, argument_at, len(data), 0)
        kernel.ask(cuse_kernel.IOCTL, head + data)
        data = following
    head = struct.pack("<QIIQII", handle, 2, SNP_GET_REPORT, argument_at, len(data), 0)
    return kernel.send(cuse_kernel.IOCTL, head + data)


def test_a_held_request_does_not_hold_the_device_for_others(kernel: Kernel, driver: SevGuest) -> None:
    """Somebody may open and close it meanwhile, and the answer still comes."""
    release = faults.silent_host(driver)
    held = hold(kernel, kernel.open(), Caller())
    kernel.release(kernel.open())
    release.set()
    assert struct.unpack_from("<iIII", kernel.answer(held)) == (0, sev_guest_cuse.IOCTL_RETRY, 1, 1)


def test_a_killed_caller_is_let_go_and_leaves_nothing_behind(
    kernel: Kernel, server: CuseServer, driver: SevGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE keeps the dead until there is an answer; what their call has left goes with the file."""
    release = faults.silent_host(driver)
    handle = kernel.open()
    held = hold(kernel, handle, Caller())
    kernel.send(cuse_kernel.INTERRUPT, struct.pack("<Q", held))
    kernel.release(kernel.open())  # the living wait on: this answer comes first
    monkeypatch.setattr(fuse_messages, "_is_killed", lambda _: True)
    kernel.send(cuse_kernel.INTERRUPT, struct.pack("<Q", held))
    with pytest.raises(FuseError) as caught:
        kernel.answer(held)
    assert caught.value.errno == errno.EINTR
    kernel.release(handle)
    release.set()
    kernel.answer(held)  # a real kernel has forgotten the number, and drops this
    assert server._calls == {}


@pytest.mark.parametrize(("opcode", "number"), [(cuse_kernel.READ, errno.EINVAL), (40, errno.ENOSYS)])
def test_what_the_driver_has_no_function_for_is_refused(kernel: Kernel, opcode: int, number: int) -> None:
    """Read is EINVAL as without a function; poll is ENOSYS, from which the kernel learns not to ask again."""
    with pytest.raises(FuseError) as caught:
        kernel.ask(opcode, bytes(40))
    assert caught.value.errno == number


def test_a_round_of_no_call_is_eio(kernel: Kernel) -> None:
    """The server never trusts that it remembers a call."""
    head = struct.pack("<QIIQII", 77, 2, SNP_GET_REPORT, 0, 32, 0)
    with pytest.raises(FuseError) as caught:
        kernel.ask(cuse_kernel.IOCTL, head + bytes(32))
    assert caught.value.errno == errno.EIO


def test_a_kernel_without_cuse_is_told_at_once(driver: SevGuest, tmp_path: Path) -> None:
    """With what to do."""
    with pytest.raises(HardwareError) as caught, sev_guest_cuse.served(driver, channel=tmp_path / "cuse"):
        pass
    assert caught.value.code == "simulator.cuse"
    assert "modprobe cuse" in str(caught.value.todo)


def test_a_device_that_is_there_already_is_not_served_a_second_time(driver: SevGuest, tmp_path: Path) -> None:
    """It could be real."""
    (tmp_path / "sev-guest").touch()
    with pytest.raises(HardwareError) as caught, sev_guest_cuse.served(driver, channel=tmp_path / "cuse"):
        pass
    assert caught.value.found == "one that is there already"
