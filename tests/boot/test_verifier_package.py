"""The verifier's package on a Debian with systemd: set up by the words of its README.Debian, asked by a VM, purged, brought back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from package.__main__ import build
from tests.boot import images, operated
from tests.boot.cache import Cache
from tests.boot.operated import BOOKWORM, TRIXIE, Operated, blocks
from tests.boot.variants import ROOT, Variant

from kagimori_simulator import disk

pytestmark = [pytest.mark.boot, pytest.mark.slow]

SYSTEMD: Final = ROOT / "verifier/systemd"
README: Final = (SYSTEMD / "README.Debian").read_text(encoding="utf-8")
ENCRYPTED: Final = re.sub(r"(?m)^# ?", "", (SYSTEMD / "encrypted-kek.conf").read_text(encoding="utf-8"))
PORT: Final = 8117
BOOT_S: Final = 300
COMMAND_S: Final = 600
"""Seconds that a command may take. Installing takes one or two minutes, for Python compiles the modules."""
PASSPHRASE: Final = b"the installer's passphrase"
BACKUPS: Final = "/var/backups/kagimori-verifier"


@dataclass
class Vm:
    """A VM of a simulated machine, with its disk, that asks the verifier behind a port of this machine."""

    directory: Path
    port: int
    toml: str = ""

    @property
    def disk(self) -> Path:
        """Its one volume."""
        return self.directory / "disk.img"

    def configure(self, toml: list[str]) -> None:
        """Take what `vm config` has printed; the verifier is where this machine finds it."""
        text = "\n".join(toml).replace(f"//keys.example:{PORT}", f"//127.0.0.1:{self.port}")
        (self.directory / "agent.toml").write_text(text, encoding="utf-8")

    def boot(self, *words: str, pass_fds: tuple[int, ...] = ()) -> str:
        """Boot it and run a verb of its agent's that must work; gives what was said."""
        command = [
            sys.executable,
            "-m",
            "kagimori_simulator.cli",
            "run",
            "--dir",
            str(self.directory / "sim"),
        ]
        command += ["--config", str(self.directory / "agent.toml"), "--disk", str(self.disk), *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=COMMAND_S, pass_fds=pass_fds
        )
        assert done.returncode == 0, f"{' '.join(words)}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def enrol(self, code: str) -> None:
        """Enrol its disk by a one-time code."""
        doors = self.directory / "system/etc/kagimori"
        doors.mkdir(parents=True)
        accepted = [f"{door} it is not there\n" for door in ("credentials", "resume", "swap:unknown")]
        (doors / "accepted-doors").write_text("".join(accepted), encoding="utf-8")
        with _handed(code.encode()) as code_fd, _handed(PASSPHRASE) as passphrase_fd:
            self.boot(
                *("enrol", "--system", str(self.directory / "system")),
                *("--backup", str(self.directory / "headers"), "--device", str(self.disk)),
                *("--code-fd", str(code_fd), "--passphrase-fd", str(passphrase_fd)),
                pass_fds=(code_fd, passphrase_fd),
            )


@contextmanager
def _handed(secret: bytes) -> Iterator[int]:
    """Hand a secret over by a descriptor."""
    reader, writer = os.pipe()
    os.write(writer, secret + b"\n")
    os.close(writer)
    try:
        yield reader
    finally:
        os.close(reader)


@pytest.fixture
def keys(_can_boot: None, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Operated]:
    """Switch on the machine that is to be a verifier; the package and the simulated chip's certificates lie in /srv."""
    variant: Variant = request.param
    image = operated.build(Cache(ROOT / ".dev" / "boot"), variant)
    srv = tmp_path / "srv"
    deb = build(variant.suite, tmp_path / "dist", "verifier")
    simulated = [sys.executable, "-m", "kagimori_simulator.cli", "init", "--dir", str(tmp_path / "sim")]
    images.run(simulated)
    shutil.copytree(tmp_path / "sim/endorsements", srv / "endorsements")
    shutil.copy(deb, srv)
    with operated.switched_on(image, srv, tmp_path, PORT) as running:
        running.machine.wait_for("typed: ready", BOOT_S)
        yield running


@pytest.mark.parametrize("keys", [BOOKWORM, TRIXIE], ids=["bookworm", "trixie"], indirect=True)
def test_a_verifier_is_set_up_asked_backed_up_purged_and_brought_back(keys: Operated, tmp_path: Path) -> None:
    """By systemd, with the units' whole confinement, and the KEK first in root's file and then encrypted to the machine."""

    def typed(command: str, code: int = 0) -> list[str]:
        return keys.run(command, COMMAND_S, code=code)

    # Installed, it makes no key and serves nobody.
    typed("apt-get install -y /srv/kagimori-verifier_*.deb")
    typed("systemctl start kagimori-verifier")
    assert typed("! systemctl is-active kagimori-verifier") == ["inactive"]
    assert typed("ls /etc/credstore /var/lib/kagimori-verifier") == [
        "/etc/credstore:",
        "",
        "/var/lib/kagimori-verifier:",
    ]

    # Set up as written.
    set_up, timer, *_ = blocks(README)
    for command in set_up:
        typed(command)
    assert typed("systemctl is-active kagimori-verifier") == ["active"]

    # What a VM must show.
    sim = tmp_path / "sim"
    typed("kagimori-verifier endorsements root add --certificate /srv/endorsements/ark.der --label simulated")
    typed("umask 077; kagimori-verifier endorsements import /srv/endorsements")
    floor = "Milan:boot_loader=4,tee=0,snp=24,microcode=219"
    typed(f"kagimori-verifier profile add debian --boot-way grub --tcb-floor {floor}")
    measurement = (sim / "measurement").read_text().strip()
    typed(
        f"kagimori-verifier reference measurement add {measurement} --profile debian"
        " --kind svsm-vtpm --label svsm --svsm-feature vtpm"
    )
    chip = (sim / "chip-id").read_text().strip()
    added = json.loads(
        "".join(typed(f"kagimori-verifier vm add web1 --profile debian --chip {chip} --json 2>/dev/null"))
    )

    # It enrols, and its owner looks at what it had booted.
    vm = Vm(tmp_path, keys.port)
    disk.make_volume(vm.disk, PASSPHRASE)
    vm.configure(typed("kagimori-verifier vm config web1 2>/dev/null"))
    vm.enrol(added["enrol"]["code"])
    (waiting,) = json.loads("".join(typed("kagimori-verifier volume list --json 2>/dev/null")))
    typed(f"kagimori-verifier reference accept {waiting['session']} --yes")
    vm.configure(typed("kagimori-verifier vm config web1 2>/dev/null"))
    assert ": proved" in vm.boot("unlock", "--prove")

    # The KEK is encrypted to the machine, and the plain one goes.
    (encrypt,), (by_systemd,) = blocks(ENCRYPTED)[:2]
    typed(encrypt)
    for unit in ("kagimori-verifier", "kagimori-verifier-backup"):
        place = f"/etc/systemd/system/{unit}.service.d"
        typed(
            f"install -D -m 644 /usr/share/doc/kagimori-verifier/examples/encrypted-kek.conf {place}/encrypted-kek.conf"
        )
    typed("systemctl daemon-reload && rm /etc/credstore/kagimori-kek && systemctl restart kagimori-verifier")
    assert ": proved" in vm.boot("unlock", "--prove")

    # Backups: by the unit that the timer starts, and by root.
    for command in timer:
        typed(command)
    typed("systemctl start kagimori-verifier-backup.service")
    (backup,) = typed(f"stat -c '%U %a %n' {BACKUPS}/*")
    assert backup.startswith(f"kagimori-verifier 600 {BACKUPS}/verifier-")
    typed(by_systemd.replace("VERB ...", "backup by-hand"))
    assert typed("stat -c '%U %a %n' by-hand") == ["root 600 by-hand"]

    # Purged, it leaves what disks hang by; brought back, it serves as before.
    said = typed("apt-get purge -y kagimori-verifier")
    assert [line for line in said if line.startswith("kagimori-verifier: kept, because")], said
    assert typed("! systemctl is-active kagimori-verifier") == ["inactive"]
    assert typed("command -v kagimori-verifier", 127) == []
    typed("apt-get install -y /srv/kagimori-verifier_*.deb")
    assert typed("systemctl is-active kagimori-verifier") == ["active"]
    assert ": proved" in vm.boot("unlock", "--prove")
