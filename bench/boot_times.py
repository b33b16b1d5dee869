"""From a program's start to the mapped device, in the same machine: our agent, and clevis with tang and with the TPM.

Each boot measures one of them, as the first thing that it does once the network is up: that is what a boot has of it. All
boots have the same initramfs, TPM, processor and network; what answers them runs on this machine, behind one door.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench import boot_images
from bench.boot_images import OURS
from tests.boot import images, machine
from tests.boot.estate import BOOT_S, Estate, Site, session_in
from tests.boot.images import PASSPHRASE
from tests.boot.machine import Disk

AGENT: Final = "kagimori"
TANG: Final = "clevis with tang"
TPM: Final = "clevis with the TPM"
_TANG_KEYS: Final = "var/db/bench-tang"
_SWTPM_PORT: Final = 2391
_READY_S: Final = 10
_BIND_S: Final = 120
_PEEKED: Final = 9
_CHUNK: Final = 65536
_SECTOR: Final = 512

_PREPARE: Final = r"""
export PATH=/usr/lib/kagimori/bin:/usr/sbin:/usr/bin:/sbin:/bin
now() { read -r up _ </proc/uptime; echo "bench: $up $*"; }
mkdir -p /run/kagimori
cp /etc/kagimori/boot.conf /run/kagimori/boot.conf
for each in configfs sev-guest dm-crypt; do modprobe -q "$each"; done
grep -q ' /sys/kernel/security ' /proc/mounts || mount -t securityfs securityfs /sys/kernel/security
now network begins
/usr/lib/kagimori/boot/network up
now network is up
"""
_FINISH: Final = r"""
now ended
[ ! -b /dev/mapper/cryptroot ] || echo 'bench: mapped'
poweroff -f
"""
_AGENT: Final = r"""
now begins
/usr/bin/kagimori-agent unlock 2>&1 | while IFS= read -r line; do now "said $line"; done
"""
_CLEVIS: Final = r"""
now begins
clevis-luks-unlock -d /dev/disk/by-id/virtio-root -n cryptroot
"""
_SCRIPTS: Final = {AGENT: _AGENT, TANG: _CLEVIS, TPM: _CLEVIS}
_MAPPED: Final = {AGENT: r"said \S*cryptroot: mapped|said .*: cryptroot: mapped", TANG: "ended", TPM: "ended"}


@dataclass(frozen=True)
class Setting:
    """What all boots share: the images, the state of the TPM, and a volume for each of those that are compared."""

    site: Site
    initramfs: Path
    tpm: Path
    volumes: dict[str, Path]
    chroot: Path


@dataclass(frozen=True)
class Boot:
    """What one boot took, in seconds: to the mapped device, to the program's end, and for the network before.

    ``processor_s`` is what the emulator's processor was busy until the mapped device: who else uses this machine hardly shows
    in it.
    """

    mapped_s: float
    processor_s: float
    ended_s: float
    network_s: float


def prepare(rivals: Path, estate: Estate, scratch: Path) -> Setting:
    """Make the one initramfs, seal a volume to tang and one to the TPM, and let the owner accept this boot."""
    chroot = boot_images.copied(rivals, scratch / "image/root", ["clevis", OURS], estate.agent_toml)
    boot_images.simulated(chroot)
    initramfs = scratch / "initrd.img"
    shutil.copy(boot_images.initramfs(chroot), initramfs)
    tpm = scratch / "tpm"
    tpm.mkdir()
    images.run(["swtpm_setup", "--tpm2", "--tpmstate", str(tpm), "--pcr-banks", "sha256", "--create-ek-cert"])
    volumes = {AGENT: estate.volume}
    for name in (TANG, TPM):
        volumes[name] = scratch / f"{len(volumes)}.img"
        shutil.copy(estate.images.volume, volumes[name])
    _bind(chroot, tpm, volumes)
    shutil.copytree(estate.verifier, scratch / "verifier")
    setting = Setting(Site(estate, scratch), initramfs, tpm, volumes, chroot)
    with answering(setting) as url:
        first = [text for text, _ in _play(setting, AGENT, url)]
    setting.site.verifier("reference", "accept", session_in(first), "--yes", "--label", "bench")
    return setting


@contextlib.contextmanager
def answering(setting: Setting) -> Iterator[str]:
    """Run the verifier and a tang server behind one door; gives its URL."""
    tangd = ["chroot", str(setting.chroot), "/usr/libexec/tangd", f"/{_TANG_KEYS}"]
    with setting.site.serving() as served, _door(served.url, tangd) as url:
        yield url


def measure(setting: Setting, name: str, url: str) -> Boot:
    """Boot once and measure; raises RuntimeError where no device was mapped."""
    console = _play(setting, name, url)
    if not any("bench: mapped" in text for text, _ in console):
        raise RuntimeError(f"{name} has mapped nothing:\n" + "\n".join(text for text, _ in console[-40:]))
    told = [
        (match[2], float(match[1]), busy)
        for text, busy in console
        if (match := re.search(r"bench: (\d+\.\d+) (.*)", text))
    ]

    def at(pattern: str) -> tuple[float, float]:
        return next((up, busy) for word, up, busy in told if re.match(pattern, word))

    (begun, busy), (mapped, busy_then), (ended, _) = at("begins"), at(_MAPPED[name]), at("ended")
    network_s = at("network is up")[0] - at("network begins")[0]
    return Boot(mapped - begun, busy_then - busy, ended - begun, network_s)


def _play(setting: Setting, name: str, url: str) -> list[tuple[str, float]]:
    """Boot once; gives the console's lines, each with the seconds that the emulator had been busy when it came."""
    directory = setting.site.directory / "vm"
    if directory.exists():
        shutil.rmtree(directory)
    script = setting.site.directory / "scene"
    text = (_PREPARE + _SCRIPTS[name] + _FINISH).encode()
    script.write_bytes(text + b"\n" * (-len(text) % _SECTOR))  # a disk has whole sectors
    built = setting.site.estate.images
    disks = [Disk(setting.volumes[name], "root"), Disk(built.hardware, "snp"), Disk(script, "scene")]
    with _swtpm(setting.tpm) as words:
        boots = ["-kernel", str(built.kernel), "-initrd", str(setting.initramfs)]
        boots += ["-append", built.variant.cmdline, *words]
        with machine.switch_on(directory, boots=boots, disks=disks, verifier=url, tpm=False) as running:
            busy: list[float] = []

            def heard(_: bytes) -> None:
                busy.extend([_busy_s(running.qemu.pid)] * (len(running.lines) - len(busy)))

            running.heard = heard
            running.wait_off(BOOT_S)
            busy.extend(busy[-1:] * (len(running.lines) - len(busy)))
            return [(line.text, at) for line, at in zip(running.lines, busy, strict=True)]


def _busy_s(pid: int) -> float:
    """Give the processor seconds of a process (proc(5): utime and stime are the fields 14 and 15, after the name's)."""
    fields = (
        Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    )
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _swtpm(state: Path, port: int = 0) -> Iterator[list[str]]:
    """Run a TPM with a copy of this state: at a port and the next one, or else for QEMU, whose words are given."""
    with tempfile.TemporaryDirectory(prefix="kagimori-bench-") as private:
        own, control = Path(private) / "state", Path(private) / "control"
        shutil.copytree(state, own)
        command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "--",
            "swtpm",
            "socket",
            "--tpm2",
            "--tpmstate",
            f"dir={own}",
        ]
        if port:
            command += [
                "--flags",
                "not-need-init,startup-clear",
                "--server",
                f"type=tcp,port={port},bindaddr=127.0.0.1",
            ]
            command += ["--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1"]
        else:
            command += ["--flags", "not-need-init", "--ctrl", f"type=unixio,path={control}"]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _READY_S
            while not (_listens(port) if port else control.exists()):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("swtpm does not come up")
                time.sleep(0.05)
            words = [
                "-chardev",
                f"socket,id=benchtpm,path={control}",
                "-tpmdev",
                "emulator,id=tpm0,chardev=benchtpm",
            ]
            yield [*words, "-device", "tpm-crb,tpmdev=tpm0"]
        finally:
            process.terminate()
            process.wait(_READY_S)


def _listens(port: int) -> bool:
    """Tell whether something listens there; connecting would already be a TPM's one conversation."""
    entries = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
    return any(entry.split()[1].endswith(f":{port:04X}") and entry.split()[3] == "0A" for entry in entries)


def _bind(chroot: Path, tpm: Path, volumes: dict[str, Path]) -> None:
    """Give each rival's volume a keyslot of its own, as clevis does it: the TPM's without PCRs, which is its fastest."""
    (chroot / "bench").mkdir()
    (chroot / "bench/key").write_bytes(PASSPHRASE)
    inside = {}
    for name in (TANG, TPM):
        inside[name] = chroot / "bench" / volumes[name].name
        shutil.move(volumes[name], inside[name])
    keys = chroot / _TANG_KEYS
    keys.mkdir(parents=True)
    with (chroot.parent / "bind.log").open("w+b") as log:
        images.in_chroot(chroot, ["/usr/libexec/tangd-keygen", f"/{_TANG_KEYS}"], log.fileno())
        tangd = ["chroot", str(chroot), "/usr/libexec/tangd", f"/{_TANG_KEYS}"]
        with _door("", tangd) as url:
            bound = f'clevis luks bind -f -y -k /bench/key -d "/bench/{inside[TANG].name}" tang'
            script = f"""curl -sSf {url}/adv >/bench/adv && {bound} '{{"url":"http://{machine.VERIFIER_AT}","adv":"/bench/adv"}}'"""
            images.in_chroot(chroot, ["bash", "-c", script], log.fileno())
        with _swtpm(tpm, _SWTPM_PORT):
            script = (
                f"export TPM2TOOLS_TCTI=swtpm:host=127.0.0.1,port={_SWTPM_PORT};"
                f" clevis luks bind -f -y -k /bench/key -d /bench/{inside[TPM].name} tpm2 '{{}}'"
            )
            images.in_chroot(chroot, ["bash", "-c", script], log.fileno())
    for name in (TANG, TPM):
        shutil.move(inside[name], volumes[name])


@contextlib.contextmanager
def _door(verifier: str, tangd: Sequence[str]) -> Iterator[str]:
    """Listen where the guest's one way out leads: requests of tang's protocol go to ``tangd``, all others to the verifier."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_serve, args=(listener, verifier, tangd), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _serve(listener: socket.socket, verifier: str, tangd: Sequence[str]) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_answer, args=(connection, verifier, tangd), daemon=True).start()


def _answer(connection: socket.socket, verifier: str, tangd: Sequence[str]) -> None:
    with connection:
        begun = connection.recv(_PEEKED, socket.MSG_PEEK)
        if begun.startswith((b"GET /adv", b"POST /rec")):
            descriptor = connection.fileno()
            subprocess.run(tangd, stdin=descriptor, stdout=descriptor, check=False, timeout=_READY_S)
            return
        host, _, port = verifier.rpartition("/")[2].partition(":")
        with socket.create_connection((host, int(port))) as other:
            back = threading.Thread(target=_copy, args=(other, connection), daemon=True)
            back.start()
            _copy(connection, other)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
