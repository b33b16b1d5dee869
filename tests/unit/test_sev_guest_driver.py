"""The simulated driver does what sev-guest.c does: what is checked in which order, what is copied out, what costs the key."""

from __future__ import annotations

import errno
import struct
from pathlib import Path

import pytest

from kagimori_protocol.snp import REPORT_SIZE, Report
from kagimori_simulator import faults
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.sev_guest import (
    ARGUMENT,
    EXITINFO2_UNSET,
    EXTENDED_TAIL,
    REPORT_REQUEST,
    RESPONSE_SIZE,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    VMM_BUSY,
    VMM_INVALID_LEN,
    SevGuest,
)

DATA = bytes(range(64))
REQUEST_AT, RESPONSE_AT, CERTIFICATES_AT = 0x1000, 0x2000, 0x10000
DERIVED_KEY = 0xC0205301
MAX = 0x4000


class Memory:
    """A caller's memory: nothing but the pieces that are put there."""

    def __init__(self, **pieces: bytes) -> None:
        places = {"request": REQUEST_AT, "response": RESPONSE_AT, "certificates": CERTIFICATES_AT}
        self.pieces = {places[name]: bytearray(content) for name, content in pieces.items()}

    def read(self, address: int, size: int) -> bytes:
        piece = self.pieces.get(address, b"")
        if len(piece) < size:
            raise OSError(errno.EFAULT, "no such memory")
        return bytes(piece[:size])

    def write(self, address: int, data: bytes) -> None:
        self.read(address, len(data))
        self.pieces[address][: len(data)] = data

    @property
    def response(self) -> bytes:
        """What the driver wrote."""
        return bytes(self.pieces[RESPONSE_AT])

    @property
    def certs_len(self) -> int:
        """The size in the request, which the driver may have changed."""
        return int.from_bytes(self.pieces[REQUEST_AT][104:108], "little")


def plain(vmpl: int = 0, rest: bytes = b"") -> Memory:
    """Lay out a plain request."""
    return Memory(request=REPORT_REQUEST.pack(DATA, vmpl, rest), response=bytes(RESPONSE_SIZE))


def extended(certs_len: int, address: int = CERTIFICATES_AT) -> Memory:
    """Lay out an extended request."""
    request = REPORT_REQUEST.pack(DATA, 0, b"") + EXTENDED_TAIL.pack(address, certs_len)
    return Memory(request=request, response=bytes(RESPONSE_SIZE), certificates=b"\xee" * MAX)


def argument(version: int = 1, request: int = REQUEST_AT, response: int = RESPONSE_AT) -> bytes:
    """Lay out the ioctl's argument, with an exitinfo2 that the driver must not look at."""
    return ARGUMENT.pack(version, request, response, 0x1234)


def exitinfo2(copied_out: bytes) -> int:
    """Take exitinfo2 out of what was copied out."""
    return int(ARGUMENT.unpack(copied_out)[3])


@pytest.fixture
def driver(cache: Path) -> SevGuest:
    """Give the driver of a guest without an SVSM; it is less patient than Linux's."""
    return SevGuest(SnpMachine(AmdRoot.cached(cache / "amd")), retry_delay_s=0.01, retry_most_s=0.05)


def test_a_success_writes_the_response_and_copies_nothing_out(driver: SevGuest) -> None:
    """exitinfo2 is zero then, and the driver copies its argument back only if it is not."""
    memory = plain()
    assert driver.ioctl(SNP_GET_REPORT, argument(), memory) == (0, b"")
    status, size = struct.unpack_from("<II", memory.response)
    assert (status, size, len(memory.response)) == (0, REPORT_SIZE, RESPONSE_SIZE)
    assert Report.parse(memory.response[32 : 32 + REPORT_SIZE]).report_data == DATA
    assert not any(memory.response[32 + REPORT_SIZE :])


def test_message_version_0_is_einval_before_anything_else(driver: SevGuest) -> None:
    """Also once the key is gone; nothing is copied out, and nothing asked."""
    for wiped in (False, True):
        driver.wiped = wiped
        assert driver.ioctl(SNP_GET_REPORT, argument(version=0), plain()) == (-errno.EINVAL, b"")
    assert driver.asked == []


def test_a_wiped_key_is_enotty_whatever_is_asked(driver: SevGuest) -> None:
    """Before any pointer is followed."""
    driver.wiped = True
    for command in (SNP_GET_REPORT, SNP_GET_EXT_REPORT, 0):
        assert driver.ioctl(command, argument(request=0), Memory()) == (-errno.ENOTTY, b"")


@pytest.mark.parametrize("command", [SNP_GET_REPORT, SNP_GET_EXT_REPORT])
@pytest.mark.parametrize("pointers", [{"request": 0}, {"response": 0}])
def test_null_pointers_are_einval_and_exitinfo2_comes_back_as_it_was_preset(
    driver: SevGuest, command: int, pointers: dict[str, int]
) -> None:
    """0xff: no answer of anybody."""
    result, out = driver.ioctl(command, argument(**pointers), plain())
    assert (result, exitinfo2(out)) == (-errno.EINVAL, EXITINFO2_UNSET)
    assert not driver.wiped


@pytest.mark.parametrize("command", [0, SNP_GET_REPORT + 3, DERIVED_KEY])
def test_an_unknown_call_is_enotty_and_says_in_exitinfo2_that_nobody_answered(
    driver: SevGuest, command: int
) -> None:
    """Derived keys are not simulated."""
    result, out = driver.ioctl(command, argument(), plain())
    assert (result, exitinfo2(out)) == (-errno.ENOTTY, EXITINFO2_UNSET)


@pytest.mark.parametrize("command", [SNP_GET_REPORT, SNP_GET_EXT_REPORT])
def test_a_request_that_cannot_be_read_is_efault_and_never_sent(driver: SevGuest, command: int) -> None:
    """The key lives on."""
    result, out = driver.ioctl(command, argument(), Memory(response=bytes(RESPONSE_SIZE)))
    assert (result, exitinfo2(out)) == (-errno.EFAULT, EXITINFO2_UNSET)
    assert (driver.asked, driver.wiped) == ([], False)


@pytest.mark.parametrize("command", [SNP_GET_REPORT, SNP_GET_EXT_REPORT])
def test_a_response_that_cannot_be_written_is_efault_after_the_request(
    driver: SevGuest, command: int
) -> None:
    """The firmware has answered by then, so the key lives on."""
    memory = extended(MAX)
    del memory.pieces[RESPONSE_AT]
    assert driver.ioctl(command, argument(), memory) == (-errno.EFAULT, b"")
    assert (len(driver.asked), driver.wiped) == (1, False)


def test_certificates_that_cannot_be_written_are_efault(driver: SevGuest) -> None:
    """They are written before the response, which stays as it was."""
    memory = extended(MAX)
    del memory.pieces[CERTIFICATES_AT]
    assert driver.ioctl(SNP_GET_EXT_REPORT, argument(), memory) == (-errno.EFAULT, b"")
    assert not any(memory.response)


@pytest.mark.parametrize("certs_len", [1, 0xFFF, 0x1001, MAX + 1, MAX + 0x1000, 0xFFFFF000])
def test_a_buffer_of_another_size_than_whole_pages_up_to_16_kib_is_einval(
    driver: SevGuest, certs_len: int
) -> None:
    """Before anything is sent."""
    result, out = driver.ioctl(SNP_GET_EXT_REPORT, argument(), extended(certs_len))
    assert (result, exitinfo2(out)) == (-errno.EINVAL, EXITINFO2_UNSET)
    assert (driver.asked, driver.wiped) == ([], False)


def test_a_buffer_is_filled_to_its_end(driver: SevGuest) -> None:
    """The table, then zeros, over whatever was there."""
    memory = extended(MAX)
    assert driver.ioctl(SNP_GET_EXT_REPORT, argument(), memory)[0] == 0
    table = driver.machine.certificate_table()
    assert bytes(memory.pieces[CERTIFICATES_AT]) == table.ljust(MAX, b"\x00")


def test_a_host_without_certificates_leaves_a_buffer_of_zeros(driver: SevGuest) -> None:
    """That is how it says so."""
    faults.no_certificates(driver.machine)
    memory = extended(0x1000)
    assert driver.ioctl(SNP_GET_EXT_REPORT, argument(), memory)[0] == 0
    assert bytes(memory.pieces[CERTIFICATES_AT]) == bytes(0x1000).ljust(MAX, b"\xee")


@pytest.mark.parametrize(
    ("certs_len", "address"), [(0x1000, CERTIFICATES_AT), (0, CERTIFICATES_AT), (MAX, 0)]
)
def test_a_buffer_that_is_too_small_or_none_is_eio_with_the_size_that_would_do(
    driver: SevGuest, certs_len: int, address: int
) -> None:
    """vmm_error 1, certs_len rewritten, no response; the driver made a plain request meanwhile, so the key lives."""
    memory = extended(certs_len, address)
    result, out = driver.ioctl(SNP_GET_EXT_REPORT, argument(), memory)
    assert (result, exitinfo2(out)) == (-errno.EIO, VMM_INVALID_LEN << 32)
    assert memory.certs_len == 0x2000
    assert not any(memory.response)
    assert not driver.wiped
    assert driver.ioctl(SNP_GET_EXT_REPORT, argument(), extended(memory.certs_len))[0] == 0


def test_who_wants_no_certificates_gets_a_report_where_the_host_has_none(driver: SevGuest) -> None:
    """A size of 0 is no error by itself."""
    faults.no_certificates(driver.machine)
    memory = extended(0)
    assert driver.ioctl(SNP_GET_EXT_REPORT, argument(), memory) == (0, b"")
    assert any(memory.response)


def test_a_busy_host_is_asked_again_by_the_driver(driver: SevGuest) -> None:
    """The caller sees one long call, and one message went out."""
    driver.retry_most_s = 60
    faults.throttling_host(driver, 0.1)
    memory = plain()
    assert driver.ioctl(SNP_GET_REPORT, argument(), memory) == (0, b"")
    assert len(driver.asked) == 1


def test_a_host_that_stays_busy_is_etimedout_and_costs_the_key(driver: SevGuest) -> None:
    """After that there is ENOTTY, and nothing brings the key back."""
    faults.throttling_host(driver, 60)
    result, out = driver.ioctl(SNP_GET_REPORT, argument(), plain())
    assert (result, exitinfo2(out)) == (-errno.ETIMEDOUT, VMM_BUSY << 32)
    driver.busy_until = 0
    assert driver.ioctl(SNP_GET_REPORT, argument(), plain()) == (-errno.ENOTTY, b"")


def test_an_error_of_the_host_is_eio_and_costs_the_key(driver: SevGuest) -> None:
    """Its number stands in vmm_error."""
    faults.failing_host(driver)
    result, out = driver.ioctl(SNP_GET_EXT_REPORT, argument(), extended(MAX))
    assert (result, exitinfo2(out)) == (-errno.EIO, faults.VMM_GENERIC << 32)
    assert driver.wiped


def test_a_busy_host_in_the_middle_of_the_size_negotiation_costs_the_key_as_ever(driver: SevGuest) -> None:
    """The plain request that saves the key must itself get through."""
    driver.needs_pages = 2
    vmgexit = driver._vmgexit

    def then_busy(message: object) -> int:
        given = vmgexit(message)  # type: ignore[arg-type]  # the driver's own message
        faults.throttling_host(driver, 60)
        return given

    driver._vmgexit = then_busy  # type: ignore[method-assign]  # the host acts between two requests
    result, _ = driver.ioctl(SNP_GET_EXT_REPORT, argument(), extended(MAX))
    assert (result, driver.wiped) == (-errno.ETIMEDOUT, True)


def test_an_answer_that_does_not_decrypt_is_ebadmsg_and_costs_the_key(driver: SevGuest) -> None:
    """The host had already said that all was well, so nothing is copied out."""
    faults.garbled_answers(driver)
    assert driver.ioctl(SNP_GET_REPORT, argument(), plain()) == (-errno.EBADMSG, b"")
    assert driver.wiped


@pytest.mark.parametrize(("vmpl", "status"), [(0, 0x16), (1, 0x16), (2, 0), (3, 0), (4, 0x16)])
def test_the_firmware_refuses_a_stronger_vmpl_in_its_own_header(
    driver: SevGuest, vmpl: int, status: int
) -> None:
    """The call is a success, and the key lives on."""
    driver.machine = SnpMachine(driver.machine.root, svsm=True)
    memory = plain(vmpl)
    assert driver.ioctl(SNP_GET_REPORT, argument(), memory) == (0, b"")
    assert struct.unpack_from("<II", memory.response) == (status, 0 if status else REPORT_SIZE)
    assert not driver.wiped


@pytest.mark.parametrize(
    ("rest", "status"),
    [
        (b"\x01", 0),
        (b"\x02", 0x27),
        (b"\x03", 0x16),
        (b"\x00\x01", 0x16),
        (b"\x00\x00\x00\x00\x01", 0x16),
        (bytes(27) + b"\x01", 0x16),
    ],
    ids=["VCEK", "no VLEK", "no key", "a flag", "reserved", "the last reserved byte"],
)
def test_key_selection_and_reserved_bytes_are_the_firmwares_to_judge(
    driver: SevGuest, rest: bytes, status: int
) -> None:
    """Linux hands on what its header calls rsvd."""
    memory = plain(0, rest)
    assert driver.ioctl(SNP_GET_REPORT, argument(), memory) == (0, b"")
    assert struct.unpack_from("<I", memory.response) == (status,)
