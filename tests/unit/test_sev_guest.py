"""The agent's side of /dev/sev-guest: what goes into the ioctl, and what each way out of it means.

The simulated driver answers in this process, in place of the system call; tests/contract asks the same driver through a
real one. Where Linux would have to misbehave, the system call itself is made up.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kagimori_agent.devices import device_class, sev_guest
from kagimori_agent.devices.report import KeyWiped
from kagimori_agent.devices.sev_guest import (
    CERTIFICATES_MAX,
    ExtendedRequest,
    GuestRequest,
    ReportRequest,
    ReportResponse,
    SevGuest,
    own_vmpl,
    parse_response,
    trimmed,
)
from kagimori_protocol import certificate_table
from kagimori_protocol.errors import HardwareError, ImageError, KagimoriError, UsageError
from kagimori_protocol.snp import REPORT_SIZE, Report
from kagimori_simulator import faults
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine, pack_certificate_table
from kagimori_simulator.sev_guest import SevGuest as Driver

DATA = bytes(range(64))


class OwnMemory:
    """The memory of this process, as the driver reaches it; garbage is collected first, so that what died is gone."""

    def read(self, address: int, size: int) -> bytes:
        gc.collect()
        return ctypes.string_at(address, size)

    def write(self, address: int, data: bytes) -> None:
        gc.collect()
        ctypes.memmove(address, data, len(data))


class Kernel:
    """A kernel whose driver is the simulated one, at the file ``device``; ``calls`` are the ioctls made."""

    def __init__(self, device: Path, machine: SnpMachine, monkeypatch: pytest.MonkeyPatch) -> None:
        device.touch()
        self.device = device
        self.driver = Driver(machine, retry_delay_s=0.01, retry_most_s=0.05)
        self.calls: list[tuple[int, bytes]] = []
        self.fails: int = 0
        monkeypatch.setattr(sev_guest, "ioctl", self._ioctl)

    def _ioctl(self, descriptor: int, command: int, argument: GuestRequest) -> None:
        os.fstat(descriptor)  # open, still
        self.calls.append((command, bytes(argument)))
        if self.fails:
            raise OSError(self.fails, os.strerror(self.fails))
        result, out = self.driver.ioctl(command, bytes(argument), OwnMemory())
        ctypes.memmove(ctypes.addressof(argument), out, len(out))
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def door(self, vmpl: int = 0, offered: int = CERTIFICATES_MAX) -> SevGuest:
        """Open it as the agent does."""
        return SevGuest(self.device, vmpl=vmpl, offered=offered)


@pytest.fixture
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture
def kernel(tmp_path: Path, root: AmdRoot, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Give a kernel without an SVSM below it."""
    return Kernel(tmp_path / "sev-guest", SnpMachine(root), monkeypatch)


def refused(ask: Callable[[], object]) -> KagimoriError:
    """Give the error that this ends with; it has all its parts."""
    with pytest.raises(KagimoriError) as caught:
        ask()
    assert all((caught.value.what, caught.value.expected, caught.value.found, caught.value.todo))
    return caught.value


@pytest.mark.parametrize(
    ("structure", "size", "offsets"),
    [
        (ReportRequest, 96, {"user_data": 0, "vmpl": 64, "rsvd": 68}),
        (ExtendedRequest, 112, {"data": 0, "certs_address": 96, "certs_len": 104}),
        (ReportResponse, 4000, {"data": 0}),
        (
            GuestRequest,
            32,
            {"msg_version": 0, "req_data": 8, "resp_data": 16, "fw_error": 24, "vmm_error": 28},
        ),
    ],
)
def test_structures_lie_in_memory_as_the_kernels_header_says(
    structure: type[ctypes.Structure], size: int, offsets: dict[str, int]
) -> None:
    """include/uapi/linux/sev-guest.h, with the padding that a C compiler puts in."""
    assert ctypes.sizeof(structure) == size
    assert {name: getattr(structure, name).offset for name, *_ in structure._fields_} == offsets


def test_the_numbers_of_the_calls_are_those_of_the_kernels_macro() -> None:
    """_IOWR('S', nr, struct snp_guest_request_ioctl): direction, size, type, number."""
    both_ways = 3
    for nr, number in ((0, sev_guest.SNP_GET_REPORT), (2, sev_guest.SNP_GET_EXT_REPORT)):
        assert number == both_ways << 30 | ctypes.sizeof(GuestRequest) << 16 | ord("S") << 8 | nr


def test_a_report_is_one_extended_request_that_names_its_vmpl(kernel: Kernel) -> None:
    """Message version 1, all the certificates that fit, reserved bytes zero, exitinfo2 zero before the call."""
    told = kernel.door().plain_report(DATA)
    assert Report.parse(told.report).report_data == DATA
    assert certificate_table.parse(told.certificates)
    ((command, argument),) = kernel.calls
    assert command == sev_guest.SNP_GET_EXT_REPORT
    assert (argument[0], argument[1:8], argument[24:]) == (1, bytes(7), bytes(8))
    assert kernel.driver.asked == [DATA + bytes(32)]


def test_a_guest_under_an_svsm_gets_reports_of_its_own_vmpl_and_of_weaker_ones(
    kernel: Kernel, root: AmdRoot
) -> None:
    """A stronger one is the firmware's to refuse, and the key lives on: the call itself was a success."""
    kernel.driver.machine = SnpMachine(root, svsm=True)
    for vmpl in (2, 3):
        assert Report.parse(kernel.door(vmpl).plain_report(DATA).report).vmpl == vmpl
    for vmpl in (0, 1):
        error = refused(lambda vmpl=vmpl: kernel.door(vmpl).plain_report(DATA))  # type: ignore[misc]  # a default binds it
        assert (error.code, type(error)) == ("sev-guest.status", HardwareError)
        assert "0x16 (INVALID_PARAMS)" in str(error.found)
    assert not kernel.driver.wiped


@pytest.mark.parametrize(
    ("status", "name"), [(0x16, "INVALID_PARAMS"), (0x27, "INVALID_KEY"), (0x1, "status codes")]
)
def test_the_firmwares_no_is_told_by_its_name(kernel: Kernel, status: int, name: str) -> None:
    """The kernel's call succeeds; what says no is the response's header."""
    kernel.driver.status = status
    error = refused(lambda: kernel.door().plain_report(DATA))
    assert error.code == "sev-guest.status"
    assert f"0x{status:x}" in str(error.found)
    assert name in str(error.found)


@pytest.mark.parametrize(
    ("number", "code", "final"),
    [
        (errno.ENOTTY, "sev-guest.key-wiped", True),
        (errno.EBADMSG, "sev-guest.key-wiped", True),
        (errno.ETIMEDOUT, "sev-guest.throttled", True),
        (errno.EIO, "sev-guest.firmware", True),
        (errno.EINVAL, "sev-guest.invalid", False),
        (errno.EFAULT, "sev-guest.memory", False),
        (errno.ENOMEM, "sev-guest.memory", False),
        (errno.EINTR, "sev-guest.interrupted", False),
        (errno.ENXIO, "sev-guest.no-driver", False),
        (errno.ENODEV, "sev-guest.no-driver", False),
        (errno.EPROTO, "sev-guest.errno", False),
    ],
)
def test_each_errno_has_a_name_and_a_remedy_and_is_not_tried_again(
    kernel: Kernel, number: int, code: str, final: bool
) -> None:
    """What is final is an error of its own kind; nothing at all, an interrupted call included, is repeated."""
    kernel.fails = number
    error = refused(lambda: kernel.door().plain_report(DATA))
    assert error.code == code
    assert isinstance(error, HardwareError)
    assert isinstance(error, KeyWiped) is final
    assert errno.errorcode[number] in str(error.found)
    assert len(kernel.calls) == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM])
def test_without_the_rights_the_caller_is_told(kernel: Kernel, number: int) -> None:
    """Not the machine is broken, but who called."""
    kernel.fails = number
    error = refused(lambda: kernel.door().plain_report(DATA))
    assert (error.code, type(error)) == ("sev-guest.rights", UsageError)


@pytest.mark.parametrize("number", [errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EMFILE])
def test_a_device_that_cannot_be_opened_is_explained_by_its_errno(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The node can outlive its driver."""

    def no(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", no)
    error = refused(lambda: kernel.door().plain_report(DATA))
    assert errno.errorcode[number] in str(error.found)
    assert kernel.calls == []


def test_a_device_that_is_not_there_is_the_images_matter(kernel: Kernel) -> None:
    """The module is not loaded, or this is no SNP VM."""
    kernel.device.unlink()
    error = refused(lambda: kernel.door().plain_report(DATA))
    assert (error.code, type(error)) == ("sev-guest.absent", ImageError)
    assert str(kernel.device) == error.expected


def test_the_hosts_own_error_is_told_in_full(kernel: Kernel) -> None:
    """fw_error and vmm_error are what an operator of the host can look up."""
    faults.failing_host(kernel.driver)
    error = refused(lambda: kernel.door().plain_report(DATA))
    assert isinstance(error, KeyWiped)
    assert "vmm_error 0x80000000" in str(error.found)
    assert kernel.driver.wiped


def test_a_host_that_throttles_for_too_long_costs_the_key(kernel: Kernel) -> None:
    """And from then on there is only one answer, whatever is asked."""
    faults.throttling_host(kernel.driver, 60)
    assert refused(lambda: kernel.door().plain_report(DATA)).code == "sev-guest.throttled"
    kernel.driver.busy_until = 0
    for _ in range(2):
        assert refused(lambda: kernel.door().plain_report(DATA)).code == "sev-guest.key-wiped"
    assert len(kernel.driver.asked) == 1


@pytest.mark.parametrize("lie", [faults.report_of_other_data, faults.report_of_another_vmpl])
def test_the_answer_to_another_request_is_refused(kernel: Kernel, lie: Callable[[Driver], None]) -> None:
    """Nobody else's report is shown to a verifier as ours."""
    lie(kernel.driver)
    error = refused(lambda: kernel.door().plain_report(DATA))
    assert error.code in {"report.other-data", "sev-guest.other-vmpl"}
    assert len(kernel.calls) == 1


def test_a_size_that_was_offered_too_small_is_asked_for_once_more(kernel: Kernel) -> None:
    """EIO with vmm_error 1 is no failure: certs_len says what to offer, and the key lives."""
    told = kernel.door(offered=0x1000).plain_report(DATA)
    assert told.certificates == kernel.driver.machine.certificate_table()
    assert len(kernel.calls) == 2
    assert not kernel.driver.wiped


def test_certificates_beyond_what_linux_takes_do_not_cost_the_report(kernel: Kernel) -> None:
    """It is asked for without them, by one more request; the verifier may know them."""
    faults.too_many_certificates(kernel.driver.machine)
    told = kernel.door().plain_report(DATA)
    assert (len(told.report), told.certificates) == (REPORT_SIZE, b"")
    assert [command for command, _ in kernel.calls] == [
        sev_guest.SNP_GET_EXT_REPORT,
        sev_guest.SNP_GET_REPORT,
    ]


@pytest.mark.parametrize("pages", [0, 1, 4, 5, 1 << 20, (1 << 32) - 1])
def test_a_host_that_lies_about_its_need_gets_no_third_request(kernel: Kernel, pages: int) -> None:
    """Also where its lie wraps around 32 bits: what cannot be offered, or was offered, is not offered again."""
    faults.insatiable_host(kernel.driver, pages)
    told = kernel.door().plain_report(DATA)
    assert (len(told.report), told.certificates) == (REPORT_SIZE, b"")
    assert len(kernel.calls) == 2


def test_a_host_that_asks_for_a_size_and_does_not_take_it_is_refused(kernel: Kernel) -> None:
    """The negotiation has two steps, and no loop."""
    faults.insatiable_host(kernel.driver, 2)
    error = refused(lambda: kernel.door(offered=0x1000).plain_report(DATA))
    assert (error.code, type(error)) == ("sev-guest.certificates-size", HardwareError)
    assert len(kernel.calls) == 2
    assert not kernel.driver.wiped


@pytest.mark.parametrize("size", [0, 32, 63, 65, 128])
def test_data_of_another_size_is_refused_before_anything_is_opened(kernel: Kernel, size: int) -> None:
    """What a report binds is never padded or cut."""
    assert refused_usage(lambda: kernel.door().plain_report(bytes(size))) == "sev-guest.report-data"
    assert kernel.calls == []


@pytest.mark.parametrize(
    ("vmpl", "offered"), [(-1, 0x1000), (4, 0x1000), (0, 0), (0, 0x1001), (0, 0x5000), (0, -0x1000)]
)
def test_a_request_that_the_driver_would_not_take_is_not_made(vmpl: int, offered: int) -> None:
    """There are four VMPLs, and one to four pages of certificates."""
    assert refused_usage(lambda: SevGuest(vmpl=vmpl, offered=offered)) == "sev-guest.request"


def refused_usage(ask: Callable[[], object]) -> str:
    """Give the code of the caller's own error."""
    with pytest.raises(UsageError) as caught:
        ask()
    return caught.value.code


def response(status: int, size: int, report: bytes) -> bytes:
    """Lay out a MSG_REPORT_RSP."""
    return status.to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(24) + report


@given(
    raw=st.binary(max_size=4100)
    | st.builds(
        response,
        st.sampled_from([0, 0, 0, 0x16, 0x27, 0xFFFFFFFF]),
        st.sampled_from([0, REPORT_SIZE - 1, REPORT_SIZE, REPORT_SIZE + 1, 0xFFFFFFFF]),
        st.binary(min_size=REPORT_SIZE - 2, max_size=REPORT_SIZE + 2) | st.just(bytes(3968)),
    )
)
@example(raw=b"")
@example(raw=bytes(4000))
@example(raw=response(0, REPORT_SIZE, bytes(REPORT_SIZE)))
def test_any_response_is_a_report_or_a_named_error(raw: bytes) -> None:
    """A report comes out only where the status is 0, the size is the one size, and all of it is there."""
    header, body = raw[:8].ljust(8, b"\x00"), raw[32 : 32 + REPORT_SIZE]
    whole = header == response(0, REPORT_SIZE, b"")[:8] and len(body) == REPORT_SIZE
    try:
        report = parse_response(raw)
    except HardwareError as error:
        assert not whole
        assert error.code in {"sev-guest.status", "sev-guest.report-size"}  # noqa: PT017 - both outcomes are right
    else:
        assert whole
        assert report == body


@given(payloads=st.lists(st.binary(min_size=1, max_size=60), max_size=4), padding=st.integers(0, 200))
@example(payloads=[b"\x30\x00\x00\x00"], padding=64)
def test_a_table_loses_its_padding_and_nothing_else(payloads: list[bytes], padding: int) -> None:
    """A payload may itself end in zeros."""
    table = pack_certificate_table({uuid.uuid4(): payload for payload in payloads}) if payloads else b""
    assert trimmed(table.ljust(len(table) + padding, b"\x00")) == table


@given(table=st.binary(max_size=400))
def test_what_is_no_table_is_handed_on_or_cut_but_never_made_up(table: bytes) -> None:
    """Whether it is one is the verifier's to say."""
    assert table.startswith(trimmed(table))


@pytest.mark.parametrize(("text", "vmpl"), [(None, 0), ("0\n", 0), ("2\n", 2), ("3", 3)])
def test_a_kernel_tells_its_own_vmpl_or_is_too_old_to_have_another_than_0(
    tmp_path: Path, text: str | None, vmpl: int
) -> None:
    """Linux 6.11 brought both the file and the guest that runs below an SVSM."""
    if text is not None:
        (tmp_path / sev_guest.VMPL_FILE).parent.mkdir(parents=True)
        (tmp_path / sev_guest.VMPL_FILE).write_text(text)
    assert own_vmpl(tmp_path) == vmpl


@pytest.mark.parametrize("text", ["", "4\n", "-1\n", "two\n", "0x2\n", "2 2\n", "\xff\n"])
def test_a_vmpl_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    """Nothing is guessed where the kernel says something."""
    (tmp_path / sev_guest.VMPL_FILE).parent.mkdir(parents=True)
    (tmp_path / sev_guest.VMPL_FILE).write_text(text, encoding="latin-1")
    assert refused(lambda: own_vmpl(tmp_path)).code == "sev-guest.vmpl"


def test_a_vmpl_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    """A directory in its place stands for any error of reading."""
    (tmp_path / sev_guest.VMPL_FILE).mkdir(parents=True)
    assert refused(lambda: own_vmpl(tmp_path)).code == "sev-guest.vmpl"


def test_the_real_call_fails_on_what_is_no_device(tmp_path: Path) -> None:
    """Linux says ENOTTY for any file that does not know the call; nothing of the argument is believed then."""
    (tmp_path / "file").touch()
    error = refused(lambda: SevGuest(tmp_path / "file", vmpl=0).plain_report(DATA))
    assert error.code == "sev-guest.key-wiped"


def test_the_door_is_found_by_its_name() -> None:
    """The table of doors is the whole list."""
    assert device_class("sev-guest") is SevGuest
