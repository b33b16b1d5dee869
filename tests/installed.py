"""A VM that was installed at its provider, whose volumes its owner's verifier is to know: what tests of enrolments begin with."""

from __future__ import annotations

import os
import subprocess
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.worlds import CHIP_ID, SVSM, VM, Owner

from kagimori_agent import cli, config, enrol, keyslots
from kagimori_protocol.enrol_code import EnrolCode
from kagimori_simulator import disk, measured_boot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.world import VerifierAt, VolumeAt, World
from kagimori_verifier import enrolling
from kagimori_verifier.store import vms

PASSPHRASE = b"the passphrase of an installer"


def quiet(_: str) -> None:
    """Say nothing."""


@dataclass
class Installed:
    """A VM that was installed at its provider: its volumes open by a passphrase, and its owner's verifier knows none."""

    owner: Owner
    directory: Path
    volumes: list[VolumeAt]

    @contextmanager
    def booted(self, *volumes: VolumeAt) -> Iterator[tuple[World, Path]]:
        """Boot it, and give the world and its agent.toml, which names ``volumes``."""
        machine = SnpMachine(self.owner.root, chip_id=CHIP_ID, svsm=True, measurement=SVSM, report_version=3)
        place = self.directory / f"vm-{os.urandom(4).hex()}"
        with World.running(place, machine) as world:
            at = VerifierAt("home", [self.owner.url], [in_base64(self.owner.public_key)])
            yield world, world.agent_toml(VM, [at], volumes)

    def code(self) -> EnrolCode:
        """Make a code."""
        with self.owner.verifier.store.write() as txn:
            return enrolling.make_code(txn, VM, self.owner.now_s())[0]

    def enrol(
        self,
        toml: Path,
        code: EnrolCode,
        volume_keys: dict[str, bytes] | None = None,
        say: Callable[[str], None] = quiet,
    ) -> enrol.Enrolled:
        """Enrol all volumes, from the booted system."""
        loaded = config.load(toml)
        devices = [volume.device for volume in self.volumes]
        targets = enrol.prepared(loaded, devices, [], lambda *_: PASSPHRASE, volume_keys)
        return enrol.enrol(loaded, toml, code, targets, say, backups=self.directory / "headers")

    def run_enrol(self, toml: Path, *words: str, code: str | None = None) -> int:
        """Run the command for all volumes, as a program does; give its exit code."""
        command = ["enrol", "--config", str(toml), "--backup", str(self.directory / "kept"), *words]
        for volume in self.volumes:
            command += ["--device", str(volume.device)]
        given = {"--code-fd": (code or self.code().text()).encode(), "--passphrase-fd": PASSPHRASE}
        for option, content in given.items():
            reader, writer = os.pipe()
            os.write(writer, content + b"\n")
            os.close(writer)
            command += [option, str(reader)]
        return cli.main(command)

    def states(self) -> dict[str, str]:
        """Give the states of the VM's volumes."""
        with self.owner.verifier.store.read() as txn:
            return {row.uuid: row.state for row in vms.volumes(txn, VM, state=None)}


def in_base64(raw: bytes) -> str:
    """Write bytes as agent.toml has them."""
    return b64encode(raw).decode()


@pytest.fixture
def installed(tmp_path: Path, owner: Owner) -> Installed:
    """Give a VM with root and data, whose honest boot its owner has accepted."""
    owner.enrol_profile("grub", "grub", "svsm-vtpm", SVSM)
    owner.enrol_vm(VM, "grub")
    owner.change_vm(VM, purposes=["unlock", "dry-run", "enrol"])
    owner.accept_boot(VM, "grub", measured_boot.grub(), "grub")
    volumes = []
    for name in ("root", "data"):
        image = tmp_path / f"{name}.img"
        volumes.append(VolumeAt(disk.make_volume(image, PASSPHRASE), f"crypt{name}", image))
    return Installed(owner, tmp_path, volumes)


def opens(image: Path, key: bytes) -> bool:
    """Ask cryptsetup itself."""
    command = ["cryptsetup", "open", "--test-passphrase", "--type", "luks2", "--key-file", "-", str(image)]
    return subprocess.run(command, input=key, capture_output=True, check=False).returncode == 0


def slots(image: Path) -> list[str]:
    """Name the keyslots that a header has a token of ours for."""
    with keyslots.opened(image) as one:
        return keyslots.ours(one.load())
