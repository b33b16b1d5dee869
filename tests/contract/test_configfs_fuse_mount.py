"""The simulated configfs-tsm as a mount: who may use it at once, and that it never stays behind or gets in the way."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kagimori_protocol.errors import HardwareError
from kagimori_protocol.snp import Report
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.configfs import ConfigfsTsm
from kagimori_simulator.machine import SnpMachine

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def root(cache: Path) -> AmdRoot:
    """Give the run's Milan root."""
    return AmdRoot.cached(cache / "amd")


@pytest.fixture
def item(root: AmdRoot, tmp_path: Path) -> Iterator[Path]:
    """Mount the door of a guest without an SVSM, and make one item."""
    with ConfigfsTsm(SnpMachine(root)).mounted(tmp_path / "tsm") as directory:
        (directory / "report" / "x").mkdir()
        yield directory / "report" / "x"


def test_a_shell_can_use_it(item: Path) -> None:
    """Another program, with redirections that truncate and a reader with its own block size."""
    script = 'head -c 64 /dev/zero >"$1/inblob" && dd if="$1/outblob" bs=100 2>/dev/null | wc -c && cat "$1/generation"'
    done = subprocess.run(["sh", "-c", script, "sh", str(item)], capture_output=True, check=True, timeout=20)
    assert done.stdout.split() == [b"1184", b"1"]


def test_many_threads_of_the_mounting_process_do_not_deadlock(item: Path) -> None:
    """File operations release the interpreter's lock, so the mount's own thread always gets on."""
    wrong: list[str] = []

    def use(number: int) -> None:
        mine = item.parent / f"t{number}"
        for _ in range(5):
            mine.mkdir()
            (mine / "inblob").write_bytes(bytes([number]) * 64)
            if Report.parse((mine / "outblob").read_bytes()).report_data != bytes([number]) * 64:
                wrong.append(mine.name)
            mine.rmdir()

    threads = [threading.Thread(target=use, args=(number,), daemon=True) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_programs_can_be_started_while_a_file_is_open(item: Path) -> None:
    """The new process closes its copies of open files, which the mount must be free to hear."""
    with (item / "generation").open("rb") as held:
        for _ in range(5):
            subprocess.run(["true"], check=True, timeout=20)
            subprocess.run(["true"], check=True, close_fds=False, timeout=20)
        assert held.read() == b"0\n"


def test_nothing_stays_mounted_when_the_block_fails(root: AmdRoot, tmp_path: Path) -> None:
    """Even with a file still open in the mount."""
    directory = tmp_path / "tsm"
    with (
        contextlib.suppress(ZeroDivisionError),
        contextlib.ExitStack() as open_files,
        ConfigfsTsm(SnpMachine(root)).mounted(directory),
    ):
        (directory / "report" / "x").mkdir()
        open_files.enter_context((directory / "report" / "x" / "generation").open("rb"))
        raise ZeroDivisionError
    assert not os.path.ismount(directory)


def test_nothing_stays_mounted_when_the_process_is_killed(cache: Path, root: AmdRoot, tmp_path: Path) -> None:
    """A watcher unmounts when its pipe closes."""
    code = (
        "import sys, time, pathlib\n"
        "from kagimori_simulator.amd import AmdRoot\n"
        "from kagimori_simulator.configfs import ConfigfsTsm\n"
        "from kagimori_simulator.machine import SnpMachine\n"
        "machine = SnpMachine(AmdRoot.cached(pathlib.Path(sys.argv[1])))\n"
        "with ConfigfsTsm(machine).mounted(pathlib.Path(sys.argv[2])):\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    directory = tmp_path / "tsm"
    arguments = [sys.executable, "-c", code, str(cache / "amd"), str(directory)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        assert directory.is_mount()
        child.kill()
    deadline = time.monotonic() + 10
    while _is_mounted(directory) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _is_mounted(directory)


def _is_mounted(directory: Path) -> bool:
    return f" {directory} " in Path("/proc/self/mounts").read_text()


def test_a_mount_leaves_signals_to_their_owner(root: AmdRoot, tmp_path: Path) -> None:
    """Libfuse takes SIGTERM for itself; a program with a mount must still end by it."""
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with ConfigfsTsm(SnpMachine(root)).mounted(tmp_path / "tsm") as directory:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (directory / "report").is_dir()
            assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_mount_that_cannot_be_is_named(
    root: AmdRoot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing hangs."""
    (tmp_path / "tsm").mkdir()
    directory = tmp_path / "tsm"
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: directory.rmdir())
    with (
        pytest.raises(HardwareError, match="did not come up"),
        ConfigfsTsm(SnpMachine(root)).mounted(directory),
    ):
        pytest.fail("there was no directory to mount on")
