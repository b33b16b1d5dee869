"""One emulated machine: QEMU without KVM, OVMF, a TPM of its own, and a serial console whose lines carry their time.

Everything a machine writes lies in its directory; everything it starts dies with it, also when this process is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

CODE: Final = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
VARS: Final = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
PROGRAMS: Final = ("qemu-system-x86_64", "swtpm", "setpriv", "nice")
VERIFIER_AT: Final = "10.0.2.100:8117"
"""Where a guest finds its verifier: an address of QEMU's own network, which leads nowhere else."""
IPV6_ONLY: Final = "user,id=n0,ipv4=off,ipv6=on,ipv6-net=fd00::/64,ipv6-host=fd00::2"
"""Another network: it announces itself by IPv6 alone, and its router leads to this machine's own ::1."""

PHASES: Final = (
    ("kernel", r"\] Linux version "),
    ("initramfs", r"Run /init as init process"),
    ("unlock", r"kagimori: asking"),
    ("answer", r"kagimori-agent: evidence collected"),
    ("opened", r"kagimori-agent: \S+: mapped"),
    ("root", r"guest: root reached"),
    ("done", r"guest: done"),
    ("login", r"^\S+ login: "),
)
"""What a boot passes through, by the first console line of each; before the first of them runs the firmware."""

SWITCHED_ON: Final[list[Machine]] = []
"""The machines of a test, for whoever wants to know how long they took."""

_STOP_S: Final = 10
_TPM_READY_S: Final = 10
_POLL_S: Final = 0.05
_READ_SIZE: Final = 65536


@dataclass
class Line:
    """A line of the console, and the seconds from power on."""

    at_s: float
    text: str


@dataclass
class Machine:
    """A running machine; make one with ``start``."""

    directory: Path
    qemu: subprocess.Popen[bytes]
    port_file: Path
    lines: list[Line] = field(default_factory=list)
    unfinished: Line | None = None
    """What stands on the console's last line so far, such as a prompt."""
    heard: Callable[[bytes], None] | None = None
    """Gets what comes from the console, as it comes."""
    _news: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False

    def wait_for(self, pattern: str, timeout_s: float, since: int = 0, *, prompt: bool = False) -> Line:
        """Give the first line that matches, or fail with the console's end: at time out, or when the machine is off.

        The first ``since`` lines are not looked at. A line has ended, unless it is a ``prompt`` that is waited for: what is
        typed before would stand on it.
        """
        wanted = re.compile(pattern)
        deadline = time.monotonic() + timeout_s
        looked_at = since
        with self._news:
            while True:
                for line in self.lines[looked_at:]:
                    if wanted.search(line.text):
                        return line
                if prompt and self.unfinished is not None and wanted.search(self.unfinished.text):
                    return self.unfinished
                looked_at = len(self.lines)
                left = deadline - time.monotonic()
                if self._ended or left <= 0:
                    why = "the machine is off" if self._ended else f"{timeout_s:g} s are over"
                    raise AssertionError(f"no line with {pattern!r}: {why}\n{self.tail()}")
                self._news.wait(min(left, 1.0))

    def wait_off(self, timeout_s: float) -> float:
        """Wait until the machine has switched itself off; gives the seconds from power on."""
        deadline = time.monotonic() + timeout_s
        with self._news:
            while not self._ended:
                if time.monotonic() > deadline:
                    raise AssertionError(f"still on after {timeout_s:g} s\n{self.tail()}")
                self._news.wait(1.0)
        code = self.qemu.wait(_STOP_S)
        assert code == 0, f"QEMU ended with {code}: {(self.directory / 'qemu.log').read_text()}"
        return self.lines[-1].at_s if self.lines else 0.0

    def said(self, pattern: str) -> list[str]:
        """Give the lines so far that match."""
        return [line.text for line in list(self.lines) if re.search(pattern, line.text)]

    def tail(self, count: int = 25) -> str:
        """Give the console's end, short enough that a report of two failures holds both."""
        last = [*self.lines, *([self.unfinished] if self.unfinished else [])][-count:]
        return "\n".join(f"{line.at_s:7.2f}  {line.text[:140]}" for line in last)

    def type(self, text: str) -> None:
        """Type a line at the serial console, as whoever has the host can."""
        self.type_raw(text.encode() + b"\n")

    def phases(self) -> dict[str, float]:
        """Give the second at which each phase began, as far as the boot came."""
        begun: dict[str, float] = {}
        for name, pattern in PHASES:
            for line in list(self.lines):
                if re.search(pattern, line.text):
                    begun[name] = round(line.at_s, 1)
                    break
        return begun

    def connect_verifier(self, url: str | None) -> None:
        """Let the guest's verifier be the one at ``url`` of this machine, or nobody."""
        if url is None:
            self.port_file.unlink(missing_ok=True)
        else:
            self.port_file.write_text(url.rpartition(":")[2].rstrip("/"), encoding="ascii")

    def type_raw(self, keys: bytes) -> None:
        """Type keys at the serial console."""
        assert self.qemu.stdin is not None
        self.qemu.stdin.write(keys)
        self.qemu.stdin.flush()

    def _read(self) -> None:
        start = time.monotonic()
        assert self.qemu.stdout is not None
        begun = b""
        with (self.directory / "serial.log").open("w", encoding="utf-8") as log:
            while data := os.read(self.qemu.stdout.fileno(), _READ_SIZE):
                *whole, begun = (begun + data).split(b"\n")
                now = time.monotonic() - start
                lines = [Line(now, _text(raw)) for raw in whole]
                log.writelines(f"{line.at_s:8.3f}  {line.text}\n" for line in lines)
                log.flush()
                with self._news:
                    self.lines += lines
                    self.unfinished = Line(now, _text(begun)) if begun else None
                    self._news.notify_all()
                if self.heard is not None:
                    self.heard(data)
            log.write(_text(begun))
        with self._news:
            if begun:
                self.lines.append(Line(time.monotonic() - start, _text(begun)))
                self.unfinished = None
            self._ended = True
            self._news.notify_all()


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace").rstrip("\r\n")


@dataclass(frozen=True)
class Disk:
    """A disk image. ``serial`` names it in the guest; what that writes is thrown away, unless it is ``kept``."""

    path: Path
    serial: str
    kept: bool = False


@dataclass(frozen=True)
class Firmware:
    """Firmware and the variables that it finds; ``secure`` keeps the guest from changing these behind its back."""

    code: Path
    variables: Path
    secure: bool

    @property
    def machine(self) -> list[str]:
        """QEMU's words for a machine with it, but for the copy of its variables that each machine has."""
        words = ["-machine", "q35,smm=on" if self.secure else "q35"]
        if self.secure:
            words += ["-global", "driver=cfi.pflash01,property=secure,value=on"]
        words += ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={self.code}"]
        return words


PLAIN: Final = Firmware(CODE, VARS, secure=False)
SECURE_BOOT: Final = Firmware(
    CODE.with_name("OVMF_CODE_4M.secboot.fd"), CODE.with_name("OVMF_VARS_4M.ms.fd"), secure=True
)
"""Secure Boot is on, with Microsoft's certificates in its variables."""
SECURE_BOOT_OFF: Final = Firmware(SECURE_BOOT.code, VARS, secure=True)
"""The same, whose variables are back to those of a machine without an owner."""


def start(
    directory: Path,
    *,
    kernel: Path,
    initramfs: Path,
    cmdline: str,
    disks: Sequence[Disk],
    verifier: str | None,
    processors: int = 1,
) -> contextlib.AbstractContextManager[Machine]:
    """Switch a machine on whose kernel QEMU hands over; else as ``switch_on``."""
    boots = ["-kernel", str(kernel), "-initrd", str(initramfs), "-append", cmdline]
    return switch_on(directory, boots=boots, disks=disks, verifier=verifier, processors=processors)


def from_disk(image: Path) -> list[str]:
    """Say what is booted: whatever the firmware finds on this disk, which is only read."""
    return [
        *("-drive", f"file={image},if=none,id=boot,format=raw,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=boot,serial=boot,bootindex=0"),
    ]


@contextlib.contextmanager
def switch_on(
    directory: Path,
    *,
    boots: Sequence[str],
    disks: Sequence[Disk],
    verifier: str | None,
    firmware: Firmware = PLAIN,
    tpm: bool = True,
    processors: int = 1,
    network: str | None = None,
) -> Iterator[Machine]:
    """Switch a machine on, with its verifier at the URL ``verifier`` of this machine, or absent; off at the end.

    ``boots`` are QEMU's words for what is booted, and ``network`` those for another network than the one that leads to the
    verifier alone.
    """
    directory.mkdir(parents=True)
    port_file = directory / "verifier-port"
    relay = shutil.which("python3") or "python3"
    command = [
        *(
            "nice",
            "-n",
            "5",
            "qemu-system-x86_64",
            *firmware.machine,
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "qemu64",
        ),
        *(
            "-smp",
            str(processors),
            "-m",
            "1024",
            "-display",
            "none",
            "-serial",
            "stdio",
            "-monitor",
            "none",
            "-no-reboot",
        ),
        *("-nodefaults", "-no-user-config"),
        *("-drive", f"if=pflash,format=raw,unit=1,file={directory / 'vars.fd'}"),
        *boots,
        *("-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0"),
        "-netdev",
        network
        or f"user,id=n0,restrict=on,guestfwd=tcp:{VERIFIER_AT}-cmd:{relay} -IS {Path(__file__).with_name('relay.py')} {port_file}",
        *("-device", "virtio-net-pci,netdev=n0,romfile="),
    ]
    for number, disk in enumerate(disks):
        snapshot = "off" if disk.kept else "on"
        command += ["-drive", f"file={disk.path},if=none,id=d{number},format=raw,snapshot={snapshot}"]
        command += ["-device", f"virtio-blk-pci,drive=d{number},serial={disk.serial}"]
    shutil.copy(firmware.variables, directory / "vars.fd")
    with _tpm(directory) as socket_path:
        command += [
            "-chardev",
            f"socket,id=chrtpm,path={socket_path}",
            "-tpmdev",
            "emulator,id=tpm0,chardev=chrtpm",
        ]
        command += ["-device", "tpm-crb,tpmdev=tpm0"]
        if not tpm:
            command = command[: command.index(f"socket,id=chrtpm,path={socket_path}") - 1]
        with (directory / "qemu.log").open("wb") as errors:
            qemu = _spawn(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        machine = Machine(directory, qemu, port_file)
        SWITCHED_ON.append(machine)
        machine.connect_verifier(verifier)
        reader = threading.Thread(target=machine._read, daemon=True)
        reader.start()
        try:
            yield machine
        finally:
            _stop(qemu)
            reader.join(_STOP_S)
            for pipe in (qemu.stdin, qemu.stdout):
                if pipe is not None:
                    pipe.close()


@contextlib.contextmanager
def _tpm(directory: Path) -> Iterator[Path]:
    """Run a TPM with fresh seeds and a SHA-256 bank alone; its socket has a short path, as sun_path takes 107 bytes."""
    state = directory / "tpm"
    state.mkdir()
    setup = ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--pcr-banks", "sha256", "--create-ek-cert"]
    with (directory / "swtpm_setup.log").open("wb") as log:
        subprocess.run(setup, check=True, stdout=log, stderr=log, stdin=subprocess.DEVNULL, timeout=60)
    with tempfile.TemporaryDirectory(prefix="kagimori-boot-") as private:
        socket_path = Path(private) / "tpm"
        command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--flags", "not-need-init"]
        command += ["--ctrl", f"type=unixio,path={socket_path}", "--log", f"file={directory / 'swtpm.log'}"]
        process = _spawn(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _TPM_READY_S
            while not socket_path.exists():
                assert process.poll() is None, (directory / "swtpm.log").read_text()
                assert time.monotonic() < deadline, "swtpm does not come up"
                time.sleep(_POLL_S)
            yield socket_path
        finally:
            _stop(process)


def _spawn(
    command: list[str], *, stdout: int, stderr: int | IO[bytes], stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[bytes]:
    """Start a program that the kernel kills when this process dies."""
    whole = ["setpriv", "--pdeathsig", "KILL", "--", *command]
    return subprocess.Popen(whole, stdin=stdin, stdout=stdout, stderr=stderr)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
