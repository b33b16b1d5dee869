"""What every report door must do, whichever interface of the kernel lies behind it: one suite, a few lines for each door.

Each door is the agent's own device over a real mount of the simulated kernel. What is particular to one is tested beside it:
tests/unit/test_configfs_tsm.py, tests/unit/test_sev_guest.py, tests/contract/test_configfs_fuse.py.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kagimori_agent.devices.configfs_tsm import ConfigfsTsm
from kagimori_agent.devices.report import KeyWiped, PlainDoor, within
from kagimori_agent.devices.sev_guest import SevGuest
from kagimori_protocol import certificate_table
from kagimori_protocol.errors import HardwareError, ImageError
from kagimori_protocol.snp import REPORT_SIZE, Report
from kagimori_protocol.transcript import svsm_report_data
from kagimori_simulator import configfs, faults, sev_guest, sev_guest_fuse
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.svsm import VTPM_SERVICE, Svsm
from kagimori_simulator.vtpm import Vtpm

DATA = bytes(range(64))
RESPONSE_HEADER = 0x20


@dataclass
class Door:
    """One door, and hands to change what is behind it. ``ask`` gives report, certificates, and the data to be reported."""

    machine: SnpMachine
    ask: Callable[[], tuple[bytes, bytes, bytes]]
    behind: sev_guest.SevGuest | BusySvsm
    absent: Callable[[], object]

    @property
    def requests(self) -> int:
        """How many requests went out of the guest."""
        return len(self.behind.asked)

    def bend(self, change: Callable[[bytes], bytes]) -> None:
        """Change each report before the guest has it."""
        if isinstance(self.behind, BusySvsm):
            self.behind.bend = change
            return

        def bend(response: bytes) -> bytes:
            report = change(response[RESPONSE_HEADER:])
            return response[:4] + struct.pack("<I", len(report)) + response[8:RESPONSE_HEADER] + report

        self.behind.bend = bend


@dataclass
class BusySvsm(Svsm):
    """An SVSM whose host may be busy, silent or failing: what the driver is for the other doors."""

    asked: list[bytes] = field(default_factory=list)
    busy_until: float = 0
    stalled: threading.Event | None = None
    vmm_error: int = 0
    bend: Callable[[bytes], bytes] | None = None

    def attest_single_service(
        self, nonce: bytes, service_guid: uuid.UUID, manifest_version: int = 0
    ) -> tuple[bytes, bytes, bytes]:
        """Answer, late or not at all."""
        self.asked.append(nonce)
        if self.stalled is not None:
            self.stalled.wait()
        time.sleep(max(0.0, self.busy_until - time.monotonic()))
        if self.vmm_error:
            raise HardwareError("The host failed the SVSM.")
        report, manifest, table = super().attest_single_service(nonce, service_guid, manifest_version)
        return self.bend(report) if self.bend else report, manifest, table


@contextlib.contextmanager
def configfs_plain(root: AmdRoot, directory: Path) -> Iterator[Door]:
    """The plain report of configfs-tsm."""
    tsm = configfs.ConfigfsTsm(SnpMachine(root))
    with tsm.mounted(directory / "tsm") as mounted:

        def ask() -> tuple[bytes, bytes, bytes]:
            told = ConfigfsTsm(mounted).plain_report(DATA)
            return told.report, told.certificates, DATA

        yield Door(tsm.machine, ask, tsm.driver, lambda: ConfigfsTsm(directory / "none").plain_report(DATA))


@contextlib.contextmanager
def configfs_svsm(root: AmdRoot, directory: Path) -> Iterator[Door]:
    """The report of an SVSM's service through configfs-tsm."""
    with Vtpm.start(directory / "tpm") as vtpm:
        svsm = BusySvsm(SnpMachine(root, svsm=True), vtpm)
        with configfs.ConfigfsTsm(svsm.machine, svsm).mounted(directory / "tsm") as mounted:

            def ask() -> tuple[bytes, bytes, bytes]:
                told = ConfigfsTsm(mounted).service_report(DATA, VTPM_SERVICE)
                return told.report, told.certificates, svsm_report_data(DATA, told.manifest)

            none = ConfigfsTsm(directory / "none")
            yield Door(svsm.machine, ask, svsm, lambda: none.service_report(DATA, VTPM_SERVICE))


@contextlib.contextmanager
def sev_guest_device(root: AmdRoot, directory: Path) -> Iterator[Door]:
    """The ioctl of /dev/sev-guest."""
    driver = sev_guest.SevGuest(SnpMachine(root))
    with sev_guest_fuse.mounted(driver, directory / "sev-guest") as device:

        def ask() -> tuple[bytes, bytes, bytes]:
            told = SevGuest(device, vmpl=0).plain_report(DATA)
            return told.report, told.certificates, DATA

        none = SevGuest(directory / "none", vmpl=0)
        yield Door(driver.machine, ask, driver, lambda: none.plain_report(DATA))


DOORS = {
    "configfs-tsm": configfs_plain,
    "configfs-tsm, SVSM": configfs_svsm,
    "sev-guest": sev_guest_device,
}


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest, cache: Path, tmp_path: Path) -> Iterator[Door]:
    """Give each door in turn; a driver behind it tries again sooner than Linux would."""
    with DOORS[request.param](AmdRoot.cached(cache / "amd"), tmp_path) as opened:
        if isinstance(opened.behind, sev_guest.SevGuest):
            opened.behind.retry_delay_s = 0.05
        try:
            yield opened
        finally:
            if opened.behind.stalled is not None:
                opened.behind.stalled.set()  # let go of whom it held, or the unmount waits for them


def test_a_report_is_1184_bytes_over_the_data_that_was_asked(door: Door) -> None:
    """And of the VMPL that evidence must be of, from the machine that it runs on, by one request."""
    raw, _, report_data = door.ask()
    report = Report.parse(raw)
    assert len(raw) == REPORT_SIZE
    assert (report.report_data, report.vmpl) == (report_data, 0)
    assert report.report_id == door.machine.report_id
    assert door.requests == 1


def test_certificates_are_what_the_host_hands_out(door: Door) -> None:
    """Whether the host pads its table or not."""
    for padded in (False, True):
        door.machine.pad_certificates = padded
        _, certificates, _ = door.ask()
        entries = {entry.guid: entry.payload for entry in certificate_table.parse(certificates)}
        assert entries == door.machine.chain()


def test_a_report_without_certificates_is_whole(door: Door) -> None:
    """They are hints, and the verifier may have them."""
    faults.no_certificates(door.machine)
    report, certificates, _ = door.ask()
    assert len(report) == REPORT_SIZE
    assert certificate_table.parse(certificates) == ()


def test_a_busy_host_is_waited_for_by_one_request(door: Door) -> None:
    """The kernel waits, and nobody asks again meanwhile."""
    started = time.monotonic()
    door.behind.busy_until = started + 0.4
    report, _, _ = within(20, door.ask)
    assert len(report) == REPORT_SIZE
    assert time.monotonic() - started >= 0.4
    assert door.requests == 1


def test_a_host_that_never_answers_ends_with_the_time_that_is_left(door: Door) -> None:
    """Whoever boots is told, and can go on to the cap."""
    door.behind.stalled = threading.Event()
    started = time.monotonic()
    with pytest.raises(HardwareError) as caught:
        within(0.5, door.ask)
    assert 0.5 <= time.monotonic() - started < 5
    assert caught.value.code == "report.stalled"
    assert caught.value.todo
    assert door.requests == 1


def test_a_request_that_failed_is_not_made_again(door: Door) -> None:
    """It may have cost the key already; the error says what was expected, what was found and what to do."""
    door.behind.vmm_error = faults.VMM_GENERIC
    with pytest.raises(HardwareError) as caught:
        door.ask()
    assert door.requests == 1
    assert all((caught.value.code, caught.value.expected, caught.value.found, caught.value.todo))


@pytest.mark.parametrize("size", [0, REPORT_SIZE - 1, REPORT_SIZE + 1])
def test_a_report_of_another_size_is_refused(door: Door, size: int) -> None:
    """It is neither padded nor cut, nor asked for again."""
    door.bend(lambda report: report[:size].ljust(size, b"\x00"))
    with pytest.raises(HardwareError) as caught:
        door.ask()
    assert caught.value.code.endswith(".report-size")
    assert door.requests == 1


def test_a_report_over_other_data_is_refused(door: Door) -> None:
    """It proves nothing of this exchange, whoever mixed it up."""
    door.bend(lambda report: report[:0x50] + bytes([report[0x50] ^ 1]) + report[0x51:])
    with pytest.raises(HardwareError) as caught:
        door.ask()
    assert caught.value.code == "report.other-data"
    assert door.requests == 1


def test_a_door_that_is_not_there_is_the_images_matter(door: Door) -> None:
    """Nothing is broken: a module or a mount is missing, and the error says which."""
    with pytest.raises(ImageError) as caught:
        door.absent()
    assert all((caught.value.expected, caught.value.found, caught.value.todo))


@pytest.fixture
def both(cache: Path, tmp_path: Path) -> Iterator[tuple[sev_guest.SevGuest, ConfigfsTsm, SevGuest]]:
    """Give the two doors of one kernel, and the driver behind them."""
    tsm = configfs.ConfigfsTsm(SnpMachine(AmdRoot.cached(cache / "amd")))
    tsm.driver.retry_delay_s = 0.05
    with (
        tsm.mounted(tmp_path / "tsm") as mounted,
        sev_guest_fuse.mounted(tsm.driver, tmp_path / "sev-guest") as device,
    ):
        yield tsm.driver, ConfigfsTsm(mounted), SevGuest(device, vmpl=0)


def _throttle_too_long(driver: sev_guest.SevGuest) -> None:
    driver.retry_most_s = 0.1
    faults.throttling_host(driver, 60)


@pytest.mark.parametrize(
    "lie",
    [_throttle_too_long, faults.garbled_answers, faults.failing_host],
    ids=["throttled too long", "garbled", "failing"],
)
@pytest.mark.parametrize("first", [0, 1], ids=["configfs-tsm first", "sev-guest first"])
def test_what_costs_the_key_at_one_door_is_final_at_both(
    both: tuple[sev_guest.SevGuest, ConfigfsTsm, SevGuest],
    lie: Callable[[sev_guest.SevGuest], None],
    first: int,
) -> None:
    """One driver and one key are behind them: the other door is no way round, and neither sends a second message."""
    driver, *_ = both
    doors: tuple[PlainDoor, PlainDoor] = both[1:]
    lie(driver)
    with pytest.raises(HardwareError):
        doors[first].plain_report(DATA)
    driver.busy_until, driver.garbles, driver.vmm_error = 0, False, 0
    for each in (doors[first], doors[1 - first]):
        with pytest.raises(KeyWiped) as caught:
            each.plain_report(DATA)
        assert caught.value.code.endswith(".key-wiped")
        assert "start it again" in str(caught.value.todo)
    assert len(driver.asked) == 1


def test_a_bug_in_a_device_leaves_the_thread_as_it_is() -> None:
    """What a request raises is raised where it is waited for, whatever it is."""

    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        within(5, broken)


@pytest.mark.parametrize("wait_s", [float("inf"), 1e12])
def test_a_boot_that_may_wait_for_ever_does(wait_s: float) -> None:
    """More seconds than a clock can count are no error."""
    assert within(wait_s, lambda: 7) == 7


@pytest.mark.parametrize("wait_s", [0, -3])
def test_without_time_nothing_is_asked(wait_s: float) -> None:
    """A request that nobody waits for could only cost the key."""
    asked: list[int] = []
    with pytest.raises(HardwareError) as caught:
        within(wait_s, lambda: asked.append(1))
    time.sleep(0.05)
    assert asked == []
    assert caught.value.code == "report.stalled"
    assert "within 0 s" in str(caught.value.expected)
