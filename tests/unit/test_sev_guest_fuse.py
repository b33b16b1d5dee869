"""The simulated device as a file: real system calls, from this process and from others, and its end whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kagimori_agent.devices.sev_guest import SevGuest as Device
from kagimori_protocol.errors import HardwareError
from kagimori_simulator import faults, sev_guest_fuse
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.sev_guest import ARGUMENT, SNP_GET_REPORT, VMM_INVALID_LEN, SevGuest

DATA = bytes(range(64))
NOWHERE = 0x10
"""An address in the first page, which no process has."""


@pytest.fixture
def driver(cache: Path) -> SevGuest:
    """Give the driver of a guest without an SVSM."""
    return SevGuest(SnpMachine(AmdRoot.cached(cache / "amd")), retry_delay_s=0.05)


@pytest.fixture
def device(driver: SevGuest, tmp_path: Path) -> Iterator[Path]:
    """Serve it at a file."""
    with sev_guest_fuse.mounted(driver, tmp_path / "sev-guest") as path:
        yield path


def call(path: Path, command: int, argument: bytes) -> tuple[int, bytes]:
    """Make an ioctl; gives its errno (or 0), and the argument as it is afterwards."""
    buffer = ctypes.create_string_buffer(argument, len(argument))
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file:
        result = libc.ioctl(file.fileno(), ctypes.c_ulong(command), buffer)
        return (ctypes.get_errno() if result < 0 else 0), buffer.raw


def test_the_file_is_roots_alone(device: Path) -> None:
    """As the device node is."""
    assert stat.S_IMODE(device.stat().st_mode) == 0o600
    assert device.stat().st_uid == os.getuid()


@pytest.mark.parametrize("pointers", [(NOWHERE, NOWHERE), (1 << 63, 1 << 63)])
def test_a_pointer_to_nowhere_is_efault(device: Path, driver: SevGuest, pointers: tuple[int, int]) -> None:
    """In the caller's memory, not in the server's."""
    assert call(device, SNP_GET_REPORT, ARGUMENT.pack(1, *pointers, 0))[0] == errno.EFAULT
    assert driver.asked == []


def test_a_call_of_some_other_device_is_enotty(device: Path) -> None:
    """TCGETS and its like; also a number of ours with another size."""
    for command in (0x5401, 0xC0185300, 0xC0205309):
        assert call(device, command, ARGUMENT.pack(1, NOWHERE, NOWHERE, 0))[0] == errno.ENOTTY


def test_a_call_that_fails_changes_the_argument_all_the_same(device: Path, driver: SevGuest) -> None:
    """The size negotiation lives from that, and through FUSE it is not a matter of course."""
    faults.insatiable_host(driver, 2)
    with pytest.raises(HardwareError) as caught:
        Device(device, vmpl=0, offered=0x1000).plain_report(DATA)
    assert caught.value.code == "sev-guest.certificates-size"
    faults.failing_host(driver, VMM_INVALID_LEN + 6)
    with pytest.raises(HardwareError) as caught:
        Device(device, vmpl=0).plain_report(DATA)
    assert "vmm_error 0x7" in str(caught.value.found)


def test_another_process_gets_its_own_answer(device: Path) -> None:
    """What the agent is to the simulator, with its memory closed to others of its user."""
    code = (
        "import sys; from pathlib import Path; from kagimori_agent import memory\n"
        "from kagimori_agent.devices.sev_guest import SevGuest\n"
        "memory.forbid_core_dumps()\n"
        "told = SevGuest(Path(sys.argv[1]), vmpl=0).plain_report(bytes(range(64)))\n"
        "sys.stdout.buffer.write(told.report[0x50:0x90])"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(device)], capture_output=True, check=True)
    assert ran.stdout == DATA


def test_many_callers_get_each_its_own_report(device: Path) -> None:
    """The driver serves them one after the other."""
    asked = [bytes([number]) * 64 for number in range(8)]
    given: dict[bytes, bytes] = {}

    def ask(data: bytes) -> None:
        given[data] = Device(device, vmpl=0).plain_report(data).report[0x50:0x90]

    threads = [threading.Thread(target=ask, args=(data,)) for data in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert given == {data: data for data in asked}


def test_a_request_that_is_held_does_not_hold_the_file(device: Path, driver: SevGuest) -> None:
    """Looking at the device must not hang because the host does."""
    released = faults.silent_host(driver)
    asking = threading.Thread(target=Device(device, vmpl=0).plain_report, args=(DATA,))
    asking.start()
    started = time.monotonic()
    assert device.stat().st_size == 0
    assert time.monotonic() - started < 5
    released.set()
    asking.join(10)
    assert not asking.is_alive()


@pytest.fixture
def held(device: Path, driver: SevGuest) -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that asks for a report which the host holds back; it has a handler for SIGUSR1."""
    code = (
        "import signal, sys; from pathlib import Path\n"
        "from kagimori_agent.devices.sev_guest import SevGuest\n"
        "signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        "SevGuest(Path(sys.argv[1]), vmpl=0).plain_report(bytes(64))\n"
    )
    driver.stalled = threading.Event()
    with subprocess.Popen([sys.executable, "-c", code, str(device)]) as process:
        try:
            while not driver.asked and process.poll() is None:
                time.sleep(0.01)
            yield process
        finally:
            driver.stalled.set()
            process.kill()


def test_a_caller_that_is_killed_is_let_go(held: subprocess.Popen[bytes]) -> None:
    """FUSE would keep the dead process, and whoever waits for it, until the host answers."""
    held.kill()
    assert held.wait(10) == -signal.SIGKILL


def test_another_signal_does_not_end_a_request(held: subprocess.Popen[bytes], driver: SevGuest) -> None:
    """As in the driver: it goes on, and the caller gets its report."""
    held.send_signal(signal.SIGUSR1)
    with pytest.raises(subprocess.TimeoutExpired):
        held.wait(0.5)
    assert driver.stalled is not None
    driver.stalled.set()
    assert held.wait(10) == 0
    assert len(driver.asked) == 1


def test_unmounting_ends_a_request_that_is_still_held(driver: SevGuest, tmp_path: Path) -> None:
    """A world can end while an agent waits for a host that never answers."""
    released = faults.silent_host(driver)
    errors: list[BaseException] = []

    def ask(path: Path) -> None:
        try:
            Device(path, vmpl=0).plain_report(DATA)
        except BaseException as error:  # noqa: BLE001 - looked at below
            errors.append(error)

    started = time.monotonic()
    with sev_guest_fuse.mounted(driver, tmp_path / "sev-guest") as path:
        asking = threading.Thread(target=ask, args=(path,))
        asking.start()
        while not driver.asked:
            time.sleep(0.01)
    asking.join(10)
    released.set()
    assert time.monotonic() - started < 10
    assert [getattr(error, "code", None) for error in errors] == ["sev-guest.errno"]  # ECONNABORTED
    assert mounts(tmp_path) == []


def mounts(directory: Path) -> list[str]:
    """List what is mounted below a directory."""
    return [line for line in Path("/proc/mounts").read_text().splitlines() if f" {directory}" in line]


def test_the_mount_goes_with_the_process_that_serves_it(cache: Path, tmp_path: Path) -> None:
    """Killed, it leaves no dead file behind."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from kagimori_simulator import sev_guest_fuse\n"
        "from kagimori_simulator.amd import AmdRoot\n"
        "from kagimori_simulator.machine import SnpMachine\n"
        "from kagimori_simulator.sev_guest import SevGuest\n"
        "driver = SevGuest(SnpMachine(AmdRoot.cached(Path(sys.argv[2]))))\n"
        "with sev_guest_fuse.mounted(driver, Path(sys.argv[1])):\n"
        "    print('up', flush=True); time.sleep(60)\n"
    )
    AmdRoot.cached(cache / "amd")
    command = [sys.executable, "-c", code, str(tmp_path / "sev-guest"), str(cache / "amd")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        assert len(mounts(tmp_path)) == 1
        process.send_signal(signal.SIGKILL)
    for _ in range(100):
        if not mounts(tmp_path):
            break
        time.sleep(0.05)
    assert mounts(tmp_path) == []


def test_without_fuse_the_error_says_what_it_takes(
    driver: SevGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root, and /dev/fuse."""
    opened = os.open

    def without_fuse(path: str | Path, *arguments: int) -> int:
        if path == "/dev/fuse":
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", without_fuse)
    with (
        pytest.raises(HardwareError) as caught,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(sev_guest_fuse.mounted(driver, tmp_path / "sev-guest"))
    assert caught.value.code == "simulator.fuse"
    assert "root" in str(caught.value.todo)
