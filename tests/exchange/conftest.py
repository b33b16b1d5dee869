"""A whole owner and a whole VM: a real verifier over real HTTP, a real swtpm, a real report door, a real LUKS2 volume."""

from __future__ import annotations

import contextlib
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import uvicorn

from kagimori_agent import config as agent_config
from kagimori_agent.config import Config
from kagimori_simulator import disk
from kagimori_simulator.amd import AmdRoot
from kagimori_simulator.event_log import MeasuredBoot
from kagimori_simulator.machine import SnpMachine
from kagimori_simulator.world import VerifierAt, VolumeAt, World
from kagimori_verifier import app
from kagimori_verifier import settings as verifier_settings
from kagimori_verifier.app import Verifier
from kagimori_verifier.appraise.policy import VM_OWNED_PCRS, BootWay, Policy, TcbFloor
from kagimori_verifier.endorsements.directory import EndorsementDirectory
from kagimori_verifier.keystore.kek import FileKek
from kagimori_verifier.store import profiles, references, roots, vms

CHIP_ID = bytes(range(64))
SVSM = b"\x5a" * 48
DIRECT = b"\xd1" * 48
VM = "web1"
PASSPHRASE = b"the passphrase of an installer"
FLOOR = TcbFloor(boot_loader=4, tee=0, snp=24, microcode=219)


@dataclass
class Owner:
    """The owner's side: a verifier with its database, and hands to change what it knows."""

    directory: Path
    root: AmdRoot
    verifier: Verifier
    url: str = ""
    clock: list[float] = field(default_factory=lambda: [0.0])

    @property
    def public_key(self) -> bytes:
        """The key that replies are signed by."""
        return self.verifier.keys.current

    def enrol_profile(self, name: str, boot_way: BootWay, kind: str, digest: bytes) -> None:
        """Add a profile with one measurement."""
        policy = Policy(boot_way=boot_way, tcb_floors={"Milan": FLOOR})
        features = ["vtpm"] if kind == "svsm-vtpm" else []
        with self.verifier.store.write() as txn:
            profiles.add(txn, profiles.ProfileRow(name, msgspec.json.encode(policy).decode(), 0))
            row = references.MeasurementRow(digest, name, kind, f"build of {name}", features, 0)  # type: ignore[arg-type]  # kinds are strings here
            references.add_measurement(txn, row)

    def enrol_vm(self, vm_id: str, profile: str) -> None:
        """Add a VM that may run on the one chip."""
        with self.verifier.store.write() as txn:
            vms.add(txn, vms.VmRow(vm_id, profile, True, ["unlock", "dry-run"], [CHIP_ID.hex()], 0))

    def enrol_volume(self, vm_id: str, uuid: str, unlock_key: bytes) -> None:
        """Keep an unlock key."""
        wrapped = self.verifier.unlock_keys.wrap(unlock_key, vm_id, uuid, 1)
        with self.verifier.store.write() as txn:
            vms.add_volume(txn, vms.VolumeRow(vm_id, uuid, "active", wrapped, 1, 0, "cryptroot", 0))

    def accept_boot(self, vm_id: str, profile: str, boot: MeasuredBoot, boot_way: BootWay) -> None:
        """Make the PCRs of a boot reference values of the VM and its profile."""
        owned = VM_OWNED_PCRS[boot_way]
        pcrs = {str(i): {"digest": boot.pcr(i).hex(), "events": []} for i in range(15)}
        parts = {
            ("vm", vm_id): {i: pcr for i, pcr in pcrs.items() if int(i) in owned},
            ("profile", profile): {i: pcr for i, pcr in pcrs.items() if int(i) not in owned},
        }
        with self.verifier.store.write() as txn:
            for (kind, owner), values in parts.items():
                references.add_boot_state(
                    txn, references.BootStateRow(kind, owner, "accepted", values, "test", 0)
                )


def _serve(verifier: Verifier) -> contextlib.AbstractContextManager[str]:
    """Serve over HTTP in a thread, on a port of the system's choice."""

    @contextlib.contextmanager
    def served() -> Iterator[str]:
        config = uvicorn.Config(
            verifier.application(), host="127.0.0.1", port=0, log_config=None, lifespan="off", ws="none"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join(10)

    return served()


@pytest.fixture(scope="session")
def amd(cache: Path) -> AmdRoot:
    """Give the simulated root of this run."""
    return AmdRoot.cached(cache / "amd", "Milan")


@pytest.fixture
def owner(tmp_path: Path, amd: AmdRoot) -> Iterator[Owner]:
    """Give a running verifier that trusts the simulated root and knows no VM yet."""
    directory = tmp_path / "owner"
    directory.mkdir()
    text = verifier_settings.default_text("http://127.0.0.1", "127.0.0.1:0")
    text = text.replace("per_minute_and_source = 120", "per_minute_and_source = 100000")
    text = text.replace("burst_per_source = 30", "burst_per_source = 10000")
    (directory / "verifier.toml").write_text(text, encoding="utf-8")
    settings = verifier_settings.load(directory / "verifier.toml")
    app.create(settings, FileKek(directory / "kek").create(), 0)
    shift = [0.0]
    verifier = app.open_verifier(settings, clock=lambda: time.time() + shift[0])
    kept = EndorsementDirectory(settings.path(settings.endorsements))
    for der in (amd.ark_der, amd.ask_der, amd.asvk_der, amd.crl()):
        kept.add(der)
    spki = _spki(amd.ark_der)
    with verifier.store.write() as txn:
        roots.add(txn, roots.RootRow(spki, "Milan", "simulated", 0))
    try:
        with _serve(verifier) as url:
            yield Owner(directory, amd, verifier, url, shift)
    finally:
        verifier.close()


def _spki(der: bytes) -> bytes:
    from kagimori_verifier.verify.certificate import Certificate

    return Certificate.parse(der).spki_sha256


@dataclass
class Enrolled:
    """One enrolled VM with its disk; ``boot`` starts it, on a machine that may lie."""

    owner: Owner
    directory: Path
    volume: VolumeAt
    unlock_key: bytes
    kind: str = "svsm-vtpm"

    @contextlib.contextmanager
    def booted(
        self,
        boot: MeasuredBoot | None = None,
        lie: Callable[[SnpMachine], None] | None = None,
        vm_id: str = VM,
    ) -> Iterator[tuple[World, Config]]:
        """Start the VM and give its world and its agent's configuration."""
        svsm = self.kind == "svsm-vtpm"
        machine = SnpMachine(
            self.owner.root,
            chip_id=CHIP_ID,
            svsm=svsm,
            measurement=SVSM if svsm else DIRECT,
            report_version=3,
        )
        if lie is not None:
            lie(machine)
        directory = self.directory / f"vm-{time.monotonic_ns()}"
        with World.running(directory, machine, boot) as world:
            key = b64encode(self.owner.public_key).decode()
            path = world.agent_toml(vm_id, [VerifierAt("home", [self.owner.url], [key])], [self.volume])
            yield world, agent_config.load(path)


@pytest.fixture
def volume(tmp_path: Path) -> tuple[VolumeAt, bytes]:
    """Give a LUKS2 volume whose second keyslot takes an unlock key, and that key."""
    unlock_key = b"\x01an unlock key that is findable!"[:32].ljust(32, b"\xfe")
    image = tmp_path / "disk.img"
    uuid = disk.make_volume(image, unlock_key)
    return VolumeAt(uuid, "cryptroot", image), unlock_key


@pytest.fixture
def enrolled(tmp_path: Path, owner: Owner, volume: tuple[VolumeAt, bytes]) -> Enrolled:
    """Give an enrolled VM below an SVSM whose honest GRUB boot is accepted."""
    from kagimori_simulator import measured_boot

    at, unlock_key = volume
    owner.enrol_profile("grub", "grub", "svsm-vtpm", SVSM)
    owner.enrol_vm(VM, "grub")
    owner.enrol_volume(VM, at.uuid, unlock_key)
    owner.accept_boot(VM, "grub", measured_boot.grub(), "grub")
    return Enrolled(owner, tmp_path, at, unlock_key)


@pytest.fixture
def enrolled_direct(tmp_path: Path, owner: Owner, volume: tuple[VolumeAt, bytes]) -> Enrolled:
    """Give an enrolled VM without an SVSM: its measurement covers everything."""
    at, unlock_key = volume
    owner.enrol_profile("direct", "direct", "snp-direct", DIRECT)
    owner.enrol_vm(VM, "direct")
    owner.enrol_volume(VM, at.uuid, unlock_key)
    return Enrolled(owner, tmp_path, at, unlock_key, "snp-direct")
